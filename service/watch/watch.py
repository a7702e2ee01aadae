"""The watch: what the scheduler tells of every query, and asks of every caller."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from model.checkpoint import EMBEDDED
from service.identity import Caller
from service.metrics import Metrics
from service.problems import abnormal_usage
from service.settings import SUSPECT, Settings
from service.watch.confidence import Test
from service.watch.distances import thumbnails
from service.watch.evidence import DETECTORS, Evidence, Forgiven, Judged, Sent, Suspicion, Verdict
from service.watch.fingerprint import Fingerprinter, Fingerprints
from service.watch.record import DISTANCES, NEAR_DUPLICATES, OFF_DISTRIBUTION, Record
from service.watch.sequences import Sighting
from service.watch.suspects import Suspect, Suspects

if TYPE_CHECKING:
    from service.watch.shared import Shared

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_VALUES = 8 * 3 * 32 * 32
"""Images with more values than this are worked on by a thread, so that the event loop is never held up for milliseconds."""
TURN = 16
"""So many images are looked at before others get their turn on the event loop."""
SUSPICIONS_PER_CALLER = 3


@dataclass(frozen=True)
class Look:
    """What :meth:`Watch.before` found out of ``N`` images, for :meth:`Watch.after`.

    Attributes:
        exact: A digest of each, ``(N,)`` uint64.
        is_new: Which of them show something that this caller was not answered lately, ``(N,)`` bool.
    """

    exact: np.ndarray
    is_new: np.ndarray


class Watch:
    """Notices extraction-like callers and attack sequences.

    Asynchronous, since fingerprints of many images are taken on a thread. Not for several threads: the event loop calls it.

    Args:
        settings: Which detectors run, what they tolerate, which tiers they act on, and for how long a suspicion lasts.
        metrics: Counts suspicious images by detector.
        clock: Monotonic seconds.
        secret: What fingerprints and samples are keyed with; ``None`` draws it.
        shared: Other replicas' watches, whose secret is used then; ``None`` for a watch of its own.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float],
        secret: bytes | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        metrics.expect_detectors(DETECTORS)
        self._clock = clock
        self._shared = shared
        self._modes = settings.watch_modes()
        self._test = _test_of(settings, settings.checkpoint in EMBEDDED)
        self._model = 0  # which one is judged, for other replicas
        secret = shared.secret if shared else secret or secrets.token_bytes(32)
        self._fingerprinter = Fingerprinter(secret)
        self._sample_key = hashlib.blake2b(b"distances", key=hashlib.sha256(secret).digest()).digest()
        # By what replicas call their callers, as suspicions are: they know them by nothing else.
        self._records: OrderedDict[str, Record] = OrderedDict()
        capacity = SUSPICIONS_PER_CALLER * settings.watch_max_callers
        self._suspects = Suspects(60 * settings.suspect_minutes, capacity, clock)

    async def start(self) -> None:
        """Learn what other replicas know, if there may be any, and go on learning it."""
        if self._shared:
            await self._shared.start(self._heed, self._adopt)

    async def finish(self) -> None:
        """Return when other replicas were told everything; nothing more is learnt."""
        if self._shared:
            await self._shared.finish()

    def stop(self) -> None:
        """Learn nothing more."""
        if self._shared:
            self._shared.stop()

    async def treat(self, caller: Caller) -> Caller:
        """Return the caller as its answers are to be treated: as one of tier ``suspect`` while it is under suspicion."""
        if self._modes.get(caller.tier) == "act" and await self.is_suspect(caller.id):
            return Caller(caller.id, SUSPECT)
        return caller

    async def before(self, caller: Caller, images: np.ndarray) -> Look:
        """Look at images ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``, before they are answered.

        Returns:
            What :meth:`after` needs once they are answered.

        Raises:
            Problem: 429 ``abnormal-usage-detected``, for all of them if it is one.
        """
        mode = self._modes.get(caller.tier, "off")
        if mode == "off":
            return Look(np.zeros(len(images), np.uint64), np.zeros(len(images), bool))
        prints, key = await _aside(self._fingerprinter.take, images), self._key(caller.id)
        if self._shared:
            await asyncio.shield(self._shared.later(self._exchange(key, self._unheard(key, prints))))
        sightings = []
        for each in zip(prints.exact, prints.free, prints.fixed, strict=True):
            # Asked for anew each time, here and below: while others have their turn, records come and go.
            sightings.append(self._record(key).sequences.look(*each, self._clock()))
            if len(sightings) % TURN == 0:
                await asyncio.sleep(0)
        refused = [number for number, sighting in enumerate(sightings, 1) if sighting is Sighting.REFUSED]
        if refused and self._settings.watch_near_duplicates == "on":
            self._note(caller, NEAR_DUPLICATES, len(refused))
            if mode == "act":
                raise abnormal_usage(60 * self._settings.watch_memory_minutes, refused, len(images))
        return Look(prints.exact, np.array([sighting is Sighting.NEW for sighting in sightings], bool))

    async def after(self, caller: Caller, images: np.ndarray, rows: np.ndarray, look: Look) -> None:
        """Look at exact answers ``(N, C)``; ask :meth:`treat` again before they leave.

        Args:
            caller: Who asked.
            images: As :meth:`before` saw them.
            rows: Their probabilities.
            look: What :meth:`before` returned.
        """
        new = np.flatnonzero(look.is_new)
        if not len(new):
            return
        key = self._key(caller.id)
        self._drop_old_evidence(key, self._clock())
        test = self._test  # that of the model that answered; another may come into use meanwhile
        wants_thumbnails = self._settings.watch_distances == "on"
        small: Iterable[np.ndarray | None]
        small = await _aside(thumbnails, images[new]) if wants_thumbnails else [None] * len(new)
        judged: dict[int, Judged] = {}
        try:
            for number, (index, thumbnail) in enumerate(zip(new.tolist(), small, strict=True), 1):
                exact = look.exact[index]
                if self._record(key).sequences.judge(exact) and int(exact) not in judged:
                    found = self._record(key).judge(exact, rows[index], thumbnail, test if test is self._test else None)
                    judged[int(exact)] = replace(found, model=self._model)
                    for detector in self._record(key).weigh(found, self._test):
                        self._note(caller, detector, 1)
                if number % TURN == 0:
                    await asyncio.sleep(0)
        finally:
            if self._shared and judged:
                self._shared.tell(key, list(judged.values()))

    async def is_suspect(self, caller: str) -> bool:
        """Tell whether a caller, by its id, is suspected of extraction now; whether that has consequences, its tier says."""
        key = self._key(caller)
        return any(self._suspects.is_suspected(key, detector) for detector in (OFF_DISTRIBUTION, DISTANCES))

    async def suspects(self) -> list[Suspect]:
        """Return every suspicion in force, the one renewed last first."""
        if not self._shared:
            return self._suspects.list()
        return [replace(each, caller=self._shared.name(each.caller)) for each in self._suspects.list()]

    async def forgive(self, caller: str) -> bool:
        """Forget a caller's suspicions and what they rest on; returns whether there was a suspicion in force.

        Other replicas forget them, too, within a quarter of a second, or once the store is back.
        """
        key = self._key(caller)
        if self._shared:
            await self._shared.follow()
        was_any = self._suspects.forgive(key)
        if self._shared:
            await self._shared.forget(key)
            self._suspects.forgive(key)  # what was noticed meanwhile
        self._records.pop(key, None)
        return was_any

    def model_changed(self, is_embedded: bool, version: str) -> None:
        """Judge another model's confidences from now on: ``auto`` does so for a checkpoint ``is_embedded`` in the package only.

        What the ones before said of callers is forgotten; suspicions that they led to stay. Replicas weigh each other's answers
        of the same ``version`` only.
        """
        self._model = zlib.crc32(version.encode())
        self._test = _test_of(self._settings, is_embedded)
        for record in self._records.values():
            record.model_changed()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are remembered of all callers."""
        return sum(record.nbytes for record in self._records.values())

    def _key(self, caller: str) -> str:
        """Return what a caller is called here."""
        return self._shared.key(caller) if self._shared else caller

    def _record(self, key: str) -> Record:
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record(self._settings, self._sample_key)
            if len(self._records) > self._settings.watch_max_callers:
                self._records.popitem(last=False)
        self._records.move_to_end(key)
        return record

    def _drop_old_evidence(self, key: str, at: float) -> None:
        """Let a caller whose suspicion has run out begin anew: what led to it should not renew it at the next image."""
        for detector in (OFF_DISTRIBUTION, DISTANCES):
            if self._suspects.has_ended(key, detector, at):
                self._record(key).begin_anew(detector)

    def _note(self, caller: Caller, detector: str, images: int) -> None:
        self._metrics.suspicious.labels(detector).inc(images)
        key = self._key(caller.id)
        if self._suspects.suspect(key, detector, images):
            log.warning("a caller of tier %s is under suspicion: %s", caller.tier, detector)
        if self._shared and (untold := self._suspects.to_tell(key, detector)) is not None:
            self._shared.later(self._shared.follow(Suspicion(key, detector, untold)))

    def _unheard(self, key: str, prints: Fingerprints) -> list[Sent]:
        """Return what other replicas have not been told of these images."""
        sequences = self._record(key).sequences
        each = zip(prints.exact, prints.free, prints.fixed, strict=True)
        found = {int(exact): Sent(int(exact), free, fixed) for exact, free, fixed in each if not sequences.holds(exact)}
        return list(found.values())

    async def _exchange(self, key: str, sent: Sequence[Sent]) -> None:
        """Tell other replicas of a caller's images, and do with theirs as they did, at the times when they did it."""
        assert self._shared is not None
        news = await self._shared.exchange(key, self._record(key).place, sent)
        for number, (age_s, each) in enumerate(news, 1):
            self._replay(key, each, self._clock() - age_s)
            if number % TURN == 0:
                await asyncio.sleep(0)

    def _replay(self, key: str, evidence: Evidence, at: float) -> None:
        sequences, exact = self._record(key).sequences, np.uint64(evidence.exact)
        if isinstance(evidence, Sent):
            sequences.look(exact, evidence.free, evidence.fixed, at)  # whoever was sent it refuses it, and counts that
        elif sequences.judge(exact):
            self._drop_old_evidence(key, at)
            if evidence.model != self._model:
                evidence = replace(evidence, is_unsure=None)
            for detector in self._record(key).weigh(evidence, self._test):
                self._suspects.suspect(key, detector, 0, at)

    def _heed(self, verdict: Verdict, age_s: float, is_ours: bool) -> None:
        """Take over what another replica found, or what was found here, if it was forgotten for an earlier verdict."""
        if isinstance(verdict, Forgiven):
            self._records.pop(verdict.key, None)
            self._suspects.forgive(verdict.key)
        elif not (is_ours and self._suspects.is_suspected(verdict.key, verdict.detector)):
            self._suspects.told(verdict.key, verdict.detector, verdict.images, self._clock() - age_s)

    def _adopt(self, secret: bytes) -> None:
        """Take fingerprints as other replicas do; those that were taken compare with no later ones."""
        self._fingerprinter = Fingerprinter(secret)
        self._records.clear()


async def _aside(work: Callable[[np.ndarray], T], images: np.ndarray) -> T:
    """Return ``work(images)``, done on a thread where it takes long."""
    return work(images) if images.size <= INLINE_VALUES else await asyncio.to_thread(work, images)


def _test_of(settings: Settings, is_embedded: bool) -> Test | None:
    """Return what ``off-distribution`` tests; ``None`` if it is off: another checkpoint has other confidences."""
    choice = settings.watch_off_distribution
    if choice == "off" or (choice == "auto" and not is_embedded):
        return None
    return Test(
        unsure_below=settings.watch_unsure_below,
        honest_share=settings.watch_honest_share,
        thief_share=settings.watch_thief_share,
        horizon_images=settings.watch_horizon_images,
        false_alarms=settings.watch_false_alarms,
    )
