"""Does our PGD break as many images as somebody else's? The Adversarial Robustness Toolbox (ART), on the same images.

    python -m benchmarks.cross_check [--checkpoint compact] [--data data/cifar10.npz] [--n 1000] [--steps 10]

Both attack the same network in float32 with epsilon 8/255 and steps of 2/255, once from the images themselves, where both must
find the same, and once from random points in the ball, which differ. Printed: both accuracies, in percent.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn

from benchmarks.hardware import describe
from model.checkpoint import load_checkpoint, read_header
from training.attack import Attack
from training.evaluation.levels import EPSILON, STEP
from training.loading import load_dataset
from training.measure import BATCH, Bench, exact_float32


def main() -> None:
    """Measure, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--data", default=os.environ.get("PALISADE_DATA"), help="default: $PALISADE_DATA")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    exact_float32()
    if options.data is None:
        raise SystemExit("set PALISADE_DATA, or --data, to a CIFAR-10 .npz file (docs/training.md)")
    test = load_dataset(options.data).test.take(slice(options.n))
    bench = Bench(test, torch.device(options.device))
    result = compare(load_checkpoint(options.checkpoint, options.device), bench, options.steps)
    for start in ("image", "random"):
        print(f"{start} start: ours {result[start]['ours']:.2f} %, ART {result[start]['art']:.2f} %")
    settings = {
        "checkpoint_sha256": read_header(options.checkpoint).weights_sha256,
        "n": len(test),
        "steps": options.steps,
        "art": version("adversarial-robustness-toolbox"),
    }
    print(json.dumps({"benchmark": "cross_check", "hardware": describe(), **settings, **result}))


def compare(network: nn.Module, bench: Bench, steps: int) -> dict[str, dict[str, float]]:
    """Return both implementations' accuracies in percent, by where the attack starts: at the ``image``, or at ``random``."""
    accuracies = {}
    for start, noise in (("image", 0.0), ("random", EPSILON)):
        ours = bench.correct(network, Attack(EPSILON, steps, STEP, noise=noise))
        theirs = bench.judge(network, attacked_by_art(network, bench, steps, random_start=noise > 0))
        accuracies[start] = {"ours": _percent(ours), "art": _percent(theirs)}
    return accuracies


def attacked_by_art(network: nn.Module, bench: Bench, steps: int, random_start: bool) -> torch.Tensor:
    """Return the images after ART's PGD, ``(N, 3, H, W)`` float32 in ``[0, 1]``."""
    split = bench.split
    classifier = PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(split.images.shape[1:]),
        nb_classes=network(split.images[:1].to(bench.device) / 255).shape[1],
        clip_values=(0.0, 1.0),
        device_type="gpu" if bench.device.type == "cuda" else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=EPSILON,
        eps_step=STEP,
        max_iter=steps,
        num_random_init=int(random_start),
        batch_size=BATCH,
        verbose=False,
    )
    np.random.seed(bench.seed)  # ART draws from the global generator
    images = (split.images.float() / 255).contiguous()
    return torch.from_numpy(attack.generate(images.numpy(), split.labels.numpy()))


def _percent(right: torch.Tensor) -> float:
    return round(100 * right.float().mean().item(), 2)


if __name__ == "__main__":
    main()
