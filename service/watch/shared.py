"""Shared: what the watches of several replicas tell each other, through the quotas' store."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from service.metrics import Metrics
from service.quota_redis import pseudonym
from service.quota_store import PREFIX, Store, StoreDownError
from service.settings import Settings
from service.watch.evidence import (
    Evidence,
    Forgiven,
    Judged,
    Place,
    Sent,
    Verdict,
    read_evidence,
    read_verdict,
    write_judged,
    write_sent,
    write_verdict,
)
from service.watch.journal import LONGEST, Entry, Journal

log = logging.getLogger(__name__)

FORMAT = 2
"""Of what journals hold. Another one has journals of its own, so that two versions of the service may run side by side."""
EVIDENCE, VERDICTS = f"{PREFIX}watch:{FORMAT}:", f"{PREFIX}suspicions:{FORMAT}"
FOLLOW_S = 0.25
"""How often a replica asks for others' verdicts: a suspicion, and its forgiving, is known everywhere within about this."""
TOLD_AT_ONCE = 8
"""Callers of whose answers others are told at once in the background: charges should not wait for many of them."""
MOST_UNTOLD = 4096
"""Verdicts that are kept for others while the store is down."""
UNTOLD_CALLERS = 256
"""Callers whose answers, one for each image that is remembered, are kept while the store is down: 5 MB by default."""
UNNAMED = "hash:"
"""What a caller is listed as, before its pseudonym, where this replica has not met it."""
ENTRIES_PER_IMAGE = 4
"""Entries of a caller's journal for each image that is remembered: others may ask in between, and answers come on top."""
HALF_LIVES = 1
"""A journal is kept for as long as a run takes to fade by half. Quotas should not be crowded out of a store by what hardly
counts: who waits for that long after each run may send, by default, 100 steps of a search an hour, and 69 who never waits."""
DAY_S = 86_400
"""Suspicions are kept for so much longer than they last: a store that is short of memory forgets first what ends soonest."""

# Whoever comes first chooses the key of fingerprints; it is kept as long as the store keeps it.
OFFER = """
local kept = redis.call('HGET', KEYS[1], 'secret')
if not kept then
  kept = ARGV[1]
  redis.call('HSET', KEYS[1], 'secret', kept)
end
return kept
"""


class Shared:
    """Exchanges evidence and verdicts with other replicas; while the store is down nothing comes, and the metrics say so.

    Args:
        store: The quotas'.
        settings: How much is kept and for how long; the secret under which callers are named and, if it is not empty, from
            which the key of fingerprints follows. Without it, that key is in the store, too.
        metrics: Told of requests that were looked at without what others know.

    Attributes:
        secret: What fingerprints are keyed with.
    """

    def __init__(self, store: Store, settings: Settings, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._name_key = settings.limiter_secret.get_secret_value().encode()
        self._is_derived = bool(self._name_key)
        self.secret = (
            hmac.digest(self._name_key, b"palisade fingerprints", "sha256") if self._is_derived else secrets.token_bytes(32)
        )
        source = secrets.token_bytes(8)
        kept, kept_s = ENTRIES_PER_IMAGE * settings.watch_recent_images, HALF_LIVES * 60 * settings.watch_memory_minutes
        self._evidence = Journal(store, kept, kept_s, source)
        self._verdicts = Journal(store, LONGEST, DAY_S + 60 * settings.suspect_minutes, source)
        self._place = Place()
        self._offer = store.script(OFFER)
        self._names: OrderedDict[str, str] = OrderedDict()  # of callers met here, by pseudonym
        self._most_names = settings.watch_max_callers
        self._untold: dict[str, list[Judged]] = {}  # answers, by caller
        self._verdicts_untold: list[tuple[float, Verdict]] = []  # and since when
        self._unforgiven: set[str] = set()  # forgiven here, and others do not know it yet
        self._turn = asyncio.Lock()
        self._most_answers = settings.watch_recent_images
        self._suspect_s = 60 * settings.suspect_minutes
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._heed: Callable[[Verdict, float, bool], None] = lambda verdict, age_s, is_ours: None
        self._adopt: Callable[[bytes], None] = lambda secret: None

    async def start(self, heed: Callable[[Verdict, float, bool], None], adopt: Callable[[bytes], None]) -> None:
        """Learn what is known, and go on learning it in the background.

        Args:
            heed: Told of every verdict, its age in seconds and whether it was told here.
            adopt: Told of another key of fingerprints: other replicas have that one.
        """
        self._heed, self._adopt = heed, adopt
        await self._guarded(self.follow())
        self._following = asyncio.create_task(self._go_on_following())

    def stop(self) -> None:
        """Learn nothing more."""
        self._stopping.set()

    def key(self, caller: str) -> str:
        """Return what a caller is called among replicas."""
        if match := re.fullmatch(f"{UNNAMED}([0-9a-f]{{32}})", caller):
            return match[1]
        key = pseudonym(self._name_key, caller)
        self._names[key] = caller
        self._names.move_to_end(key)
        if len(self._names) > self._most_names:
            self._names.popitem(last=False)
        return key

    def name(self, key: str) -> str:
        """Return a caller's id if it was met here, else what :meth:`key` takes as well."""
        return self._names.get(key, UNNAMED + key)

    async def exchange(self, key: str, place: Place, sent: Sequence[Sent]) -> list[tuple[float, Evidence]]:
        """Tell others of a caller's images, in one step with learning what they told before; nothing while the store is down.

        Returns:
            What they told, with its age in seconds, the oldest first; from the beginning, what this replica told as well.
        """
        if key in self._unforgiven:
            await self.follow()
        knows_nothing = place.number == 0  # a caller that was forgotten here meanwhile: what was written here is news, too
        judged = self._untold.pop(key, None)
        entries = ([write_judged(judged)] if judged else []) + [write_sent(each) for each in sent]
        try:
            news = await self._evidence.exchange(f"{EVIDENCE}{key}", place, entries)
        except StoreDownError:
            self._metrics.limiter_fallback.labels("unshared").inc()
            self._keep(key, judged or [])
            return []
        unknown = [entry for entry in news if knows_nothing or not entry.is_ours]
        return [(entry.age_s, each) for entry in unknown for each in read_evidence(entry.data)]

    def tell(self, key: str, judged: Sequence[Judged]) -> None:
        """Tell others of answers to a caller, with its next images or within :data:`FOLLOW_S`, all callers' together."""
        self._keep(key, [*self._untold.pop(key, []), *judged])

    async def flush(self) -> None:
        """Tell others now what they were not told yet; see :data:`UNTOLD_CALLERS` for when the store is down."""
        for start in range(0, len(callers := list(self._untold)), TOLD_AT_ONCE):
            some = {key: self._untold.pop(key) for key in callers[start : start + TOLD_AT_ONCE] if key in self._untold}
            try:
                await self._evidence.add({f"{EVIDENCE}{key}": write_judged(judged) for key, judged in some.items()})
            except StoreDownError:
                for key, judged in some.items():
                    self._keep(key, judged)
                return

    def _keep(self, key: str, judged: Sequence[Judged]) -> None:
        """Keep answers to a caller for others, those before what is kept of it already."""
        if judged and key not in self._unforgiven:
            self._untold[key] = [*judged, *self._untold.pop(key, [])]
            if not self._store.is_up:
                self._untold[key] = self._untold[key][-self._most_answers :]
                while len(self._untold) > UNTOLD_CALLERS:
                    del self._untold[next(iter(self._untold))]

    async def forget(self, key: str) -> None:
        """Drop what all replicas hold against a caller: their journal of it now, the rest within :data:`FOLLOW_S`.

        While the store is down that waits until it is back, and nothing is read of the caller before.
        """
        self._untold.pop(key, None)
        self._unforgiven.add(key)
        await self.follow(Forgiven(key))

    async def follow(self, *told: Verdict) -> None:
        """Heed others' verdicts, and tell them of some: later, while the store is down, of the latest :data:`MOST_UNTOLD`."""
        self._verdicts_untold += [(time.monotonic(), each) for each in told]
        async with self._turn:
            oldest = time.monotonic() - self._suspect_s
            untold = [(at, each) for at, each in self._verdicts_untold if isinstance(each, Forgiven) or at > oldest]
            untold, self._verdicts_untold = untold[-MOST_UNTOLD:], []
            self._unforgiven &= {each.key for _, each in untold if isinstance(each, Forgiven)}
            try:
                news = await self._tell_verdicts([each for _, each in untold])
            except BaseException as error:
                self._verdicts_untold[:0] = untold
                if isinstance(error, StoreDownError):
                    return
                raise
            self._heed_all(news, [each for _, each in untold])

    async def _tell_verdicts(self, told: Sequence[Verdict]) -> list[Entry]:
        """Tell others of verdicts in one step with learning theirs; evidence against who is forgiven is deleted before."""
        if not self._is_derived:
            secret = await self._store.run_apart(self._offer, f"{PREFIX}watch-secret", self.secret)
            if secret != self.secret:
                self.secret = secret
                self._adopt(secret)
        for key in {each.key for each in told if isinstance(each, Forgiven)}:
            await self._evidence.delete(f"{EVIDENCE}{key}")
        return await self._verdicts.exchange(VERDICTS, self._place, [write_verdict(each) for each in told])

    def _heed_all(self, news: Sequence[Entry], told: Sequence[Verdict]) -> None:
        forgiven = {each.key for each in told if isinstance(each, Forgiven)}
        self._unforgiven -= forgiven
        for entry in news:
            verdict = read_verdict(entry.data)
            if verdict and verdict.key not in forgiven:  # what is forgiven here was dropped at once, not what came after it
                if isinstance(verdict, Forgiven):
                    self._untold.pop(verdict.key, None)
                self._heed(verdict, entry.age_s, entry.is_ours)
        for each in told:  # in the order of the journal, in which they are the last
            if each.key not in forgiven:
                self._heed(each, 0.0, True)

    def later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something in the background; :meth:`finish` waits for it. What goes wrong in it costs nobody an answer."""
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> None:
        """Return when others were told of everything; nothing more is learnt."""
        self.stop()
        while tasks := [*self._tasks, *([self._following] if self._following else [])]:
            await asyncio.wait(tasks)
            self._following = None
        await self._guarded(self.flush())

    async def _go_on_following(self) -> None:
        me = asyncio.current_task()
        while not (me and me.cancelling()):  # wait_for of Python 3.11 can lose a cancellation
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), FOLLOW_S)
                return
            await self._guarded(self.follow())
            await self._guarded(self.flush())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something without which the service can go on, if need be."""
        try:
            await work
        except Exception:
            log.exception("the watch can't share what it notices with other replicas: it goes on alone for now")
            self._metrics.limiter_fallback.labels("unshared").inc()
