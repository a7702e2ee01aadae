"""The watch: what the scheduler tells of every query, and asks of every caller."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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

INLINE_IMAGES = 8
"""More images than this are fingerprinted on a thread, so that the event loop is never held up for milliseconds."""
SUSPICIONS_PER_CALLER = 3
NEAR_DUPLICATES, OFF_DISTRIBUTION, DISTANCES = "near-duplicates", "off-distribution", "distances"


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
        secret: What fingerprints are keyed with; ``None`` draws it.
    """

    def __init__(self, settings: Settings, metrics: Metrics, clock: Callable[[], float], secret: bytes | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._modes = settings.watch_modes()
        self._test = _test_of(settings)
        self._fingerprinter = Fingerprinter(secret)
        self._records: OrderedDict[str, _Record] = OrderedDict()
        capacity = SUSPICIONS_PER_CALLER * settings.watch_max_callers
        self._suspects = Suspects(60 * settings.suspect_minutes, capacity, clock)

    async def treat(self, caller: Caller) -> Caller:
        """Return the caller as its quota and its answers are to be treated: of tier ``suspect`` while it is under suspicion."""
        if self._modes.get(caller.tier) == "act" and await self.is_suspect(caller.id):
            return Caller(caller.id, SUSPECT)
        return caller

    async def before(self, caller: Caller, images: np.ndarray) -> np.ndarray:
        """Look at images ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``, before they are answered.

        Returns:
            Which of them show something that this caller has not asked lately, ``(N,)`` bool; give it to :meth:`after`.

        Raises:
            Problem: 429 ``abnormal-usage-detected``.
        """
        mode = self._modes.get(caller.tier, "off")
        if mode == "off":
            return np.zeros(len(images), bool)
        take = self._fingerprinter.take
        prints = take(images) if len(images) <= INLINE_IMAGES else await asyncio.to_thread(take, images)
        now, sequences = self._clock(), self._record(caller.id).sequences
        look = sequences.look
        sightings = [look(*each, now) for each in zip(prints.exact, prints.free, prints.fixed, strict=True)]
        refused = sightings.count(Sighting.REFUSED)
        if refused and self._settings.watch_near_duplicates == "on":
            self._note(caller, NEAR_DUPLICATES, refused)
            if mode == "act":
                raise abnormal_usage(60 * self._settings.watch_memory_minutes)
        return np.array([sighting is Sighting.NEW for sighting in sightings])

    async def after(self, caller: Caller, images: np.ndarray, rows: np.ndarray, is_new: np.ndarray) -> None:
        """Look at exact answers ``(N, C)``; what they show holds from the caller's next request on.

        Args:
            caller: Who asked.
            images: As :meth:`before` saw them.
            rows: Their probabilities.
            is_new: What :meth:`before` returned.
        """
        if not is_new.any():
            return
        record = self._record(caller.id)
        images, rows = images[is_new], rows[is_new]
        if self._test is not None:
            if record.confidence is None:
                record.confidence = Confidence(self._test, rows.shape[1])
            if record.confidence.look(rows):
                self._note(caller, OFF_DISTRIBUTION, len(rows))
        if self._settings.watch_distances == "on":
            if record.distances is None:
                settings = self._settings
                record.distances = Distances(settings.watch_least_w, rows.shape[1], settings.watch_recent_images)
            pairs = zip(thumbnails(images), rows.argmax(axis=1).tolist(), strict=True)
            if loud := sum([record.distances.look(thumbnail, label) for thumbnail, label in pairs]):
                self._note(caller, DISTANCES, loud)

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

    def _note(self, caller: Caller, detector: str, images: int) -> None:
        self._metrics.suspicious.labels(detector).inc(images)
        if self._suspects.suspect(caller.id, detector, images):
            log.warning("a caller of tier %s is under suspicion: %s", caller.tier, detector)


def _test_of(settings: Settings) -> Test | None:
    """Return what ``off-distribution`` tests; ``None`` if it is off: another checkpoint has other confidences."""
    choice = settings.watch_off_distribution
    if choice == "off" or (choice == "auto" and settings.checkpoint != "compact"):
        return None
    return Test(
        unsure_below=settings.watch_unsure_below,
        honest_share=settings.watch_honest_share,
        thief_share=settings.watch_thief_share,
        horizon_images=settings.watch_horizon_images,
        false_alarms=settings.watch_false_alarms,
    )
