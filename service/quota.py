"""Quotas: how many images a caller may have classified in each of several windows of time."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "lifetime": None}


@dataclass(frozen=True)
class Window:
    """At most ``quota`` images in ``seconds`` seconds, counted from the first image of the window.

    Attributes:
        name: The unit's name, as callers see it.
        quota: Images.
        seconds: Length; ``None`` for a window that never ends.
    """

    name: str
    quota: int
    seconds: int | None


def parse_windows(text: str) -> tuple[Window, ...]:
    """Parse ``"60/minute;500/day;5000/lifetime"``; an empty text means no limit.

    Raises:
        ValueError: A window is not ``<images>/<second|minute|hour|day|lifetime>`` or a unit comes twice.
    """
    windows = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = re.fullmatch(r"([1-9][0-9]{0,11})\s*/\s*(second|minute|hour|day|lifetime)", part)
        if match is None:
            raise ValueError(f"'{part}' is not a limit; write images/unit with unit {', '.join(SECONDS)}, as 60/minute;500/day")
        windows.append(Window(match[2], int(match[1]), SECONDS[match[2]]))
    if len({window.name for window in windows}) < len(windows):
        raise ValueError(f"'{text}' names a unit twice")
    return tuple(windows)


class Level(NamedTuple):
    """How full one window of a caller is.

    Attributes:
        window: The window.
        remaining: Images left in it.
        reset_s: Seconds until it starts anew; ``None`` if it never does.
    """

    window: Window
    remaining: int
    reset_s: float | None


@dataclass(slots=True)
class Charge:
    """Images that were charged; give it to :meth:`Limiter.refund` when the request fails.

    Attributes:
        caller: Who was charged.
        images: How many.
        starts: Start of each window at the time, so that a refund never credits a later one.
        levels: What is left after it.
        is_local: Whether this process counted it in place of a store that was away.
    """

    caller: str
    images: int
    starts: Sequence[float]
    levels: list[Level]
    is_local: bool = False


class QuotaExceededError(Exception):
    """A window has no room for a request; nothing was charged.

    Args:
        levels: The caller's windows.
        images: What it asked for.

    Attributes:
        level: Of the windows without room the one that starts anew last.
    """

    def __init__(self, levels: Sequence[Level], images: int) -> None:
        full = [level for level in levels if images > level.remaining]
        self.level = max(full, key=lambda level: math.inf if level.reset_s is None else level.reset_s)
        super().__init__(f"{self.level.window.name} window has {self.level.remaining} images left")


class RequestTooLargeError(Exception):
    """A request asks for more images than a window could ever grant; nothing was charged."""

    def __init__(self, window: Window) -> None:
        super().__init__(f"{window.name} window never grants more than {window.quota} images")
        self.window = window


class BudgetUnknownError(Exception):
    """The limiter's store is down, and without it nobody may use a long window; nothing was charged."""


class Limiter(Protocol):
    """Counts the images of one tier's callers. All windows of a caller are checked and charged in one atomic step."""

    async def charge(self, caller: str, images: int) -> Charge:
        """Charge ``images`` to every window of ``caller``, or to none.

        Raises:
            RequestTooLargeError: Waiting would not help.
            QuotaExceededError: A window is full.
            BudgetUnknownError: It can't be told at the moment.
        """
        ...

    def refund(self, charge: Charge) -> None:
        """Take back a charge, in the windows that have not started anew since; the caller's next charge knows of it."""
        ...

    async def levels(self, caller: str) -> list[Level]:
        """Return how full each of a caller's windows is now."""
        ...


def check_possible(windows: Sequence[Window], images: int) -> None:
    """Raise :class:`RequestTooLargeError` if a window could never grant so many images."""
    for window in windows:
        if images > window.quota:
            raise RequestTooLargeError(window)


@dataclass(slots=True)
class _Usage:
    start: float
    used: int


class MemoryLimiter:
    """A :class:`Limiter` in this process's memory. Not for several threads: the event loop calls it.

    Args:
        windows: The windows that every caller has.
        max_callers: Callers remembered; beyond it the one that was quiet longest is forgotten.
        clock: Monotonic seconds.
    """

    def __init__(self, windows: Sequence[Window], max_callers: int, clock: Callable[[], float]) -> None:
        self.windows = tuple(windows)
        self._max_callers = max_callers
        self._clock = clock
        self._callers: OrderedDict[str, list[_Usage]] = OrderedDict()

    async def charge(self, caller: str, images: int) -> Charge:
        """Charge ``images`` to every window of ``caller``, or to none; see :class:`Limiter`."""
        check_possible(self.windows, images)
        now = self._clock()
        usages = self._callers.get(caller)
        levels = self._levels(usages, now)
        for level in levels:
            if images > level.remaining:
                raise QuotaExceededError(levels, images)
        if usages is None:
            usages = self._remember(caller, now)
        else:
            self._callers.move_to_end(caller)
        starts = []
        for window, usage in zip(self.windows, usages, strict=True):
            if window.seconds is not None and now - usage.start >= window.seconds:
                usage.start, usage.used = now, 0
            usage.used += images
            starts.append(usage.start)
        return Charge(caller, images, starts, [Level(window, left - images, reset_s) for window, left, reset_s in levels])

    def refund(self, charge: Charge) -> None:
        """Take back a charge, in the windows that have not started anew since."""
        for usage, start in zip(self._callers.get(charge.caller, ()), charge.starts, strict=False):
            if usage.start == start:
                usage.used -= charge.images

    async def levels(self, caller: str) -> list[Level]:
        """Return how full each of a caller's windows is now."""
        return self._levels(self._callers.get(caller), self._clock())

    def _levels(self, usages: list[_Usage] | None, now: float) -> list[Level]:
        levels = []
        for window, usage in zip(self.windows, usages or [_Usage(now, 0) for _ in self.windows], strict=True):
            if window.seconds is None:
                levels.append(Level(window, window.quota - usage.used, None))
            elif now - usage.start >= window.seconds:
                levels.append(Level(window, window.quota, float(window.seconds)))
            else:
                levels.append(Level(window, window.quota - usage.used, window.seconds - (now - usage.start)))
        return levels

    def _remember(self, caller: str, now: float) -> list[_Usage]:
        usages = self._callers[caller] = [_Usage(now, 0) for _ in self.windows]
        if len(self._callers) > self._max_callers:
            self._callers.popitem(last=False)
        return usages


def rate_limit_headers(levels: Sequence[Level]) -> dict[str, str]:
    """Return ``RateLimit`` and ``RateLimit-Policy`` (IETF draft ratelimit-headers); empty without windows.

    Quotas are in images, times in seconds, rounded up so that whoever waits as long as it says does not come too early. A
    window that never ends has no ``w`` and no ``t``.
    """
    if not levels:
        return {}
    policy, state = [], []
    for window, remaining, reset_s in levels:
        policy.append(f'"{window.name}";q={window.quota}' + ("" if window.seconds is None else f";w={window.seconds}"))
        state.append(f'"{window.name}";r={remaining}' + ("" if reset_s is None else f";t={max(0, math.ceil(reset_s))}"))
    return {"RateLimit-Policy": ", ".join(policy), "RateLimit": ", ".join(state)}
