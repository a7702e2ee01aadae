"""Palisade and its peers on the same model, images and machine: images/s, latency at half load, memory.

    python -m benchmarks.peers.compare [--peers ...] [--connections 1,8,32,64] [--rounds 3] [--seconds 6] [--set name=value]

Every server runs the same mixture on all cores: Palisade as a user starts it, but with quotas and answer cache off; the peers
an OpenVINO graph of it in bfloat16, each in an environment of its own (made at the first run, 2.5 GB under ``build/peers``) and
set up as its documentation recommends: batches of up to 64 images, a delay of at most 2 ms. A request is one 32x32 PNG image,
one of 256 different ones; an answer has the label and the scores of all classes.

In each round every server is started, loaded by ``wrk`` (closed loop) with each number of connections in turn, warm-up
included, then by an open loop at half of the largest rate that it reached itself, must answer all 256 images right when 32
callers ask at once, and is stopped. The clients run on the same cores. Ratios are Palisade's figure to the peer's in the same
round. All figures are the median, minimum and maximum over the rounds. Needs the Debian package ``wrk``.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.hardware import describe, spread
from benchmarks.load import Requests, closed_loop, open_loop, single_images, write_load
from benchmarks.peers import environments
from benchmarks.peers.contenders import PALISADE, Contender, palisade, peers
from benchmarks.peers.processes import Server, ask, started
from benchmarks.peers.reference import Reference, export
from benchmarks.running_service import add_settings_option, numbers, versions
from benchmarks.serving_overhead import show

CALLERS = 32
WARM_UP_S = 2
REST_S = 1.0
"""Between servers: what the last one left running in the kernel comes to an end."""

Figures = dict[str, float]
Spreads = dict[str, dict[str, float]]


def main() -> None:
    """Measure, print tables and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = peers()
    parser.add_argument("--peers", default=",".join(known), help="separated by commas; all: %(default)s")
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--connections", type=numbers, default=[1, 8, 32, 64], help="of the closed loops")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="of each load")
    add_settings_option(parser)
    options = parser.parse_args()
    chosen = [name for name in options.peers.split(",") if name]
    unknown = set(chosen) - known.keys()
    if unknown:
        parser.error(f"no such peers: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the servers too
    settings = {"checkpoint": options.checkpoint, **dict(options.settings)}
    contenders = [palisade(settings), *(known[name] for name in chosen)]
    rounds: dict[str, list[Figures]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.programs()  # a missing environment shows now
    images = single_images().bodies
    with tempfile.TemporaryDirectory() as folder:
        reference = export(options.checkpoint, Path(folder), images)
        for number in range(options.rounds):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                figures = measure(contender, reference, images, options.connections, options.seconds, number)
                rounds[contender.name].append(figures)
                print(f"round {number + 1}: {contender.name:10s} {_line(figures)}", file=sys.stderr, flush=True)
                time.sleep(REST_S)
    result = summary(rounds)
    print_table("server", result["servers"])
    print_table("Palisade to", result["palisade_to_peer"])
    how = {"connections": options.connections, "rounds": options.rounds, "seconds": options.seconds, "settings": settings}
    how |= {"hardware": describe(), "versions": versions(), "peers": {name: environments.version(name) for name in chosen}}
    print(json.dumps({"benchmark": "peers", **how, **result}))


def measure(
    contender: Contender, reference: Reference, images: Sequence[bytes], connections: Sequence[int], seconds: int, seed: int
) -> Figures:
    """Start a server, return its figures and check its answers; ``seed`` fixes the arrivals of the open loop.

    Raises:
        WrongAnswer: It does not answer what the model does.
        RuntimeError: It did not start, or refused or lost a request.
    """
    requests = contender.requests(images)
    with tempfile.TemporaryDirectory() as folder, started(contender, reference.path, requests) as server:
        script = write_load(Path(folder), requests)
        figures, fastest = {"start_s": server.start_s}, 0.0
        for count in connections:
            closed_loop(server.url, script, count, WARM_UP_S)
            seen = closed_loop(server.url, script, count, seconds).all_answered()
            figures[f"images_per_s_{count}"] = seen.requests_per_s
            figures[f"p99_ms_{count}"] = seen.p99_ms
            fastest = max(fastest, seen.requests_per_s)
        figures |= at_half_load(server, requests, fastest / 2, seconds, seed)
        figures["memory_mib"] = server.memory_mib()
        check(contender, server, requests, reference)
    return figures


def check(contender: Contender, server: Server, requests: Requests, reference: Reference) -> None:
    """Ask for all images from many callers at once and compare the answers."""
    with ThreadPoolExecutor(CALLERS) as callers:
        answers = list(callers.map(lambda number: ask(server.url, requests, number), range(len(requests.bodies))))
    reference.check(contender.name, [contender.read(answer, reference.labels) for answer in answers], contender.tolerance)


def at_half_load(server: Server, requests: Requests, rate: float, seconds: int, seed: int) -> Figures:
    """Return latencies of an open loop."""
    seen = open_loop(server.url, requests, rate, seconds, seed=seed)
    if set(seen.statuses()) != {200}:
        raise RuntimeError(f"requests failed at {rate:.0f}/s; answers by status: {seen.statuses()}")
    return {
        "half_load_rate_per_s": rate,
        "half_load_p50_ms": seen.latency(50),
        "half_load_p99_ms": seen.latency(99),
        "half_load_client_late_p99_ms": seen.late(99),
    }


def summary(rounds: Mapping[str, Sequence[Figures]]) -> dict[str, dict[str, Spreads]]:
    """Return every figure's spread by server, and by peer the spread of the ratios of Palisade's figure to the peer's."""
    figures = {name: {key: spread([each[key] for each in seen]) for key in seen[0]} for name, seen in rounds.items()}
    ratios = {
        name: {
            key: spread([ours[key] / its[key] for ours, its in zip(rounds[PALISADE], seen, strict=True)])
            for key in seen[0]
            if key != "half_load_client_late_p99_ms"  # of the client itself
        }
        for name, seen in rounds.items()
        if name != PALISADE
    }
    return {"servers": figures, "palisade_to_peer": ratios}


def print_table(title: str, rows: Mapping[str, Spreads]) -> None:
    """Print spreads as a table in Markdown; each is a median (minimum-maximum)."""
    columns = [key for key in next(iter(rows.values()), {}) if not key.startswith("p99_ms")]
    print(f"\n| {title} | {' | '.join(key.replace('_', ' ') for key in columns)} |\n|{'---|' * (1 + len(columns))}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(show(row[key]) for key in columns)} |")


def _line(figures: Figures) -> str:
    return ", ".join(f"{key} {value:.0f}" for key, value in figures.items() if key.startswith(("images", "half_load_p", "mem")))


if __name__ == "__main__":
    main()
