"""The model's fast path alone, in a process of its own: what the service is compared with.

    python -m benchmarks.bare [--batches 1,8,64] [--ways alone,lanes] [--seconds 2] [--set precision=float32]

``alone``: one thread calls ``predict`` over and over. ``lanes``: where the fast path has several lanes, as many threads do,
each with its share of the cores; left out where it has one. Both with the settings that the service would have. Prints images/s
and the latency of a call for each batch size, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.running_service import add_settings_option, numbers, versions
from model.fast_path import load_fast_path
from service.settings import Settings

BATCHES = (1, 8, 16, 32, 64, 128)
WAYS = ("alone", "lanes")


@dataclass(frozen=True)
class Bare:
    """What the fast path did at one batch size.

    Attributes:
        batch: Images per call.
        way: ``alone`` or ``lanes``.
        images_per_s: Throughput of all threads together.
        p50_ms: Median latency of a call; ``p99_ms`` likewise.
        execution: The execution that ran.
    """

    batch: int
    way: str
    images_per_s: float
    p50_ms: float
    p99_ms: float
    execution: str


def bare(
    settings: Mapping[str, object], batches: Sequence[int] = BATCHES, ways: Sequence[str] = WAYS, seconds: float = 1.0
) -> list[Bare]:
    """Measure in a new process; returns one entry per batch size and way, in order."""
    command = [sys.executable, "-m", "benchmarks.bare", "--seconds", str(seconds), "--ways", ",".join(ways)]
    command += ["--batches", ",".join(map(str, batches)), *(f"--set={name}={value}" for name, value in settings.items())]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], check=True)
    return [Bare(**row) for row in json.loads(run.stdout.splitlines()[-1])["rows"]]


def best(rows: Sequence[Bare]) -> Bare:
    """Return the one with the most images/s."""
    return max(rows, key=lambda row: row.images_per_s)


def main() -> None:
    """Measure here, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=numbers, default=list(BATCHES))
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=2.0)
    add_settings_option(parser)
    options = parser.parse_args()
    rows = measure(Settings(**dict(options.settings)), options.batches, options.ways, options.seconds)
    for row in rows:
        print(f"batch {row.batch:3d} {row.way:6s} {row.images_per_s:8.1f} images/s  {row.p50_ms:7.2f} ms  {row.execution}")
    print(json.dumps({"benchmark": "bare", "versions": versions(), "rows": [asdict(row) for row in rows]}))


def measure(settings: Settings, batches: Sequence[int], ways: Sequence[str], seconds: float) -> list[Bare]:
    """Load the fast path as the service would and time it."""
    path = load_fast_path(
        settings.checkpoint,
        device=settings.device,
        precision=settings.precision,
        top_k=settings.top_k or None,
        threads=settings.threads,
        tuned=Path(settings.tuning_dir) if settings.tuning_dir else None,
    )
    architecture = path.header.architecture
    generator = np.random.default_rng(0)
    rows = []
    for batch in batches:
        images = generator.integers(0, 256, (batch, 3, architecture.height, architecture.input_width), dtype=np.uint8)
        for way in ways:
            threads = path.lanes if way == "lanes" else 1
            if way == "lanes" and threads == 1:
                continue
            rate, took = timed(partial(path.predict, images, way == "alone"), threads, seconds)
            p50, p99 = np.percentile(took, (50, 99), method="higher")
            rows.append(Bare(batch, way, batch * rate, float(p50), float(p99), str(path.plan.pick(batch))))
    return rows


def timed(call: Callable[[], object], threads: int, seconds: float) -> tuple[float, list[float]]:
    """Make calls from so many threads for a time; returns calls/s of all together and each call's milliseconds."""

    def work() -> list[float]:
        took = []
        started = before = time.perf_counter()
        while before - started < seconds:
            call()
            after = time.perf_counter()
            took.append(1000 * (after - before))
            before = after
        return took

    if threads == 1:  # on this thread: torch keeps a team of workers for each thread that computes
        for _ in range(3):
            call()
        took = work()
        return 1000 * len(took) / sum(took), took
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: call(), range(3 * threads)))
        parts = list(pool.map(lambda _: work(), range(threads)))
    return sum(1000 * len(part) / sum(part) for part in parts), [each for part in parts for each in part]


if __name__ == "__main__":
    main()
