"""Records: what is remembered of one caller, and what it says."""

from __future__ import annotations

import numpy as np

from service.settings import Settings
from service.watch.confidence import Confidence, Test
from service.watch.distances import Distances
from service.watch.evidence import DETECTORS, Judged, Place
from service.watch.sequences import Sequences

NEAR_DUPLICATES, OFF_DISTRIBUTION, DISTANCES = DETECTORS


class Record:
    """One caller's; a detector that has nothing to say yet takes no memory.

    Args:
        settings: How much is remembered, and what detectors tolerate.
        sample_key: See :class:`service.watch.distances.Distances`.

    Attributes:
        sequences: Its runs of nearly equal images.
        place: Up to which other replicas' evidence is in it.
    """

    def __init__(self, settings: Settings, sample_key: bytes) -> None:
        self.sequences = Sequences(
            settings.watch_sequence_images, 60 * settings.watch_memory_minutes, settings.watch_recent_images
        )
        self.place = Place()
        self._settings = settings
        self._sample_key = sample_key
        self._distances: Distances | None = None
        self._confidence: Confidence | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        return sum(part.nbytes for part in (self.sequences, self._distances, self._confidence) if part is not None)

    def judge(self, exact: np.uint64, row: np.ndarray, thumbnail: np.ndarray | None, test: Test | None) -> Judged:
        """Return what detectors look at of a new image's answer ``(C,)``, for :meth:`weigh`.

        Args:
            exact: The image's digest.
            row: Its probabilities.
            thumbnail: Remembered, ``(V,)``; ``None`` if nobody measures distances.
            test: What tells unsure answers; ``None`` if nobody tests that.
        """
        label = int(row.argmax())
        distance = None if thumbnail is None else self._distances_of(len(row)).look(thumbnail, label)
        return Judged(int(exact), label, len(row), None if test is None else test.is_unsure(row), distance)

    def weigh(self, judged: Judged, test: Test | None) -> list[str]:
        """Add an answer, given here or elsewhere, to what speaks for or against the caller; returns detectors that speak."""
        spoke = []
        if judged.is_unsure is not None and test is not None:
            if self._confidence is None or self._confidence.classes != judged.classes:
                self._confidence = Confidence(test, judged.classes)
            if self._confidence.look(judged.label, judged.is_unsure):
                spoke.append(OFF_DISTRIBUTION)
        if judged.distance is not None and self._settings.watch_distances == "on":
            distances = self._distances_of(judged.classes)
            if distances.classes == judged.classes and distances.add(judged.distance, judged.label):
                spoke.append(DISTANCES)
        return spoke

    def begin_anew(self, detector: str) -> None:
        """Forget what led to a suspicion that is over."""
        if detector == OFF_DISTRIBUTION:
            self._confidence = None
        elif self._distances is not None:
            self._distances.begin_anew()

    def model_changed(self) -> None:
        """Forget what the answers of the model before said."""
        self._confidence = None

    def _distances_of(self, classes: int) -> Distances:
        if self._distances is None:
            settings = self._settings
            self._distances = Distances(settings.watch_least_w, classes, settings.watch_recent_images, self._sample_key)
        return self._distances
