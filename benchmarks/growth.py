"""What an image costs as the load and the service grow: processor time and wall time, one thing at a time.

    python -m benchmarks.growth [--dimensions connections,max_batch_size,frontends,replicas,experts] [--rounds 3] [--seconds 5]
                                [--set name=value]

- ``connections``: 1 to 256 connections of ``wrk`` to the service as it is;
- ``max_batch_size``: 1 to 128, 64 connections;
- ``frontends``: 1, 2 and 4 HTTP processes, 64 connections;
- ``replicas``: one and two whole services on this machine, 64 connections shared among them;
- ``experts``: checkpoints of 1, 3, 9 and 18 untrained experts of width 16, made here, 64 connections.

Requests are single 32x32 PNG images; quotas and answer cache are off. Every case is a service started anew. Processor time is
that of the services' own processes, wall time is seconds over images; figures are the median, minimum and maximum over the
rounds, in which the cases take turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hardware import describe
from benchmarks.load import closed_loop, probe, single_images, write_load
from benchmarks.running_service import UNLIMITED, add_settings_option, running_service, versions
from benchmarks.serving_overhead import show, summary

CONNECTIONS = 64
DIMENSIONS = ("connections", "max_batch_size", "frontends", "replicas", "experts")
WARM_UP_S = 2


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        dimension: What grows.
        value: How far.
        connections: Of all clients together.
        replicas: Services.
        settings: What differs from the other cases.
    """

    dimension: str
    value: int
    connections: int = CONNECTIONS
    replicas: int = 1
    settings: Mapping[str, object] = field(default_factory=dict)


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=lambda text: text.split(","), default=list(DIMENSIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    add_settings_option(parser)
    options = parser.parse_args()
    unknown = set(options.dimensions) - set(DIMENSIONS)
    if unknown:
        parser.error(f"no such dimensions: {', '.join(sorted(unknown))}; there are {', '.join(DIMENSIONS)}")
    settings = {**UNLIMITED, **dict(options.settings)}
    with tempfile.TemporaryDirectory() as folder:
        script = write_load(Path(folder))
        chosen = cases(options.dimensions, Path(folder))
        measured: list[list[dict[str, float]]] = [[] for _ in chosen]
        for _ in range(options.rounds):
            for case, rounds in zip(chosen, measured, strict=True):
                rounds.append(measure(case, settings, script, options.seconds))
    rows = []
    print(f"{'':20s} {'CPU ms/image':24s} {'wall ms/image':24s} {'images/s':22s} {'mean batch'}")
    for case, rounds in zip(chosen, measured, strict=True):
        row = summary(rounds)
        rows.append({"dimension": case.dimension, "value": case.value, **row})
        cpu, wall, rate = (show(row[name]) for name in ("cpu_ms", "wall_ms", "images_per_s"))
        print(f"{case.dimension:15s}{case.value:4d}  {cpu:24s} {wall:24s} {rate:22s} {row['mean_batch']['median']:.1f}")
    how = {"rounds": options.rounds, "seconds": options.seconds, "settings": settings}
    print(json.dumps({"benchmark": "growth", **how, "hardware": describe(), "versions": versions(), "rows": rows}))


def cases(dimensions: Sequence[str], folder: Path) -> list[Case]:
    """Return the rows of the chosen dimensions; checkpoints go to the folder."""
    rows = [Case("connections", count, connections=count) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    rows += [Case("max_batch_size", size, settings={"max_batch_size": size}) for size in (1, 4, 16, 64, 128)]
    rows += [Case("frontends", count, settings={"frontends": count}) for count in (1, 2, 4)]
    rows += [Case("replicas", count, replicas=count) for count in (1, 2)]
    if "experts" in dimensions:
        paths = {count: write_checkpoint(folder / f"{count}-experts.safetensors", count) for count in (1, 3, 9, 18)}
        rows += [Case("experts", count, settings={"checkpoint": path}) for count, path in paths.items()]
    return [case for case in rows if case.dimension in dimensions]


def write_checkpoint(path: Path, experts: int) -> Path:
    """Write a checkpoint of untrained experts of width 16; what they answer means nothing, what they cost does."""
    import torch

    from model.architecture import Architecture
    from model.checkpoint import Header, save_checkpoint
    from model.mixture import Mixture

    torch.manual_seed(0)
    architecture = Architecture(width=16, num_experts=experts)
    names = tuple(f"class {number}" for number in range(architecture.num_classes))
    save_checkpoint(path, Mixture(architecture).eval(), Header(architecture, names, weights_sha256=""))
    return path


def measure(case: Case, settings: Mapping[str, object], script: Path, seconds: float) -> dict[str, float]:
    """Start the case's services, load them all at once and return the cost per image."""
    share = case.connections // case.replicas
    with ExitStack() as stack, ThreadPoolExecutor(case.replicas) as clients:
        services = [stack.enter_context(running_service(**{**settings, **case.settings})) for _ in range(case.replicas)]
        for service in services:
            probe(service.url, single_images(1))
            closed_loop(service.url, script, share, WARM_UP_S)
        before = [service.work() for service in services]
        seen = list(clients.map(lambda service: closed_loop(service.url, script, share, seconds).all_answered(), services))
        done = [service.work() - earlier for service, earlier in zip(services, before, strict=True)]
        memory = sum(service.peak_memory_mib() for service in services)
    rate = sum(loop.requests_per_s for loop in seen)
    images = sum(work.images for work in done)
    return {
        "cpu_ms": 1000 * sum(work.cpu_s for work in done) / images,
        "cpu_ms_event_loops": 1000 * sum(work.loops_s for work in done) / images,
        "wall_ms": 1000 / rate,
        "images_per_s": rate,
        "p99_ms": max(loop.p99_ms for loop in seen),
        "mean_batch": images / sum(work.batches for work in done),
        "peak_memory_mib": memory,
    }


if __name__ == "__main__":
    main()
