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
    """What an image is to its caller's earlier ones.

    ``NEW`` is also an image whose scene was remembered but never judged, since the requests that had it were not answered.
    """

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
    length: np.ndarray  # (M,) float64: weighted images of the sequence that leads to this one
    seen: np.ndarray  # (M,) float64: seconds
    unjudged: np.ndarray  # (M,) bool: neither it nor an earlier one of its scene was judged by its answer
    held: int = 0
    following: int = 0  # the row that is overwritten next

    @classmethod
    def empty(cls, capacity: int) -> Recent:
        """Return one that holds nothing."""
        return cls(
            np.zeros(capacity, np.uint64),
            np.zeros((capacity, SLOTS), np.uint32),
            np.zeros((capacity, SLOTS), np.uint16),
            np.zeros(capacity),
            np.zeros(capacity),
            np.zeros(capacity, bool),
        )

    @property
    def capacity(self) -> int:
        """Rows."""
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(each.nbytes for each in (self.exact, self.free, self.fixed, self.length, self.seen, self.unjudged))


class Sequences:
    """Follows one caller's sequences.

    An image continues the longest sequence that has its scene. A sequence's length fades, so that a scene that is shown now and
    then never adds up. A full memory forgets the oldest image, but not one of its longer half whose sequence is a quarter of
    the limit or longer: other images in between do not make a search forgotten.

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

    def holds(self, exact: np.uint64) -> bool:
        """Tell whether an image is remembered."""
        recent = self._recent
        return bool((recent.exact[: recent.held] == exact).any())

    def look(self, exact: np.uint64, free: np.ndarray, fixed: np.ndarray, now: float) -> Sighting:
        """Return what an image is, given its fingerprint and the time in seconds, and remember it unless it is refused."""
        recent = self._recent
        held = recent.held
        same = np.flatnonzero(recent.exact[:held] == exact)
        if len(same):
            return Sighting.NEW if recent.unjudged[same[0]] else Sighting.REPEAT
        length, is_unjudged = 0.0, True
        if held:
            shares = np.count_nonzero(recent.free[:held] == free, axis=1) / SLOTS  # (held,)
            is_same = shares >= SAME_SCENE
            if is_same.any():
                is_unjudged = bool(recent.unjudged[:held][is_same].all())
                faded = np.where(is_same, self._faded(now), -1.0)
                longest = int(faded.argmax())
                is_step = np.count_nonzero(recent.fixed[shares.argmax()] == fixed) >= SAME_PLACE * SLOTS
                length = float(faded[longest]) + (1.0 if is_step else MOVED_WEIGHT)
                now = max(now, float(recent.seen[longest]))
                if length > self._limit:
                    # Refused for a half-life from here on, not only until one image has faded; then one more is answered.
                    recent.length[longest], recent.seen[longest] = 2 * max(0.0, self._limit - 1), now
                    return Sighting.REFUSED
        self._keep(exact, free, fixed, length, is_unjudged, now)
        return Sighting.NEW if is_unjudged else Sighting.NEAR

    def judge(self, exact: np.uint64) -> bool:
        """Take an image that was answered as judged; returns whether its answer is to be judged.

        It is unless it was judged meanwhile, or an image of its scene: the same one may come twice in a request, or in several
        at once. One that was forgotten meanwhile is.
        """
        recent = self._recent
        held = recent.held
        rows = np.flatnonzero(recent.exact[:held] == exact)
        if not len(rows):
            return True
        row = rows[0]
        if not recent.unjudged[row]:
            return False
        shares = np.count_nonzero(recent.free[:held] == recent.free[row], axis=1) / SLOTS  # (held,), 1 at the row itself
        is_first = bool(recent.unjudged[:held][shares >= SAME_SCENE].all())
        recent.unjudged[row] = False
        return is_first

    def _faded(self, now: float) -> np.ndarray:
        """Return what is left of each remembered image's length, ``(held,)``."""
        recent = self._recent
        age = np.maximum(0.0, now - recent.seen[: recent.held])  # what others saw is heard of late: nothing grows of that
        left: np.ndarray = recent.length[: recent.held] * 0.5 ** (age / self._half_life_s)
        return left

    def _next_row(self, now: float) -> int:
        """Return the row for another image."""
        recent = self._recent
        if recent.held < recent.capacity:
            return recent.following
        faded = self._faded(now)
        is_kept = faded >= self._limit / 4
        if is_kept.any():
            is_kept &= faded > np.median(faded)  # half of the memory is left to what is new: other searches begin there
        return int(recent.following + np.roll(is_kept, -recent.following).argmin()) % recent.capacity

    def _keep(self, exact: np.uint64, free: np.ndarray, fixed: np.ndarray, length: float, unjudged: bool, now: float) -> None:
        if self._recent.held == self._recent.capacity < self._capacity:
            self._grow()
        recent = self._recent
        row = self._next_row(now)
        recent.exact[row], recent.free[row], recent.fixed[row] = exact, free, fixed
        recent.length[row], recent.seen[row], recent.unjudged[row] = length, now, unjudged
        recent.held = max(recent.held, row + 1)
        recent.following = (row + 1) % self._capacity if recent.capacity == self._capacity else row + 1

    def _grow(self) -> None:
        old, new = self._recent, Recent.empty(min(2 * self._recent.capacity, self._capacity))
        for name in ("exact", "free", "fixed", "length", "seen", "unjudged"):
            getattr(new, name)[: old.held] = getattr(old, name)[: old.held]
        new.held = new.following = old.held
        self._recent = new
