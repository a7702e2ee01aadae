"""What the service costs over the bare model: images/s and their ratio, latency, processor time, memory and start time.

    python -m benchmarks.serving_overhead [--connections 1,8,32,128] [--tensor-connections 1,2,4] [--rounds 5] [--seconds 10]
                                          [--starts 5] [--set name=value]

Bare: the fast path in a process of its own, at its best batch size and way (:mod:`benchmarks.bare`), just before each load.
Service: ``palisade-serve run`` with quotas and answer cache off, asked by ``wrk`` (Debian package ``wrk``) from the same cores
with single 32x32 PNG images (``--connections``) and with binary Open Inference Protocol requests of 64 images
(``--tensor-connections``). They take turns; figures are the median, minimum and maximum over the rounds, the ratio is of each
round's own two figures. An empty list leaves a part out: ``--connections 32 --tensor-connections "" --starts 0`` measures one
figure. Latency under this load is not what a caller sees at moderate load: :mod:`benchmarks.serving_latency` measures that.

Processor time is the service's own, per image: all of it, the part on event loops (HTTP, validation, batching), and the part in
the kernel; engine and decode are wall time inside the service. Start time runs from exec to the first 200 of ``/readyz``, after
one start that is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.bare import Bare, bare, best
from benchmarks.hardware import describe, spread
from benchmarks.load import Requests, closed_loop, probe, single_images, tensors, write_load
from benchmarks.running_service import UNLIMITED, RunningService, add_settings_option, numbers, running_service, versions

WARM_UP_S = 2
BARE_S = 3.0
PAUSE_S = 0.5
"""Before each measurement, so that the other side's worker threads go to sleep."""


@dataclass(frozen=True)
class Load:
    """One column of the table: which requests come over how many connections."""

    name: str
    requests: Requests
    script: Path
    connections: int


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    options = parse()
    settings = {**UNLIMITED, **dict(options.settings)}
    fastest = best(bare(settings, seconds=min(1.0, options.seconds)))
    print(f"bare fast path at its best: batch {fastest.batch}, {fastest.way}, {fastest.execution}")
    with tempfile.TemporaryDirectory() as folder, running_service(**settings) as running:
        at_start = running.peak_memory_mib()
        loads = make_loads(Path(folder), options.connections, options.tensor_connections)
        for load in loads:
            probe(running.url, load.requests)
            closed_loop(running.url, load.script, load.connections, WARM_UP_S)
        rounds: dict[str, list[dict[str, float]]] = {load.name: [] for load in loads}
        for _ in range(options.rounds):
            for load in loads:
                rounds[load.name].append(measure(running, load, settings, fastest, options.seconds))
        under_load = running.peak_memory_mib()
    rows = {name: summary(measured) for name, measured in rounds.items()}
    for name, row in rows.items():
        print_row(name, row)
    starts = start(settings, options.starts)
    memory = {"at_start": at_start, "under_load": under_load}
    print(f"peak memory, MiB: {at_start:.0f} at start, {under_load:.0f} under load")
    if starts:
        print(f"exec to ready, s: {show(spread(starts))}, {len(starts)} starts")
    how = {"rounds": options.rounds, "seconds": options.seconds, "settings": settings, "bare": asdict(fastest)}
    result = {"loads": rows, "peak_memory_mib": memory, "start_s": spread(starts) if starts else None, "starts": len(starts)}
    print(json.dumps({"benchmark": "serving_overhead", **how, "hardware": describe(), "versions": versions(), **result}))


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=numbers, default=[1, 8, 32, 128], help="for single images")
    parser.add_argument("--tensor-connections", type=numbers, default=[1, 2, 4], help="for requests of 64 images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load in each round")
    parser.add_argument("--starts", type=int, default=5, help="how often start time is measured")
    add_settings_option(parser)
    return parser.parse_args()


def make_loads(folder: Path, connections: Sequence[int], tensor_connections: Sequence[int]) -> list[Load]:
    """Write the requests and return the loads, single images first."""
    loads = []
    for what, requests, counts in (("png", single_images(), connections), ("tensor", tensors(), tensor_connections)):
        (folder / what).mkdir()
        script = write_load(folder / what, requests)
        loads += [Load(f"{what} x{count}", requests, script, count) for count in counts]
    return loads


def measure(
    running: RunningService, load: Load, settings: Mapping[str, object], fastest: Bare, seconds: float
) -> dict[str, float]:
    """Measure the bare path and then the service under one load; every figure of the round by its name."""
    time.sleep(PAUSE_S)
    (alone,) = bare(settings, [fastest.batch], [fastest.way], min(BARE_S, seconds))
    time.sleep(PAUSE_S)
    before = running.work()
    seen = closed_loop(running.url, load.script, load.connections, seconds).all_answered()
    work = running.work() - before
    images_per_s = seen.requests_per_s * load.requests.images
    return {
        "bare_images_per_s": alone.images_per_s,
        "service_images_per_s": images_per_s,
        "ratio": images_per_s / alone.images_per_s,
        "p50_ms": seen.p50_ms,
        "p95_ms": seen.p95_ms,
        "p99_ms": seen.p99_ms,
        **work.per_image(),
        "client_cpu_ms": seen.client_cpu_us / 1000 / load.requests.images,
    }


def start(settings: Mapping[str, object], count: int) -> list[float]:
    """Return the start times of ``count`` services, one after another, after one that warms the file cache."""
    took = []
    for _ in range(count + 1 if count else 0):
        with running_service(**settings) as running:
            took.append(running.start_s)
    return took[1:]


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return each figure's spread over the rounds."""
    return {name: spread([measured[name] for measured in rounds]) for name in rounds[0]}


def show(values: Mapping[str, float]) -> str:
    """Return a spread as text: median (minimum-maximum)."""
    median, low, high = (
        f"{values[key]:,.0f}" if values[key] >= 1000 else f"{values[key]:.3g}" for key in ("median", "min", "max")
    )
    return f"{median} ({low}-{high})"


def print_row(name: str, row: Mapping[str, Mapping[str, float]]) -> None:
    """Print a heading and one line per figure."""
    print(name)
    for figure, values in row.items():
        print(f"  {figure:22s} {show(values)}")


if __name__ == "__main__":
    main()
