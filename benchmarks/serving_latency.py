"""What callers wait at moderate load: latency percentiles at 25, 50 and 80 % of the service's capacity.

    python -m benchmarks.serving_latency [--rounds 3] [--seconds 10] [--arrivals poisson|even] [--set name=value]

Each round measures the capacity (``wrk``, 32 connections, single 32x32 PNG images), then sends single images in an open loop at
each share of it: arrival times are fixed in advance (a Poisson process by default, another one in each round) and latency
counts from them. Then the bare fast path classifies single images one after another in a process of its own. The client runs on
the same cores; how late it wrote its requests is part of the latency and printed beside it. Figures are the median, minimum and
maximum over the rounds.

The last line but one compares the 99th percentile at 50 % with three times the bare latency (median) plus a delay window of 2
ms.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.bare import bare
from benchmarks.hardware import describe, spread
from benchmarks.load import Arrivals, OpenLoop, closed_loop, open_loop, probe, single_images, write_load
from benchmarks.running_service import UNLIMITED, RunningService, add_settings_option, running_service, versions
from benchmarks.serving_overhead import print_row, show, summary

SHARES = (25, 50, 80)
CAPACITY_CONNECTIONS = 32
WARM_UP_S = 2


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load in each round")
    parser.add_argument("--arrivals", choices=("poisson", "even"), default="poisson")
    add_settings_option(parser)
    options = parser.parse_args()
    settings = {**UNLIMITED, **dict(options.settings)}
    shares: dict[int, list[dict[str, float]]] = {share: [] for share in SHARES}
    capacity, alone = [], []
    with tempfile.TemporaryDirectory() as folder, running_service(**settings) as running:
        images = single_images()
        probe(running.url, images)
        script = write_load(Path(folder), images)
        closed_loop(running.url, script, CAPACITY_CONNECTIONS, WARM_UP_S)
        for number in range(options.rounds):
            seen = closed_loop(running.url, script, CAPACITY_CONNECTIONS, options.seconds).all_answered()
            capacity.append(seen.requests_per_s)
            for share in SHARES:
                rate = seen.requests_per_s * share / 100
                shares[share].append(at_rate(running, rate, options.seconds, options.arrivals, number))
            alone.append(bare(settings, [1], ["alone"], min(3.0, options.seconds))[0].p50_ms)
    rows = {f"{share} % of capacity": summary(rounds) for share, rounds in shares.items()}
    print(f"capacity, images/s: {show(spread(capacity))}")
    for name, row in rows.items():
        print_row(name, row)
    print(f"bare fast path, one image, ms: {show(spread(alone))}")
    check = check_tail(rows["50 % of capacity"]["p99_ms"]["median"], spread(alone)["median"])
    print(f"p99 at 50 %: {check['p99_ms']:.2f} ms, bound {check['bound_ms']:.2f} ms: {'met' if check['met'] else 'NOT met'}")
    how = {"rounds": options.rounds, "seconds": options.seconds, "arrivals": options.arrivals, "settings": settings}
    result = {"capacity_images_per_s": spread(capacity), "loads": rows, "bare_latency_ms": spread(alone), "check": check}
    print(json.dumps({"benchmark": "serving_latency", **how, "hardware": describe(), "versions": versions(), **result}))


def at_rate(running: RunningService, rate: float, seconds: float, arrivals: Arrivals, seed: int) -> dict[str, float]:
    """Return the figures of one open loop of single images.

    Raises:
        RuntimeError: A request was not answered 200.
    """
    seen = open_loop(running.url, single_images(), rate, seconds, arrivals=arrivals, seed=seed)
    if set(seen.statuses()) != {200}:
        raise RuntimeError(f"requests failed at {rate:.0f}/s; answers by status: {seen.statuses()}")
    return figures(seen)


def figures(seen: OpenLoop) -> dict[str, float]:
    """Return what is reported of an open loop."""
    return {
        "requests": len(seen.status),
        "p50_ms": seen.latency(50),
        "p95_ms": seen.latency(95),
        "p99_ms": seen.latency(99),
        "client_late_p50_ms": seen.late(50),
        "client_late_p99_ms": seen.late(99),
        "client_cpu_ms": seen.client_cpu_us / 1000,
        "client_nice": seen.client_nice,
        "connections": seen.connections,
    }


def check_tail(p99_ms: float, bare_ms: float) -> Mapping[str, float | bool]:
    """Compare a 99th percentile with three times the bare latency plus a delay window of 2 ms."""
    bound = 3 * bare_ms + 2
    return {"p99_ms": p99_ms, "bound_ms": bound, "met": p99_ms <= bound}


if __name__ == "__main__":
    main()
