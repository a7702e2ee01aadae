"""The load that the benchmarks put on a service: the same rendered requests in closed loops (``wrk``) and in open ones.

Closed loop: every connection sends its next request when the last one is answered; this finds the capacity. Open loop
(:mod:`service.load.open_loop`): arrival times are fixed in advance and latency counts from them, so that a stall of the server
is not hidden by a client that waits with it. Both clients run in processes of their own and tell what they cost themselves
(:mod:`benchmarks.client_cost`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from service.load.measurement import Arrivals, OpenLoop, open_loop, schedule
from service.load.requests import Requests, probe, single_images, tensors

__all__ = [
    "Arrivals",
    "ClosedLoop",
    "OpenLoop",
    "Requests",
    "closed_loop",
    "open_loop",
    "probe",
    "schedule",
    "single_images",
    "tensors",
    "write_load",
]

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


def write_load(folder: Path, requests: Requests | None = None) -> Path:
    """Write requests (:func:`single_images` by default) and the script that ``wrk`` sends them with; return the script."""
    count = (requests or single_images()).write(folder)
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
