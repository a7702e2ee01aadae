"""The load that the benchmarks put on a service: the same rendered requests in closed loops (``wrk``) and in open ones.

Closed loop: every connection sends its next request when the last one is answered; this finds the capacity. Open loop
(:mod:`benchmarks.open_loop`): arrival times are fixed in advance and latency counts from them, so that a stall of the server is
not hidden by a client that waits with it. Both clients run in processes of their own and tell what they cost themselves
(:mod:`benchmarks.client_cost`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Arrivals = Literal["poisson", "even"]

ROOT = Path(__file__).parents[1]
SCRIPT = """
local requests = {}
for i = 0, %(last)d do
  local file = assert(io.open(%(folder)s .. "/" .. i .. ".http", "rb"))
  requests[i] = file:read("*all")
  file:close()
end
local at = -1
function request()
  at = (at + 1) %% (%(last)d + 1)
  return requests[at]
end
function done(summary, latency, _)
  local e = summary.errors
  local counts = '\\n{"completed": %%d, "seconds": %%f, "refused": %%d, "broken": %%d, '
  io.write(string.format(counts, summary.requests, summary.duration / 1e6, e.status, e.connect + e.read + e.write + e.timeout))
  local p50, p95, p99 = latency:percentile(50), latency:percentile(95), latency:percentile(99)
  io.write(string.format('"p50": %%f, "p95": %%f, "p99": %%f}\\n', p50 / 1e3, p95 / 1e3, p99 / 1e3))
end
"""


@dataclass(frozen=True)
class Requests:
    """POST requests that differ in their bodies only; clients send them in turn, over and over.

    Attributes:
        path: Where they go.
        headers: Besides ``Host`` and ``Content-Length``.
        bodies: At least one.
        images: Images in each body.
    """

    path: str
    headers: dict[str, str]
    bodies: Sequence[bytes]
    images: int = 1

    def rendered(self) -> list[bytes]:
        """Return whole HTTP/1.1 requests."""
        lines = [f"POST {self.path} HTTP/1.1", "Host: 127.0.0.1", *(f"{k}: {v}" for k, v in self.headers.items())]
        head = "\r\n".join(lines)
        return [f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body for body in self.bodies]


@dataclass(frozen=True)
class ClosedLoop:
    """What ``wrk`` saw.

    Percentiles are of all answers; ``wrk`` adds what callers would have waited behind answers that took over twice the mean.

    Attributes:
        requests_per_s: Answers below 400.
        refused: Answers from 400.
        broken: Connections that failed and answers that took more than 10 s.
        p50_ms: Median latency; likewise ``p95_ms`` and ``p99_ms``.
        client_cpu_us: What the client itself cost, per answer.
    """

    requests_per_s: float
    refused: int
    broken: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    client_cpu_us: float

    def all_answered(self) -> ClosedLoop:
        """Return itself, or raise ``RuntimeError`` when a request was refused or lost: such figures compare with nothing."""
        if self.refused or self.broken:
            raise RuntimeError(f"{self.refused} requests were refused and {self.broken} lost: this is no measurement")
        return self


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
        chosen = self.latency_ms if status is None else self.latency_ms[self.status == status]
        return float(np.percentile(chosen, percentile, method="higher")) if len(chosen) else float("nan")

    def late(self, percentile: float) -> float:
        """Return a percentile of the client's own part of the latency in milliseconds, of what it sent."""
        return float(np.percentile(self.late_ms, percentile, method="higher"))

    def statuses(self) -> dict[int, int]:
        """Return how many requests had each status."""
        return {int(status): int(count) for status, count in zip(*np.unique(self.status, return_counts=True), strict=True)}


def single_images(count: int = 256, side: int = 32) -> Requests:
    """Return requests of one PNG each for ``POST /v1/classify``: smooth noise, about as large as photos once compressed."""
    bodies = []
    for pixels in _pictures(count, side):
        body = io.BytesIO()
        Image.fromarray(pixels).save(body, "PNG")
        bodies.append(body.getvalue())
    return Requests("/v1/classify", {"Content-Type": "image/png"}, bodies)


def tensors(images: int = 64, count: int = 8, side: int = 32) -> Requests:
    """Return Open Inference Protocol requests, each with one binary UINT8 tensor ``(images, 3, side, side)``."""
    shape = (images, 3, side, side)
    size = images * 3 * side * side
    tensor = {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": size}}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    pixels = np.stack(list(_pictures(images * count, side))).transpose(0, 3, 1, 2)  # (N, 3, H, W)
    bodies = [header + part.tobytes() for part in np.split(pixels, count)]
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return Requests("/v2/models/palisade/infer", headers, bodies, images)


def probe(url: str, requests: Requests) -> None:
    """Send one request; raises ``RuntimeError`` with the server's words when it isn't answered 200."""
    request = urllib.request.Request(url + requests.path, requests.bodies[0], requests.headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(500).decode(errors="replace")
        raise RuntimeError(f"POST {requests.path} was answered {error.code}: {text}") from error


def write_load(folder: Path, requests: Requests | None = None) -> Path:
    """Write requests (:func:`single_images` by default) and the script that ``wrk`` sends them with; return the script."""
    count = _write_requests(folder, requests or single_images())
    script = folder / "load.lua"
    script.write_text(SCRIPT % {"last": count - 1, "folder": json.dumps(str(folder))})
    return script


def closed_loop(url: str, script: Path, connections: int, seconds: float) -> ClosedLoop:
    """Send requests from ``connections`` connections at once, each as soon as its last one is answered."""
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs wrk: apt-get install wrk")
    length = f"{max(1, round(seconds))}s"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{length}", "--timeout", "10s", "-s", str(script), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        report = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # unlike RUSAGE_CHILDREN right when several run at once
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"wrk stopped with status {process.returncode}:\n{report}")
    seen = json.loads(report.splitlines()[-1])
    good = seen["completed"] - seen["refused"]
    cost = 1e6 * (usage.ru_utime + usage.ru_stime) / max(1, seen["completed"])
    latency = (seen["p50"], seen["p95"], seen["p99"])
    return ClosedLoop(good / seen["seconds"], seen["refused"], seen["broken"], *latency, cost)


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
    with tempfile.TemporaryDirectory() as name:
        count = _write_requests(Path(name), requests)
        plan = {"url": url, "requests": count, "connections": connections, "due_s": due.tolist()}
        (Path(name) / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "benchmarks.open_loop", name]
        run = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    seen: dict[str, Any] = json.loads(run.stdout)
    latency, late = np.array(seen["latency_ms"], np.float64), np.array(seen["late_ms"], np.float64)
    status, retry_after = np.array(seen["status"], np.int64), np.array(seen["retry_after"], bool)
    cost = 1e6 * seen["cpu_s"] / len(due)
    return OpenLoop(seconds, due, latency, late, status, retry_after, seen["connections"], cost, seen["nice"])


def schedule(rate_per_s: float, seconds: float, arrivals: Arrivals, seed: int = 0) -> np.ndarray:
    """Return ``round(rate_per_s * seconds)`` arrival times in ``[0, seconds)``, in order.

    A Poisson process that is known to have N arrivals in a window has them at N independent uniform times.
    """
    count = max(1, round(rate_per_s * seconds))
    if arrivals == "even":
        return np.arange(count) * (seconds / count)
    return np.sort(np.random.default_rng(seed).uniform(0, seconds, count))


def _pictures(count: int, side: int) -> Iterator[np.ndarray]:
    """Yield different smooth pictures ``(side, side, 3)`` uint8."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def _write_requests(folder: Path, requests: Requests) -> int:
    rendered = requests.rendered()
    for number, request in enumerate(rendered):
        (folder / f"{number}.http").write_bytes(request)
    return len(rendered)
