"""The report of ``palisade-serve bench``: what callers would have felt, in a few numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.load.measurement import ClosedLoop, OpenLoop, count, percentile_of

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
REFUSED = (429, 503)


@dataclass(frozen=True)
class Report:
    """What a measurement came to.

    Attributes:
        requests: How many were sent.
        answered: How many of them got a 200.
        refused: How many got a 429 or a 503.
        unanswered: How many got nothing: no connection, a lost one, or no answer in time.
        images_per_s: Images in answers with 200, per second of the time in which requests were sent; answers that came
            later do not count in a closed loop.
        latency_ms: Percentiles of the answers with 200, by name (``p50`` ... ``max``); ``None`` without any. An open loop's
            count from when a request was due.
        statuses: How many requests got each status.
        late_ms: 99th percentile of how late the client itself was; ``None`` of a closed loop.
    """

    requests: int
    answered: int
    refused: int
    unanswered: int
    images_per_s: float
    latency_ms: dict[str, float | None]
    statuses: dict[int, int]
    late_ms: float | None = None

    @classmethod
    def of_closed(cls, seen: ClosedLoop, images: int) -> Report:
        """Return a closed loop's report; every request had ``images`` images."""
        in_time = int(np.sum((seen.status == 200) & (seen.done_s <= seen.seconds)))
        return cls._of(seen.latency_ms, seen.status, in_time * images / seen.seconds, None)

    @classmethod
    def of_open(cls, seen: OpenLoop, images: int) -> Report:
        """Return an open loop's report; every request had ``images`` images."""
        return cls._of(seen.latency_ms, seen.status, int(np.sum(seen.status == 200)) * images / seen.seconds, seen.late(99))

    @classmethod
    def _of(cls, latency_ms: np.ndarray, status: np.ndarray, images_per_s: float, late_ms: float | None) -> Report:
        good = latency_ms[status == 200]
        latency = {
            f"p{percentile:g}" if percentile < 100 else "max": _finite(percentile_of(good, percentile))
            for percentile in PERCENTILES
        }
        return cls(
            requests=len(status),
            answered=len(good),
            refused=int(np.isin(status, REFUSED).sum()),
            unanswered=int((status == 0).sum()),
            images_per_s=images_per_s,
            latency_ms=latency,
            statuses={value: times for value, times in count(status).items() if value},
            late_ms=None if late_ms is None else _finite(late_ms),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        rounded = {name: None if value is None else round(value, 3) for name, value in self.latency_ms.items()}
        found = {
            "requests": self.requests,
            "answered": self.answered,
            "refused": self.refused,
            "unanswered": self.unanswered,
            "images_per_s": round(self.images_per_s, 2),
            "latency_ms": rounded,
            "statuses": {str(status): times for status, times in self.statuses.items()},
        }
        return found if self.late_ms is None else {**found, "client_late_ms_p99": round(self.late_ms, 3)}

    def lines(self) -> list[str]:
        """Return the report as text."""
        latency = "  ".join(f"{name} {value:.1f}" for name, value in self.latency_ms.items() if value is not None)
        statuses = ", ".join(f"{status}: {times}" for status, times in self.statuses.items())
        unanswered = f"; {self.unanswered} without an answer" if self.unanswered else ""
        rows = [
            ("images/s", f"{self.images_per_s:.1f}"),
            ("latency in ms", latency or "no request was answered 200"),
            ("requests", f"{self.requests}: {self.answered} answered, {self.refused} refused (429, 503){unanswered}"),
            ("statuses", statuses or "none"),
        ]
        if self.late_ms is not None:
            rows.append(("client", f"sent 99 % of its requests within {self.late_ms:.1f} ms of when they were due"))
        return [f"{name:16s}{text}" for name, text in rows]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
