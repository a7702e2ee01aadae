"""How fast every way to run a checkpoint is, beside straightforward loops over the experts, at batch 1, 8 and 64.

    python -m benchmarks.fast_path [--checkpoint compact] [--rounds 5] [--seconds 1] [--top-k 1,2,3,9]

Each execution has a process of its own, as :mod:`service.stopwatch` explains; they take turns. The straightforward loops are
the reference as it is, channels-last, in float32 and in bfloat16. Figures are images/s, the minimum, median and maximum over
the rounds, images on the host in and probabilities on the host out. The ratio is to the better straightforward loop of the same
round. The share is the network's floating-point operations, counted by torch on the reference, over those of a large square
matrix product of the same precision, measured in the same rounds. int8 is measured if ``palisade-serve tune --replay`` has
accepted it on this machine. With ``--top-k``, what skips experts is measured once more for each number of experts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.hardware import describe, spread
from model import tuned
from model.checkpoint import Header, read_header
from model.device import available, choose_device, native_bfloat16
from model.plan import ExecutionName
from model.tuned import Identity, artefact
from service.stopwatch import REFERENCES, ExecutionFailedError, Stopwatch
from service.tuning import measure

Rates = dict[str, dict[int, list[float]]]


def main() -> None:
    """Measure, print tables and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-sizes", type=_numbers, default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn")
    parser.add_argument("--only", help="these executions, as openvino-float32-x3,loop-float32; default: all")
    parser.add_argument("--top-k", type=_numbers, default=[], help="as 1,2,3,9; default: not measured")
    options = parser.parse_args()
    options.device = choose_device(options.device)
    header = read_header(options.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        rates, work = dense(options, header, Path(folder))
    rows = {batch: {name: row(name, batch, rates, work) for name in rates} for batch in options.batch_sizes}
    show(rows)
    sparse = top_k(options, header)
    how = {"checkpoint_sha256": header.weights_sha256, "device": options.device, "rounds": options.rounds}
    print(
        json.dumps(
            {
                "benchmark": "fast_path",
                **how,
                "seconds_per_turn": options.seconds,
                "hardware": describe(),
                **work,
                "images_per_s": rows,
                "top_k_images_per_s": sparse,
            }
        )
    )


def dense(options: argparse.Namespace, header: Header, folder: Path) -> tuple[Rates, dict[str, Any]]:
    """Return images/s of the references and of every execution, all experts running, and what the share is computed from."""
    with ExitStack() as stack:
        watches = start(stack, REFERENCES, options)
        work: dict[str, Any] = {"flop_per_image": watches[0].flop(), "matrix_flop_per_s": {}}
        for name, file in executions(options, header, folder):
            watches += start(stack, [name], options, file=file)
        matrix: dict[str, list[float]] = {name: [] for name in REFERENCES}
        rates: Rates = {watch.name: {batch: [] for batch in options.batch_sizes} for watch in watches}
        for _ in range(options.rounds):
            for name, watch in zip(REFERENCES, watches, strict=False):
                matrix[name].append(watch.matrix_rate(options.seconds))
            for name, by_batch in measure(watches, options.batch_sizes, options.seconds, 1, lambda name: None).items():
                for batch, values in by_batch.items():
                    rates[name][batch] += values
    work["matrix_flop_per_s"] = {name.removeprefix("reference-"): spread(values) for name, values in matrix.items()}
    return rates, work


def executions(options: argparse.Namespace, header: Header, folder: Path) -> Iterable[tuple[str, Path | None]]:
    """Yield the names of the executions to measure, each with the file that it is loaded from."""
    identity = Identity.here(header.weights_sha256, options.device)
    kept = tuned.default_folder()
    tuning = tuned.find(kept, identity)
    quantised = tuning.plans["int8"].executions if tuning and "int8" in tuning.plans else ()
    everything = [*available(options.device, header.architecture.num_experts), *quantised]
    for name in options.only.split(",") if options.only else everything:
        file = artefact(identity, name)
        if file and ExecutionName.parse(name).precision == "int8":
            yield name, kept / file
        elif file:
            try:
                Stopwatch.build(name, options.checkpoint, options.device, folder / file)
            except ExecutionFailedError as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                yield name, folder / file
        else:
            yield name, None


def start(
    stack: ExitStack, names: Sequence[str], options: argparse.Namespace, top_k: int | None = None, file: Path | None = None
) -> list[Stopwatch]:
    """Start executions; one that fails is said to and left out."""
    started = []
    for name in names:
        try:
            largest = max(options.batch_sizes)
            watch = Stopwatch(name, options.checkpoint, options.device, top_k, file=file, max_batch_size=largest)
            started.append(stack.enter_context(watch))
        except ExecutionFailedError as error:
            print(f"left out: {error}", file=sys.stderr)
    return started


def row(name: str, batch: int, rates: Rates, work: dict[str, Any]) -> dict[str, Any]:
    """Return an execution's figures at a batch size."""
    values = rates[name][batch]
    base = [max(both) for both in zip(*(rates[reference][batch] for reference in REFERENCES), strict=True)]
    found: dict[str, Any] = {**spread(values), "ratio": spread([v / b for v, b in zip(values, base, strict=True)])}
    yardstick = work["matrix_flop_per_s"].get(name.split("-")[1])
    if yardstick:  # there is none for int8
        found["share"] = work["flop_per_image"] * found["median"] / yardstick["median"]
    return found


def show(rows: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Print the figures."""
    for batch, by_name in rows.items():
        for name, figures in by_name.items():
            ratio = figures["ratio"]
            share = f"  {100 * figures['share']:3.0f} % of the matrix rate" if "share" in figures else ""
            print(
                f"batch {batch:3d}  {name:24s} {_figures(figures)}  "
                f"x{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}){share}"
            )


def top_k(options: argparse.Namespace, header: Header) -> dict[str, dict[int, dict[int, dict[str, float]]]]:
    """Measure what skips experts for each number of experts, in turns, and print it: images/s by name, ``k`` and batch size."""
    precision = "bfloat16" if native_bfloat16(options.device) else "float32"
    candidates = (f"loop-{precision}", f"openvino-{precision}-x1")
    known = available(options.device, header.architecture.num_experts, 1)
    found: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    for name in (name for name in candidates if name in known and options.top_k):
        with ExitStack() as stack:
            watches = [watch for k in options.top_k for watch in start(stack, [name], options, k)]
            rates: list[dict[int, list[float]]] = [{batch: [] for batch in options.batch_sizes} for _ in watches]
            for _ in range(options.rounds):
                for batch in options.batch_sizes:
                    for watch, by_batch in zip(watches, rates, strict=True):
                        by_batch[batch].append(watch.rate(batch, options.seconds))
        found[name] = {
            k: {batch: spread(values) for batch, values in by_batch.items()}
            for k, by_batch in zip(options.top_k, rates, strict=True)
        }
        for k, by_size in found[name].items():
            for batch, figures in by_size.items():
                print(f"batch {batch:3d}  {name:24s} {_figures(figures)}  of {k} experts")
    return found


def _figures(figures: dict[str, Any]) -> str:
    return f"{figures['median']:8.1f} images/s ({figures['min']:.1f}-{figures['max']:.1f})"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
