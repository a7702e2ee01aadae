"""Measurements: a load client run in a process of its own, and what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from service.load.connection import Target
from service.load.requests import Requests

Arrivals = Literal["poisson", "even"]


@dataclass(frozen=True)
class OpenLoop:
    """What happened to every request of an open loop, in order of arrival; arrays of length N.

    Attributes:
        seconds: Length of the arrival window.
        scheduled_s: When each request was due, from the window's start.
        latency_ms: From when it was due to its last byte; infinite if it was never answered.
        late_ms: From when it was due to when the client wrote it: the client's own part of the latency.
        status: HTTP status; 0 if it was never answered.
        retry_after: Whether the answer had that header.
        connections: How many the client opened.
        client_cpu_us: What the client itself cost, per request.
        client_nice: The client's priority; negative if it could take a higher one than the server.
    """

    seconds: float
    scheduled_s: np.ndarray
    latency_ms: np.ndarray
    late_ms: np.ndarray
    status: np.ndarray
    retry_after: np.ndarray
    connections: int
    client_cpu_us: float
    client_nice: int

    def latency(self, percentile: float, status: int | None = None) -> float:
        """Return a percentile of the latency in milliseconds, of all requests or those with one status; nan without any."""
        return percentile_of(self.latency_ms if status is None else self.latency_ms[self.status == status], percentile)

    def late(self, percentile: float) -> float:
        """Return a percentile of the client's own part of the latency in milliseconds, of what it sent."""
        return percentile_of(self.late_ms, percentile)

    def statuses(self) -> dict[int, int]:
        """Return how many requests had each status."""
        return count(self.status)


@dataclass(frozen=True)
class ClosedLoop:
    """What happened to every request of a closed loop, in the order of sending; arrays of length N.

    Attributes:
        seconds: How long requests were sent.
        done_s: When each was answered, from the start; infinite if it never was.
        latency_ms: From when it was sent to its last byte; infinite if it was never answered.
        status: HTTP status; 0 if it was never answered.
        connections: How many the client opened.
    """

    seconds: float
    done_s: np.ndarray
    latency_ms: np.ndarray
    status: np.ndarray
    connections: int


def open_loop(
    url: str,
    requests: Requests,
    rate_per_s: float,
    seconds: float,
    connections: int = 1000,
    arrivals: Arrivals = "poisson",
    seed: int = 0,
) -> OpenLoop:
    """Send ``rate_per_s * seconds`` requests at times fixed in advance, whatever the server does.

    Args:
        url: The server.
        requests: Sent in turn.
        rate_per_s: Mean arrivals per second.
        seconds: Length of the arrival window.
        connections: Most connections; a request that finds all of them busy waits for one, which counts as latency.
        arrivals: ``poisson``: independent callers; ``even``: one every ``1 / rate_per_s`` seconds.
        seed: For ``poisson``.
    """
    due = schedule(rate_per_s, seconds, arrivals, seed)
    seen = _measure(url, requests, {"connections": connections, "due_s": due.tolist()})
    latency, late = np.array(seen["latency_ms"], np.float64), np.array(seen["late_ms"], np.float64)
    status, retry_after = np.array(seen["status"], np.int64), np.array(seen["retry_after"], bool)
    cost = 1e6 * seen["cpu_s"] / len(due)
    return OpenLoop(seconds, due, latency, late, status, retry_after, seen["connections"], cost, seen["nice"])


def closed_loop(url: str, requests: Requests, connections: int, seconds: float) -> ClosedLoop:
    """Keep ``connections`` requests on their way for ``seconds`` seconds, each sent as soon as the last one is answered."""
    seen = _measure(url, requests, {"connections": connections, "seconds": seconds})
    done, latency = np.array(seen["done_s"], np.float64), np.array(seen["latency_ms"], np.float64)
    return ClosedLoop(seconds, done, latency, np.array(seen["status"], np.int64), seen["connections"])


def schedule(rate_per_s: float, seconds: float, arrivals: Arrivals, seed: int = 0) -> np.ndarray:
    """Return ``round(rate_per_s * seconds)`` arrival times in ``[0, seconds)``, in order.

    A Poisson process that is known to have N arrivals in a window has them at N independent uniform times.
    """
    arriving = max(1, round(rate_per_s * seconds))
    if arrivals == "even":
        return np.arange(arriving) * (seconds / arriving)
    return np.sort(np.random.default_rng(seed).uniform(0, seconds, arriving))


def percentile_of(values: np.ndarray, percentile: float) -> float:
    """Return the smallest value that so many percent of the values do not exceed; nan without any."""
    return float(np.percentile(values, percentile, method="higher")) if len(values) else float("nan")


def count(status: np.ndarray) -> dict[int, int]:
    """Return how many requests had each status."""
    return {int(value): int(times) for value, times in zip(*np.unique(status, return_counts=True), strict=True)}


def _measure(url: str, requests: Requests, plan: dict[str, object]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="palisade-load-") as name:  # only its owner can read it: requests may have a key
        written = requests.write(Path(name), Target.parse(url).authority)
        (Path(name) / "plan.json").write_text(json.dumps({**plan, "url": url, "requests": written}))
        command = [sys.executable, "-P", "-m", "service.load.client", name]  # not from the folder that it is called in
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    seen: dict[str, Any] = json.loads(run.stdout)
    return seen
