"""Quotas: how many images a caller may have classified in each of several windows of time."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Window:
    """At most ``quota`` images in ``seconds`` seconds, counted from the first image of the window.

    Attributes:
        name: The unit's name, as callers see it.
        quota: Images.
        seconds: Length.
    """

    name: str
    quota: int
    seconds: int


def parse_windows(text: str) -> tuple[Window, ...]:
    """Parse ``"60/minute;2000/day"``; an empty text means no limit.

    Raises:
        ValueError: A window is not ``<images>/<second|minute|hour|day>`` or a unit comes twice.
    """
    windows = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = re.fullmatch(r"([1-9][0-9]{0,11})\s*/\s*(second|minute|hour|day)", part)
        if match is None:
            raise ValueError(
                f"'{part}' is not a limit; write images/unit with unit {', '.join(SECONDS)}, as 60/minute;2000/day"
            )
        windows.append(Window(match[2], int(match[1]), SECONDS[match[2]]))
    if len({window.name for window in windows}) < len(windows):
        raise ValueError(f"'{text}' names a unit twice")
    return tuple(windows)


@dataclass(frozen=True)
class Level:
    """How full one window of a caller is: ``remaining`` images and ``reset_s`` seconds until it starts anew."""

    window: Window
    remaining: int
    reset_s: float


@dataclass(frozen=True)
class Charge:
    """Images that were charged; give it to :meth:`Limiter.refund` when the request fails.

    Attributes:
        caller: Who was charged.
        images: How many.
        starts: Start of each window at the time, so that a refund never credits a later one.
    """

    caller: str
    images: int
    starts: tuple[float, ...]


class QuotaExceededError(Exception):
    """A window has no room for a request; nothing was charged."""

    def __init__(self, level: Level) -> None:
        super().__init__(f"{level.window.name} window has {level.remaining} images left")
        self.level = level


class RequestTooLargeError(Exception):
    """A request asks for more images than a window could ever grant; nothing was charged."""

    def __init__(self, window: Window) -> None:
        super().__init__(f"{window.name} window never grants more than {window.quota} images")
        self.window = window


@dataclass
class _Usage:
    start: float
    used: int


class Limiter:
    """Counts every caller's images in memory.

    All windows of a caller are checked and charged in one step: a refused request is charged nothing. Not for several
    threads: the event loop calls it.

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

    def charge(self, caller: str, images: int) -> Charge:
        """Charge ``images`` to every window of ``caller``, or to none.

        Raises:
            RequestTooLargeError: Waiting would not help.
            QuotaExceededError: Waiting helps; of several full windows the one that resets last is named.
        """
        for window in self.windows:
            if images > window.quota:
                raise RequestTooLargeError(window)
        full = [level for level in self.levels(caller) if images > level.remaining]
        if full:
            raise QuotaExceededError(max(full, key=lambda level: level.reset_s))
        usages = self._usages(caller)
        now = self._clock()
        for window, usage in zip(self.windows, usages, strict=True):
            if now - usage.start >= window.seconds:
                usage.start, usage.used = now, 0
            usage.used += images
        self._callers.move_to_end(caller)
        return Charge(caller, images, tuple(usage.start for usage in usages))

    def refund(self, charge: Charge) -> None:
        """Take back a charge, in the windows that have not started anew since."""
        for usage, start in zip(self._callers.get(charge.caller, ()), charge.starts, strict=False):
            if usage.start == start:
                usage.used -= charge.images

    def levels(self, caller: str) -> list[Level]:
        """Return how full each of a caller's windows is now."""
        now = self._clock()
        levels = []
        usages = self._callers.get(caller) or [_Usage(now, 0) for _ in self.windows]
        for window, usage in zip(self.windows, usages, strict=True):
            if now - usage.start >= window.seconds:
                levels.append(Level(window, window.quota, float(window.seconds)))
            else:
                levels.append(Level(window, window.quota - usage.used, usage.start + window.seconds - now))
        return levels

    def _usages(self, caller: str) -> list[_Usage]:
        usages = self._callers.get(caller)
        if usages is None:
            usages = self._callers[caller] = [_Usage(self._clock(), 0) for _ in self.windows]
            if len(self._callers) > self._max_callers:
                self._callers.popitem(last=False)
        return usages


def rate_limit_headers(levels: Sequence[Level]) -> dict[str, str]:
    """Return ``RateLimit`` and ``RateLimit-Policy`` (IETF draft ratelimit-headers); empty without windows."""
    if not levels:
        return {}
    policy = ", ".join(f'"{level.window.name}";q={level.window.quota};w={level.window.seconds}' for level in levels)
    state = ", ".join(f'"{level.window.name}";r={level.remaining};t={max(0, round(level.reset_s))}' for level in levels)
    return {"RateLimit-Policy": policy, "RateLimit": state}
