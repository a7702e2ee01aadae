"""What happens at three times the capacity: how much is still answered, and how soon and how well the rest is refused.

    python -m benchmarks.overload [--factor 3] [--seconds 6] [--rounds 3] [--set name=value]

Each round measures the capacity (``wrk``, 32 connections, single 32x32 PNG images) and then sends ``factor`` times as many
requests in an open loop, a Poisson process. Goodput counts the answers of status 200 that came while requests were arriving, so
that working off the queue afterwards does not count. A refusal's time counts from when the request was due; the client competes
for the same two cores, so how late it wrote the requests is printed too.

Checked on the medians: goodput at least 0.8 of the capacity; the 99th percentile of a refusal's time at most 50 ms. Checked in
every round: nothing but 200 and 503, and ``Retry-After`` with every 503.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.hardware import describe, spread
from benchmarks.load import OpenLoop, closed_loop, open_loop, probe, single_images, write_load
from benchmarks.running_service import UNLIMITED, add_settings_option, running_service, versions
from benchmarks.serving_overhead import print_row, summary

CAPACITY_CONNECTIONS = 32
MAX_CONNECTIONS = 4000
WARM_UP_S = 2


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    add_settings_option(parser)
    options = parser.parse_args()
    settings = {**UNLIMITED, **dict(options.settings)}
    rounds, statuses = [], []
    with tempfile.TemporaryDirectory() as folder, running_service(**settings) as running:
        images = single_images()
        probe(running.url, images)
        script = write_load(Path(folder), images)
        closed_loop(running.url, script, CAPACITY_CONNECTIONS, WARM_UP_S)
        for number in range(options.rounds):
            capacity = closed_loop(running.url, script, CAPACITY_CONNECTIONS, options.seconds).all_answered().requests_per_s
            rate = options.factor * capacity
            seen = open_loop(running.url, images, rate, options.seconds, MAX_CONNECTIONS, seed=number)
            rounds.append({"capacity_images_per_s": capacity, **figures(seen, capacity)})
            statuses.append(seen.statuses())
        memory = running.peak_memory_mib()
    row = {name: values for name, values in summary(rounds).items() if not any(math.isnan(each[name]) for each in rounds)}
    print_row(f"{options.factor:g} times the capacity", row)
    print(f"answers by status, each round: {statuses}")
    checks = check(rounds, statuses)
    for name, met in checks.items():
        print(f"{name}: {'met' if met else 'NOT met'}")
    how = {"factor": options.factor, "rounds": options.rounds, "seconds": options.seconds, "settings": settings}
    result = {"overload": row, "statuses": statuses, "checks": checks, "peak_memory_mib": memory}
    print(json.dumps({"benchmark": "overload", **how, "hardware": describe(), "versions": versions(), **result}))


def figures(seen: OpenLoop, capacity: float) -> dict[str, float]:
    """Return what is reported of one round; nan where no request had the status."""
    done_s = seen.scheduled_s + seen.latency_ms / 1000
    good = (seen.status == 200) & (done_s <= seen.seconds)
    refused = seen.status == 503
    goodput = int(good.sum()) / seen.seconds
    return {
        "offered_per_s": len(seen.status) / seen.seconds,
        "goodput_per_s": goodput,
        "goodput_over_capacity": goodput / capacity,
        "refused_share": float(refused.mean()),
        "refused_without_retry_after": int((refused & ~seen.retry_after).sum()),
        "refused_p50_ms": seen.latency(50, 503),
        "refused_p99_ms": seen.latency(99, 503),
        "answered_p50_ms": seen.latency(50, 200),
        "answered_p99_ms": seen.latency(99, 200),
        "client_late_p50_ms": seen.late(50),
        "client_late_p99_ms": seen.late(99),
        "client_cpu_ms": seen.client_cpu_us / 1000,
        "client_nice": seen.client_nice,
        "connections": seen.connections,
    }


def check(rounds: Sequence[Mapping[str, float]], statuses: Sequence[Mapping[int, int]]) -> dict[str, bool]:
    """Tell which of the promises were kept."""
    goodput = spread([measured["goodput_over_capacity"] for measured in rounds])["median"]
    slow = np.median([measured["refused_p99_ms"] for measured in rounds])
    return {
        "goodput at least 0.8 of the capacity": bool(goodput >= 0.8),
        "99 % of refusals within 50 ms": bool(slow <= 50),
        "nothing but 200 and 503": all(set(seen) <= {200, 503} for seen in statuses),
        "Retry-After with every 503": all(measured["refused_without_retry_after"] == 0 for measured in rounds),
    }


if __name__ == "__main__":
    main()
