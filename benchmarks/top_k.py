"""What running fewer experts per image gains in speed and costs in accuracy, on training images that training held out.

    python -m benchmarks.top_k --data data/cifar10.npz [--n 500] [--seconds 2] [--rounds 3]

Accuracy: clean and PGD-10 (epsilon 8/255, steps of 2/255, one random start), in float32 on the log-probabilities of the mixture
with that many experts; with fewer than all, the attack climbs through the experts that are chosen at each step. Speed: the
execution that serves it, at batch 1, 8 and 64 of random pixels, which the gate sends to few experts; each in its own process,
in turn; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.hardware import describe, spread
from model.checkpoint import load_checkpoint, read_header
from model.fast import fold_batch_norms
from model.plan import default_plan
from service.stopwatch import Stopwatch
from training.attack import Attack
from training.evaluation.levels import EPSILON, STEP
from training.evaluation.significance import interval
from training.loading import load_dataset
from training.measure import Bench
from training.replay import held_out

BATCHES = (1, 8, 64)


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    experts = read_header(options.checkpoint).architecture.num_experts
    rows: dict[int, dict[str, object]] = {k: {} for k in (1, 2, 3, experts) if k <= experts}
    for k, speeds in speed(options.checkpoint, list(rows), options.seconds, options.rounds).items():
        rows[k]["images_per_s"] = speeds
    for k, accuracies in accuracy(options.checkpoint, options.data, list(rows), options.n).items():
        rows[k] |= accuracies
    for k, row in rows.items():
        print(f"{k} experts  {row}")
    how = {"n": options.n, "seed": 0, "rounds": options.rounds, "hardware": describe()}
    print(json.dumps({"benchmark": "top_k", **how, "experts": rows}))


def speed(checkpoint: str, ks: list[int], seconds: float, rounds: int) -> dict[int, dict[int, dict[str, float]]]:
    """Return images/s by number of experts and batch size."""
    architecture = read_header(checkpoint).architecture
    rates: dict[int, dict[int, list[float]]] = {k: {batch: [] for batch in BATCHES} for k in ks}
    for _ in range(rounds):
        for k in ks:
            for batch in BATCHES:
                name = default_plan(architecture, "cpu", top_k=k).pick(batch)
                with Stopwatch(name, checkpoint, "cpu", None if k == architecture.num_experts else k) as watch:
                    rates[k][batch].append(watch.rate(batch, seconds))
    return {k: {batch: spread(values) for batch, values in row.items()} for k, row in rates.items()}


def accuracy(checkpoint: str, data: str, ks: list[int], n: int) -> dict[int, dict[str, object]]:
    """Return clean and PGD-10 accuracy by number of experts; 95 % intervals."""
    split = held_out(read_header(checkpoint), load_dataset(data), checkpoint)
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:n]
    bench = Bench(split.take(chosen), torch.device("cpu"))
    mixture = fold_batch_norms(load_checkpoint(checkpoint)).to(memory_format=torch.channels_last)
    result: dict[int, dict[str, object]] = {}
    for k in ks:
        mixture.top_k = k
        result[k] = {
            "clean": interval(bench.correct(mixture, None)),
            "PGD-10": interval(bench.correct(mixture, Attack.pgd(EPSILON, 10, STEP))),
        }
    return result


if __name__ == "__main__":
    main()
