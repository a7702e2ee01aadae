"""The watch: what the scheduler tells of every query, and asks of every caller."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model.checkpoint import EMBEDDED
from service.identity import Caller
from service.metrics import Metrics
from service.problems import abnormal_usage
from service.settings import SUSPECT, Settings
from service.watch.confidence import Confidence, Test
from service.watch.distances import Distances, thumbnails
from service.watch.fingerprint import Fingerprinter
from service.watch.sequences import Sequences, Sighting
from service.watch.suspects import Suspect, Suspects

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_VALUES = 8 * 3 * 32 * 32
"""Images with more values than this are worked on by a thread, so that the event loop is never held up for milliseconds."""
TURN = 16
"""So many images are looked at before others get their turn on the event loop."""
SUSPICIONS_PER_CALLER = 3
NEAR_DUPLICATES, OFF_DISTRIBUTION, DISTANCES = "near-duplicates", "off-distribution", "distances"


@dataclass(frozen=True)
class Look:
    """What :meth:`Watch.before` found out of ``N`` images, for :meth:`Watch.after`.

    Attributes:
        exact: A digest of each, ``(N,)`` uint64.
        is_new: Which of them show something that this caller was not answered lately, ``(N,)`` bool.
    """

    exact: np.ndarray
    is_new: np.ndarray


@dataclass
class _Record:
    """What is remembered of a caller; a detector that has nothing to say yet takes no memory."""

    sequences: Sequences
    distances: Distances | None = None
    confidence: Confidence | None = None


class Watch:
    """Notices extraction-like callers and attack sequences.

    Asynchronous, since fingerprints of many images are taken on a thread. Not for several threads: the event loop calls it.

    Args:
        settings: Which detectors run, what they tolerate, which tiers they act on, and for how long a suspicion lasts.
        metrics: Counts suspicious images by detector.
        clock: Monotonic seconds.
        secret: What fingerprints and samples are keyed with; ``None`` draws it.
    """

    def __init__(self, settings: Settings, metrics: Metrics, clock: Callable[[], float], secret: bytes | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        metrics.expect_detectors((NEAR_DUPLICATES, OFF_DISTRIBUTION, DISTANCES))
        self._clock = clock
        self._modes = settings.watch_modes()
        self._test = _test_of(settings, settings.checkpoint in EMBEDDED)
        secret = secret or secrets.token_bytes(32)
        self._fingerprinter = Fingerprinter(secret)
        self._sample_key = hashlib.blake2b(b"distances", key=hashlib.sha256(secret).digest()).digest()
        self._records: OrderedDict[str, _Record] = OrderedDict()
        capacity = SUSPICIONS_PER_CALLER * settings.watch_max_callers
        self._suspects = Suspects(60 * settings.suspect_minutes, capacity, clock)

    async def treat(self, caller: Caller) -> Caller:
        """Return the caller as its quota and its answers are to be treated: of tier ``suspect`` while it is under suspicion."""
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
        prints = await _aside(self._fingerprinter.take, images)
        sightings = []
        for each in zip(prints.exact, prints.free, prints.fixed, strict=True):
            # Asked for anew each time, here and below: while others have their turn, records come and go.
            sightings.append(self._record(caller.id).sequences.look(*each, self._clock()))
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
        self._drop_old_evidence(caller.id)
        test = self._test  # that of the model that answered; another may come into use meanwhile
        wants_thumbnails = self._settings.watch_distances == "on"
        small: Iterable[np.ndarray | None]
        small = await _aside(thumbnails, images[new]) if wants_thumbnails else [None] * len(new)
        judged: set[int] = set()
        for number, (index, thumbnail) in enumerate(zip(new.tolist(), small, strict=True), 1):
            exact = look.exact[index]
            if self._record(caller.id).sequences.judge(exact) and int(exact) not in judged:
                judged.add(int(exact))
                self._judge(caller, rows[index], thumbnail, test)
            if number % TURN == 0:
                await asyncio.sleep(0)

    async def is_suspect(self, caller: str) -> bool:
        """Tell whether a caller, by its id, is suspected of extraction now; whether that has consequences, its tier says."""
        return any(self._suspects.is_suspected(caller, detector) for detector in (OFF_DISTRIBUTION, DISTANCES))

    async def suspects(self) -> list[Suspect]:
        """Return every suspicion in force, the one renewed last first."""
        return self._suspects.list()

    async def forgive(self, caller: str) -> bool:
        """Forget a caller's suspicions and what they rest on; returns whether there was a suspicion in force."""
        self._records.pop(caller, None)
        return self._suspects.forgive(caller)

    def model_changed(self, is_embedded: bool) -> None:
        """Judge another model's confidences from now on: ``auto`` does so for a checkpoint ``is_embedded`` in the package only.

        What the ones before said of callers is forgotten; suspicions that they led to stay.
        """
        self._test = _test_of(self._settings, is_embedded)
        for record in self._records.values():
            record.confidence = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are remembered of all callers."""
        parts = [(each.sequences, each.distances, each.confidence) for each in self._records.values()]
        return sum(part.nbytes for record in parts for part in record if part is not None)

    def _record(self, caller: str) -> _Record:
        settings = self._settings
        record = self._records.get(caller)
        if record is None:
            record = self._records[caller] = _Record(
                Sequences(settings.watch_sequence_images, 60 * settings.watch_memory_minutes, settings.watch_recent_images),
            )
            if len(self._records) > settings.watch_max_callers:
                self._records.popitem(last=False)
        self._records.move_to_end(caller)
        return record

    def _drop_old_evidence(self, caller: str) -> None:
        """Let a caller whose suspicion has run out begin anew: what led to it should not renew it at the next image."""
        record = self._record(caller)
        if self._suspects.has_ended(caller, OFF_DISTRIBUTION):
            record.confidence = None
        if self._suspects.has_ended(caller, DISTANCES) and record.distances is not None:
            record.distances.begin_anew()

    def _judge(self, caller: Caller, row: np.ndarray, thumbnail: np.ndarray | None, test: Test | None) -> None:
        """Add a new image's answer ``(C,)`` and its thumbnail ``(V,)`` to what speaks for or against its caller."""
        record, settings = self._record(caller.id), self._settings
        if test is not None and test is self._test:
            if record.confidence is None:
                record.confidence = Confidence(test, len(row))
            if record.confidence.look(row):
                self._note(caller, OFF_DISTRIBUTION, 1)
        if thumbnail is not None:
            if record.distances is None:
                record.distances = Distances(settings.watch_least_w, len(row), settings.watch_recent_images, self._sample_key)
            if record.distances.look(thumbnail, int(row.argmax())):
                self._note(caller, DISTANCES, 1)

    def _note(self, caller: Caller, detector: str, images: int) -> None:
        self._metrics.suspicious.labels(detector).inc(images)
        if self._suspects.suspect(caller.id, detector, images):
            log.warning("a caller of tier %s is under suspicion: %s", caller.tier, detector)


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
