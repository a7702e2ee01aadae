"""Suspects: callers who were noticed, by which detector, and for how long it counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

SELDOM = 0.05
"""Share of a suspicion's time within which others need not be told that it was renewed."""


@dataclass(frozen=True)
class Suspect:
    """A caller under suspicion.

    Attributes:
        caller: The caller's id, as :class:`service.identity.Caller` has it.
        detector: What noticed the caller: ``distances``, ``near-duplicates`` or ``off-distribution``.
        since_s: Seconds since it was first noticed.
        until_s: Seconds until the suspicion ends unless it is renewed.
        images: Images that renewed it, the first included.
    """

    caller: str
    detector: str
    since_s: float
    until_s: float
    images: int


@dataclass
class _Entry:
    since: float
    until: float
    images: int
    told_until: float
    told_images: int = 0


class Suspects:
    """Who is suspected of what; bounded.

    Args:
        duration_s: How long a suspicion lasts after the last image that renewed it.
        capacity: Suspicions remembered; beyond it the one that was renewed longest ago is forgotten.
        clock: Monotonic seconds.
    """

    def __init__(self, duration_s: float, capacity: int, clock: Callable[[], float]) -> None:
        self._duration_s = duration_s
        self._capacity = capacity
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()  # by caller and detector

    def suspect(self, caller: str, detector: str, images: int, at: float | None = None) -> bool:
        """Begin or renew a suspicion, now or by what was noticed ``at`` an earlier time; returns whether it is new."""
        at = self._clock() if at is None else at
        entry = self._entries.get((caller, detector))
        is_new = entry is None or entry.until <= at
        if entry is None or is_new:
            entry = self._entries[caller, detector] = _Entry(at, at, 0, at)
        entry.until = max(entry.until, at + self._duration_s)
        entry.images += images
        self._entries.move_to_end((caller, detector))
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return is_new

    def to_tell(self, caller: str, detector: str) -> int | None:
        """Return the images that others were not told of, and take them as told; ``None`` if it can wait: most renewals can."""
        entry = self._entries[caller, detector]
        if entry.until - entry.told_until < SELDOM * self._duration_s:
            return None
        untold, entry.told_images, entry.told_until = entry.images - entry.told_images, entry.images, entry.until
        return untold

    def told(self, caller: str, detector: str, images: int, at: float) -> None:
        """Take over a suspicion that somebody else told of."""
        if at + self._duration_s <= self._clock():
            return
        self.suspect(caller, detector, images, at)
        if entry := self._entries.get((caller, detector)):
            entry.told_images += images
            entry.told_until = max(entry.told_until, at + self._duration_s)

    def is_suspected(self, caller: str, detector: str) -> bool:
        """Tell whether a suspicion is in force."""
        entry = self._entries.get((caller, detector))
        return entry is not None and entry.until > self._clock()

    def has_ended(self, caller: str, detector: str, at: float) -> bool:
        """Tell, once, that a suspicion had run out ``at`` a time."""
        entry = self._entries.get((caller, detector))
        if entry is None or entry.until > at:
            return False
        del self._entries[caller, detector]
        return True

    def list(self) -> list[Suspect]:
        """Return every suspicion in force, the one renewed last first."""
        now = self._clock()
        return [
            Suspect(caller, detector, now - entry.since, entry.until - now, entry.images)
            for (caller, detector), entry in reversed(self._entries.items())
            if entry.until > now
        ]

    def forgive(self, caller: str) -> bool:
        """Drop every suspicion of a caller; returns whether there was one in force."""
        theirs = [key for key in self._entries if key[0] == caller]
        was_any = any(self._entries[key].until > self._clock() for key in theirs)
        for key in theirs:
            del self._entries[key]
        return was_any
