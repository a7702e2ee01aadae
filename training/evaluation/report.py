"""Evaluation: how often a checkpoint is right, clean and under attack, beside what it must beat, and whether to believe it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.checkpoint import Header, load_checkpoint, read_header, replace_metrics, resolve
from model.fast import fold_batch_norms
from model.mixture import Mixture
from training.attack import Attack, LogProbs
from training.data import Dataset, Split
from training.evaluation import autoattack, sanity
from training.evaluation.autoattack import Ensemble, Journal
from training.evaluation.certified import SURROGATE, certified_accuracy
from training.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from training.evaluation.examination import Examination, Remember, forget
from training.evaluation.levels import EPSILON, QUICK, STANDARD
from training.evaluation.networks import networks, others
from training.evaluation.outputs import write
from training.evaluation.request import Request
from training.evaluation.sanity import MaskedGradientsError, failed
from training.evaluation.significance import Correct, interval, paired_tests
from training.evaluation.table import suspicion, table
from training.measure import Bench, exact_float32
from training.partition import held_out

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
    request: Request | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, print the table and write what was asked for.

    Every network is attacked through itself in float32: the mixture through gate and experts, the uniform average through all
    experts, each expert and every checkpoint that it is compared with alone.

    Args:
        checkpoint: A path or the name of an embedded checkpoint.
        dataset: The data; its classes must be the checkpoint's.
        device: Where to run.
        n: Test images, a fixed random subset; 0 means all.
        seed: Seed of the subset and of the attacks' starting noise.
        stamp: Also write the figures into the checkpoint's header.
        request: How thoroughly to measure, and where to write; by default level ``quick``, and nowhere.

    Returns:
        The figures, as written to ``evaluation.json``.

    Raises:
        ValueError: Data and checkpoint do not fit, or there are fewer images than asked for.
        MaskedGradientsError: A sanity check failed. Everything has been written by then.
    """
    request = request or Request()
    header, *headers = [_fitting(each, dataset) for each in (checkpoint, *request.compare)]
    against = others(request.compare, device)
    bench = Bench(_subset(dataset.test, n, seed), device, seed)
    ensemble = Ensemble(request.ensemble, EPSILON)
    journal = _make_folder(request, ensemble, bench, header, dataset)
    # The same function but for rounding, with fewer passes over memory in every step of an attack.
    mixture = fold_batch_norms(load_checkpoint(checkpoint, device)).to(memory_format=torch.channels_last)
    exact_float32()
    results = _measure(mixture, against, header, dataset, bench, request, journal)
    after = autoattack.run(mixture, bench, ensemble, journal) if journal else {}
    results["compared"] = {name: _told(other) for name, other in zip(against, headers, strict=True)}
    if after:
        results["autoattack"] = autoattack.to_json(after, ensemble)
    if "square" in after:
        results["sanity"] = [*results.get("sanity", []), sanity.square_after_ensemble(after).to_json()]
    if request.corruptions:
        results["corruptions"] = _corruptions(mixture, bench)
    write(results, request, mixture, bench)
    if stamp:
        _stamp(checkpoint, results)
    print(table(results))
    if failed(results.get("sanity", [])):
        raise MaskedGradientsError(suspicion(results))
    return results


def _measure(
    mixture: Mixture,
    against: dict[str, LogProbs],
    header: Header,
    dataset: Dataset,
    bench: Bench,
    request: Request,
    journal: Journal | None,
) -> dict[str, Any]:
    """Return the figures of the level that was asked for, but for what level ``full`` adds."""
    compared = {**networks(mixture), **against}
    best = _best_expert(header, dataset, compared, bench.device, bench.seed)
    remember = _remembered(journal, request, against) if journal else forget
    correct: Correct = {
        name: {attack: remember(f"{name}, {what}", partial(bench.correct, network, what)) for attack, what in QUICK.items()}
        for name, network in tqdm(compared.items(), desc="evaluate", unit="network", dynamic_ncols=True)
    }
    rivals = ["uniform average", *([best] if best else []), *against]
    examination = Examination(mixture, compared, rivals, bench, correct, remember)
    more = {} if request.level == "quick" else examination.run()  # fills correct
    record = _record(header, dataset, bench, request, correct, best)
    return {**record, "paired_tests": paired_tests(correct, rivals), **more, **_certified(header, mixture, bench)}


def _remembered(journal: Journal, request: Request, against: dict[str, LogProbs]) -> Remember:
    """Return what looks things up in the journal: other checkpoints' by their weights, as another may take a file's place."""
    headers = dict(zip(against, map(read_header, request.compare), strict=True))

    def remember(what: str, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
        whose = [header for name, header in headers.items() if what.startswith(f"{name}, ")]
        return journal.remember(" ".join([*(f"{each.weights_sha256} {each.top_k}" for each in whose), what]), measure)

    return remember


def _stamp(checkpoint: str | Path, results: dict[str, Any]) -> None:
    """Write the figures into the header, unless other weights have taken the file's place meanwhile."""
    if read_header(checkpoint).weights_sha256 != results["checkpoint_sha256"]:
        raise ValueError(f"{checkpoint} was replaced while it was measured: its header is left as it is")
    replace_metrics(resolve(checkpoint), results)


def _make_folder(request: Request, ensemble: Ensemble, bench: Bench, header: Header, dataset: Dataset) -> Journal | None:
    """Make the folder that is written to, and open the record of level ``full`` in it; refuse one of another evaluation."""
    if request.level == "full":
        autoattack.check_classes(ensemble.attacks, header.architecture.num_classes)
    if request.folder is None:
        return None
    request.folder.mkdir(exist_ok=True)
    if request.level != "full":
        return None
    return autoattack.open_journal(request.folder, ensemble, bench, header, dataset.test_digest)


def _record(
    header: Header, dataset: Dataset, bench: Bench, request: Request, correct: Correct, best: str | None
) -> dict[str, Any]:
    """Return the figures with everything that says how they were measured."""
    attacks: dict[str, Attack | None] = QUICK if request.level == "quick" else {**QUICK, **STANDARD}
    return {
        "level": request.level,
        "checkpoint_sha256": header.weights_sha256,
        "data": {"name": dataset.name, "test_sha256": dataset.test_digest},
        "class_names": list(header.class_names),
        "n": len(bench),
        "seed": bench.seed,
        "precision": "float32",
        "top_k": header.top_k,
        "attacks": {name: asdict(attack) if attack else {} for name, attack in attacks.items()},
        "accuracy": {name: {a: interval(right) for a, right in row.items()} for name, row in correct.items()},
        "best_single_expert": best and {"name": best, "chosen_on": f"{_selected(header)} held-out training images, PGD-10"},
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "device": _device_name(bench.device)},
    }


def _certified(header: Header, mixture: Mixture, bench: Bench) -> dict[str, Any]:
    """Return what is to be said of a vote: how it was attacked, and how accurate it is whatever some poison was."""
    found: dict[str, Any] = {"surrogate": SURROGATE} if header.architecture.votes else {}
    return {**found, "certified": certified_accuracy(mixture, bench)} if header.is_certified else found


def _told(header: Header) -> dict[str, Any]:
    """Return what is to be said of another checkpoint."""
    return {"sha256": header.weights_sha256, "votes": header.architecture.votes}


def _corruptions(mixture: Mixture, bench: Bench) -> dict[str, Any]:
    """Return the mixture's accuracy under common corruptions, in percent, by name and severity, and the mean over all."""
    names: dict[str, list[float]] = {}
    for name in tqdm(CORRUPTIONS, desc="corruptions", unit="corruption", dynamic_ncols=True):
        right = [
            bench.judge(mixture, corrupt(bench.split.images, name, severity, bench.seed).float() / 255)
            for severity in range(1, SEVERITIES + 1)
        ]
        names[name] = [interval(row)["percent"] for row in right]
    cells = [percent for row in names.values() for percent in row]
    return {"names": names, "mean": round(sum(cells) / len(cells), 2), "n": len(bench)}


def _best_expert(
    header: Header, dataset: Dataset, compared: dict[str, LogProbs], device: torch.device, seed: int
) -> str | None:
    """Choose the single expert to compare with on training images that training has not seen; ``None`` on other data."""
    size, parts = header.data.get("held_out_training_images"), header.architecture.num_experts if header.is_certified else 1
    if not dataset.trained(header.data) or not isinstance(size, int):
        print("these are not the checkpoint's training data: no single expert can be chosen on held-out images of theirs")
        return None
    bench = Bench(held_out(dataset, size, parts), device, seed).first(SELECTION_IMAGES)
    experts = tqdm([n for n in compared if n.startswith("expert")], desc="choose single expert", dynamic_ncols=True)
    robust: dict[str, float] = {name: bench.correct(compared[name], QUICK["PGD-10"]).sum().item() for name in experts}
    return max(robust, key=robust.__getitem__)


def _selected(header: Header) -> int:
    return min(SELECTION_IMAGES, int(header.data["held_out_training_images"]))


def _subset(split: Split, n: int, seed: int) -> Split:
    if n < 0 or n > len(split):
        raise ValueError(f"--n {n}: there are {len(split)} test images")
    if n in (0, len(split)):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.take(order[:n])


def _fitting(checkpoint: str | Path, dataset: Dataset) -> Header:
    """Return a checkpoint's header; refuse one of other classes or another size."""
    header = read_header(checkpoint)
    if header.class_names != dataset.label_names:
        raise ValueError(f"{checkpoint}: the checkpoint knows the classes {header.class_names}, the data {dataset.label_names}")
    wanted = (header.architecture.height, header.architecture.input_width)
    if tuple(dataset.test.images.shape[2:]) != wanted:
        raise ValueError(
            f"{checkpoint}: the checkpoint takes {wanted} images, the data have {tuple(dataset.test.images.shape[2:])}"
        )
    return header


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
