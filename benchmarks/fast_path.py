"""How much faster the fast path is than the reference, at batch 1, 8 and 64.

    python -m benchmarks.fast_path [--checkpoint compact] [--rounds 7]

Reference, fast float32 and fast bfloat16 take turns in one process; figures are images/s, the minimum, median and maximum over
the rounds, and the ratio to the reference is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from benchmarks.hardware import describe, spread
from model.checkpoint import load_checkpoint
from model.fast import FastMixture

SECONDS_PER_ROUND = 1.0


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    reference = load_checkpoint(options.checkpoint)
    paths: dict[str, Callable[[torch.Tensor], object]] = {
        "reference float32": torch.inference_mode()(reference),
        "fast float32": FastMixture(reference, torch.float32).predict,
        "fast bfloat16": FastMixture(reference, torch.bfloat16).predict,
    }
    results = {}
    for batch in (1, 8, 64):
        images = torch.rand(batch, 3, reference.architecture.height, reference.architecture.input_width)
        rates: dict[str, list[float]] = {name: [] for name in paths}
        for path in paths.values():
            path(images)
        for _ in range(options.rounds):
            for name, path in paths.items():
                rates[name].append(rate(path, images))
        base = rates["reference float32"]
        results[batch] = {
            name: {**spread(values), "ratio": spread([v / b for v, b in zip(values, base, strict=True)])["median"]}
            for name, values in rates.items()
        }
        for name, row in results[batch].items():
            shown = f"{row['median']:8.1f} images/s ({row['min']:.1f}-{row['max']:.1f})  x{row['ratio']:.2f}"
            print(f"batch {batch:3d}  {name:18s} {shown}")
    print(json.dumps({"benchmark": "fast_path", "rounds": options.rounds, "hardware": describe(), "images_per_s": results}))


def rate(path: Callable[[torch.Tensor], object], images: torch.Tensor) -> float:
    """Return images/s over about a second."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS_PER_ROUND:
        path(images)
        count += len(images)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
