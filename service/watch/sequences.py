"""Sequences: long runs of nearly equal images, as attacks that search by asking make them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from service.watch.fingerprint import SLOTS

FIRST_CAPACITY = 8
SAME_SCENE = 0.25
"""Share of equal windows from which two images show one scene; of 1,000 photos none shares more than 0.19 with 128 others."""
SAME_PLACE = 0.6
"""Share of equal windows at fixed places from which an image is a step of a search: a hand-held camera moves more."""
MOVED_WEIGHT = 0.25
"""What an image counts that shows the scene moved, or with a camera's noise."""


class Sighting(Enum):
    """What an image is to its caller's earlier ones."""

    NEW = "new"
    REPEAT = "repeat"
    NEAR = "near"
    REFUSED = "refused"


@dataclass
class Recent:
    """A caller's latest distinct images; arrays of ``capacity`` rows of which ``held`` are in use."""

    exact: np.ndarray  # (M,) uint64
    free: np.ndarray  # (M, SLOTS) uint32
    fixed: np.ndarray  # (M, SLOTS) uint16
    length: np.ndarray  # (M,) float32: weighted images of the sequence that leads to this one
    seen: np.ndarray  # (M,) float64: seconds
    held: int = 0
    following: int = 0  # the row that is overwritten next

    @classmethod
    def empty(cls, capacity: int) -> Recent:
        """Return one that holds nothing."""
        return cls(
            np.zeros(capacity, np.uint64),
            np.zeros((capacity, SLOTS), np.uint32),
            np.zeros((capacity, SLOTS), np.uint16),
            np.zeros(capacity, np.float32),
            np.zeros(capacity),
        )

    @property
    def capacity(self) -> int:
        """Rows."""
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(each.nbytes for each in (self.exact, self.free, self.fixed, self.length, self.seen))


class Sequences:
    """Follows one caller's sequences.

    An image continues the longest sequence that has its scene. A sequence's length fades, so that a scene that is shown now and
    then never adds up.

    Args:
        limit: Length from which a sequence is refused, in images that count fully.
        half_life_s: Time in which a sequence's length halves.
        capacity: Distinct images remembered; a caller that sends fewer takes less memory.
    """

    def __init__(self, limit: float, half_life_s: float, capacity: int) -> None:
        self._limit = limit
        self._half_life_s = half_life_s
        self._capacity = capacity
        self._recent = Recent.empty(min(FIRST_CAPACITY, capacity))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._recent.nbytes

    def look(self, exact: np.uint64, free: np.ndarray, fixed: np.ndarray, now: float) -> Sighting:
        """Return what an image is, given its fingerprint and the time in seconds, and remember it unless it is refused."""
        recent = self._recent
        held = recent.held
        if (recent.exact[:held] == exact).any():
            return Sighting.REPEAT
        length, sighting = 0.0, Sighting.NEW
        if held:
            shares = np.count_nonzero(recent.free[:held] == free, axis=1) / SLOTS  # (held,)
            is_same = shares >= SAME_SCENE
            if is_same.any():
                sighting = Sighting.NEAR
                faded = np.where(is_same, recent.length[:held] * 0.5 ** ((now - recent.seen[:held]) / self._half_life_s), -1.0)
                longest = int(faded.argmax())
                is_step = np.count_nonzero(recent.fixed[shares.argmax()] == fixed) >= SAME_PLACE * SLOTS
                length = float(faded[longest]) + (1.0 if is_step else MOVED_WEIGHT)
                if length > self._limit:
                    # Refused for a half-life from here on, not only until one image has faded.
                    recent.length[longest], recent.seen[longest] = 2 * self._limit, now
                    return Sighting.REFUSED
        self._keep(exact, free, fixed, length, now)
        return sighting

    def _keep(self, exact: np.uint64, free: np.ndarray, fixed: np.ndarray, length: float, now: float) -> None:
        if self._recent.held == self._recent.capacity < self._capacity:
            self._grow()
        recent = self._recent
        row = recent.following
        recent.exact[row], recent.free[row], recent.fixed[row] = exact, free, fixed
        recent.length[row], recent.seen[row] = length, now
        recent.held = max(recent.held, row + 1)
        recent.following = (row + 1) % self._capacity if recent.capacity == self._capacity else row + 1

    def _grow(self) -> None:
        old, new = self._recent, Recent.empty(min(2 * self._recent.capacity, self._capacity))
        for name in ("exact", "free", "fixed", "length", "seen"):
            getattr(new, name)[: old.held] = getattr(old, name)[: old.held]
        new.held = new.following = old.held
        self._recent = new
