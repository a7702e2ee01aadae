"""Evaluation: how often a checkpoint is right, clean and under white-box attack, beside what it must beat."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from tqdm import tqdm

from model.checkpoint import Header, load_checkpoint, read_header, replace_metrics, resolve
from model.fast import fold_batch_norms
from model.mixture import Mixture, mix
from training.attack import Attack, LogProbs
from training.data import Dataset, Split
from training.measure import correct_under
from training.plots import plot_evaluation

EPSILON = 8 / 255
ATTACKS: dict[str, Attack | None] = {
    "clean": None,
    "FGSM": Attack.fgsm(EPSILON),
    "PGD-10": Attack.pgd(EPSILON, 10, 2 / 255),
}
SELECTION_IMAGES = 500
"""Held-out training images on which the best single expert is chosen."""


def evaluate_checkpoint(
    checkpoint: str | Path,
    dataset: Dataset,
    device: torch.device,
    n: int = 0,
    seed: int = 0,
    *,
    stamp: bool = False,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint and print the table.

    Every network is attacked through itself in float32: the mixture through gate and experts, the uniform average through all
    experts, each expert alone.

    Args:
        checkpoint: A path or the name of an embedded checkpoint.
        dataset: The data; its classes must be the checkpoint's.
        device: Where to run.
        n: Test images, a fixed random subset; 0 means all.
        seed: Seed of the subset and of the attacks' starting noise.
        stamp: Also write the figures into the checkpoint's header.
        json_path: Where to write the figures.
        plot_path: Where to draw them.

    Returns:
        The figures, as written to ``json_path``.

    Raises:
        ValueError: Data and checkpoint do not fit.
    """
    header = read_header(checkpoint)
    # The same function but for rounding, with fewer passes over memory in every step of an attack.
    mixture = fold_batch_norms(load_checkpoint(checkpoint, device)).to(memory_format=torch.channels_last)
    _check_fit(header, dataset)
    torch.backends.cudnn.allow_tf32 = False  # attacks in float32, also on a GPU
    test = _subset(dataset.test, n, seed)
    networks = _networks(mixture)
    best = _best_expert(header, dataset, networks, device, seed)
    correct = {
        name: {attack: correct_under(network, test, what, device, seed) for attack, what in ATTACKS.items()}
        for name, network in tqdm(networks.items(), desc="evaluate", unit="network", dynamic_ncols=True)
    }
    results = _record(header, dataset, len(test), seed, correct, best, device)
    print(table(results))
    if stamp:
        replace_metrics(resolve(checkpoint), results)
    _write(results, json_path, plot_path)
    return results


def _write(results: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> None:
    if json_path:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    if plot_path:
        plot_evaluation(results, plot_path)


def _record(
    header: Header,
    dataset: Dataset,
    n: int,
    seed: int,
    correct: dict[str, dict[str, torch.Tensor]],
    best: str | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return the figures with everything that says how they were measured."""
    return {
        "checkpoint_sha256": header.weights_sha256,
        "data": {"name": dataset.name, "test_sha256": dataset.test_digest},
        "n": n,
        "seed": seed,
        "precision": "float32",
        "top_k": header.top_k,
        "attacks": {name: _describe(attack) for name, attack in ATTACKS.items()},
        "accuracy": {name: {a: _interval(c) for a, c in row.items()} for name, row in correct.items()},
        "best_single_expert": best and {"name": best, "chosen_on": f"{SELECTION_IMAGES} held-out training images, PGD-10"},
        "paired_tests": _paired_tests(correct, best),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "device": _device_name(device)},
    }


def table(results: dict[str, Any]) -> str:
    """Return the figures as a Markdown table with a line on how they were measured."""
    attacks = list(results["attacks"])
    best = (results["best_single_expert"] or {}).get("name")
    lines = [f"| network | {' | '.join(attacks)} |", f"|---|{'---|' * len(attacks)}"]
    for name, row in results["accuracy"].items():
        cells = [f"{row[a]['percent']:.1f} ({row[a]['low']:.1f}-{row[a]['high']:.1f})" for a in attacks]
        mark = " (best on held-out)" if name == best else ""
        lines.append(f"| {name}{mark} | {' | '.join(cells)} |")
    lines.append("")
    lines += [
        f"mixture against {test['against']}, {test['attack']}: right alone {test['only_mixture']} to {test['only_other']}, "
        f"difference {test['difference_points']:+.1f} points, exact McNemar p = {test['p']:.2g}"
        for test in results["paired_tests"]
    ]
    lines.append(
        f"Accuracy in % with 95 % Wilson intervals; n = {results['n']} {results['data']['name']} test images, "
        f"seed {results['seed']}, epsilon 8/255, PGD step 2/255 with random start, "
        f"attacks in {results['precision']} on the network's own log-probabilities."
    )
    return "\n".join(lines)


def _networks(mixture: Mixture) -> dict[str, LogProbs]:
    experts = mixture.architecture.num_experts

    def uniform(images: torch.Tensor) -> torch.Tensor:
        gate, log_probs = mixture.components(images)
        return mix(torch.full_like(gate, -math.log(experts)), log_probs)

    def alone(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: mixture.experts[index](mixture.normalise(images)).log_softmax(dim=1)

    networks: dict[str, LogProbs] = {"mixture": mixture, "uniform average": uniform}
    return networks | {f"expert {index}": alone(index) for index in range(experts)}


def _best_expert(
    header: Header, dataset: Dataset, networks: dict[str, LogProbs], device: torch.device, seed: int
) -> str | None:
    """Choose the single expert to compare with on training images that training has not seen; ``None`` on other data."""
    held_out = header.data.get("held_out_training_images")
    if header.data.get("training_sha256") != dataset.digest or not isinstance(held_out, int):
        print("these are not the checkpoint's training data: no single expert can be chosen on held-out images of theirs")
        return None
    _, holdout = dataset.split_holdout(held_out)
    part = holdout.take(slice(SELECTION_IMAGES))
    experts = tqdm([n for n in networks if n.startswith("expert")], desc="choose single expert", dynamic_ncols=True)
    robust: dict[str, float] = {
        name: correct_under(networks[name], part, ATTACKS["PGD-10"], device, seed).sum().item() for name in experts
    }
    return max(robust, key=robust.__getitem__)


def _paired_tests(correct: dict[str, dict[str, torch.Tensor]], best: str | None) -> list[dict[str, Any]]:
    tests = []
    for other in ("uniform average", *([best] if best else [])):
        for attack in ("clean", "PGD-10"):
            ours, theirs = correct["mixture"][attack], correct[other][attack]
            only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            discordant = only_ours + only_theirs
            p = binomtest(only_ours, discordant).pvalue if discordant else 1.0
            tests.append(
                {
                    "against": other,
                    "attack": attack,
                    "only_mixture": only_ours,
                    "only_other": only_theirs,
                    "difference_points": 100 * (only_ours - only_theirs) / len(ours),
                    "p": float(p),
                }
            )
    return tests


def _interval(correct: torch.Tensor) -> dict[str, float]:
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    percent = 100 * correct.float().mean().item()
    return {"percent": round(percent, 2), "low": round(100 * interval.low, 2), "high": round(100 * interval.high, 2)}


def _subset(split: Split, n: int, seed: int) -> Split:
    if n < 0 or n > len(split):
        raise ValueError(f"--n {n}: there are {len(split)} test images")
    if n in (0, len(split)):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[:n])


def _check_fit(header: Header, dataset: Dataset) -> None:
    if header.class_names != dataset.label_names:
        raise ValueError(f"the checkpoint knows the classes {header.class_names}, the data {dataset.label_names}")
    wanted = (header.architecture.height, header.architecture.input_width)
    if tuple(dataset.test.images.shape[2:]) != wanted:
        raise ValueError(f"the checkpoint takes {wanted} images, the data have {tuple(dataset.test.images.shape[2:])}")


def _describe(attack: Attack | None) -> dict[str, Any]:
    return {} if attack is None else {**asdict(attack), "restarts": 1}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
