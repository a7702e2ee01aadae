"""Confidence: whether a caller's images are of the kind that the model was made for, told from its own answers.

A sequential test (Page, "Continuous inspection schemes", 1954): every new image adds the logarithm of how much likelier its
answer is with a thief than with an honest caller, the sum never falls below 0, and a sum above a threshold speaks. With an
honest caller at the worst that is tolerated, the sum passes ``h`` within ``n`` images with a probability of at most ``n
exp(-h)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from service.watch.coverage import LEAST, coverage


@dataclass(frozen=True)
class Test:
    """What is tested; all shares are of images that are new.

    Attributes:
        unsure_below: A largest probability below it makes an answer unsure.
        honest_share: Largest share of unsure answers of an honest caller.
        thief_share: Smallest share of unsure answers of a thief.
        horizon_images: Images within which an honest caller is suspected with a probability of at most ``false_alarms``.
        false_alarms: That probability.
    """

    unsure_below: float
    honest_share: float
    thief_share: float
    horizon_images: int
    false_alarms: float

    @property
    def threshold(self) -> float:
        """The sum from which it speaks, in nats."""
        return math.log(self.horizon_images / self.false_alarms)

    def is_unsure(self, row: np.ndarray) -> bool:
        """Tell whether an answer ``(C,)`` is unsure."""
        return bool(row.max() < self.unsure_below)

    def evidence(self, is_unsure: bool) -> float:
        """Return what an answer says for a thief, in nats."""
        if is_unsure:
            return math.log(self.thief_share / self.honest_share)
        return math.log((1 - self.thief_share) / (1 - self.honest_share))


class Confidence:
    """One caller's sum.

    Args:
        test: What is tested.
        classes: The model's.
    """

    def __init__(self, test: Test, classes: int) -> None:
        self._test = test
        self._sum = 0.0
        self._counts = np.zeros(classes, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._counts.nbytes + 8

    @property
    def classes(self) -> int:
        """How many classes the model has."""
        return len(self._counts)

    def look(self, label: int, is_unsure: bool) -> bool:
        """Add the answer to a new image; returns whether it is unsure and the caller looks like a thief by it.

        A sure answer never says so, however large the sum still is: it speaks for the caller.
        """
        self._counts[label] += 1
        total = self._sum + self._test.evidence(is_unsure)
        self._sum = min(max(0.0, total), 2 * self._test.threshold)  # bounded, so that a good while is forgiven
        return is_unsure and self._sum > self._test.threshold and coverage(self._counts) >= LEAST
