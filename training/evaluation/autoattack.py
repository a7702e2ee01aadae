"""AutoAttack, image by image and resumable.

Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks".
The attacks are the authors' code (package ``pyautoattack``) with the settings of their version ``standard``, run one after
another on the images that are still right; only the loop over batches is ours, so that a killed run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack  # type: ignore[import-untyped]
from tqdm import tqdm

from model.checkpoint import Header
from training.attack import LogProbs
from training.evaluation.significance import interval
from training.measure import Bench

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
NAMES = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}
QUERIES = 5000
"""Square's forward passes per image."""
TARGETS = 9
"""Wrong classes that the targeted attacks try, the likeliest first."""
SLACK = 1e-5
"""Rounding by which a perturbation may be longer than epsilon."""


def parse_attacks(text: str) -> tuple[str, ...]:
    """Return the attacks of a list like ``apgd-ce,apgd-t``, in the order in which they run.

    Raises:
        ValueError: One is unknown, or the list is empty.
    """
    named = {part.strip() for part in text.split(",")}
    unknown = sorted(named - set(ATTACKS))
    if unknown:
        raise ValueError(f"--attacks {text}: no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    return tuple(attack for attack in ATTACKS if attack in named)


def check_classes(attacks: tuple[str, ...], num_classes: int) -> None:
    """Raise ``ValueError`` if APGD-T's loss, which compares four classes, can't be computed."""
    if "apgd-t" in attacks and num_classes < 4:
        others = ",".join(attack for attack in ATTACKS if attack != "apgd-t")
        raise ValueError(f"APGD-T needs at least 4 classes, the checkpoint has {num_classes}: leave it out, --attacks {others}")


def describe(attacks: tuple[str, ...]) -> str:
    """Return what the ensemble may be called: AutoAttack only if it is all of it."""
    return "AutoAttack" if attacks == ATTACKS else " + ".join(NAMES[attack] for attack in attacks)


@dataclass(frozen=True)
class Ensemble:
    """Which attacks run, and how.

    Attributes:
        attacks: Some of :data:`ATTACKS`, in their order.
        epsilon: Radius, in ``[0, 1]`` pixel units.
        queries: Square's forward passes per image.
    """

    attacks: tuple[str, ...]
    epsilon: float
    queries: int = QUERIES


class Journal:
    """What level ``full`` has finished, a line of JSON for each batch or row, so that a killed run can go on.

    Args:
        path: The file; made if there is none.
        key: What the results depend on.

    Raises:
        ValueError: The file belongs to a run with another key, or is damaged.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self._path = path
        self._done: dict[tuple[str, tuple[int, ...]], list[bool]] = {}
        lines = self._complete_lines()
        if not lines:
            self._append({"key": key})
            return
        try:
            first, *records = [json.loads(line) for line in lines]
            found = first["key"]
            for record in records:
                self._done[record["attack"], tuple(record["images"])] = record["right"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it to start again") from error
        names = [name for name in key if not isinstance(found, dict) or found.get(name) != key[name]]
        if names:
            raise ValueError(
                f"{path} belongs to another evaluation ({', '.join(names)} differ): choose another --out, or delete it"
            )

    def find(self, attack: str, images: list[int]) -> list[bool] | None:
        """Return which of a batch's images were right after an attack; ``None`` if it has not run on this batch."""
        return self._done.get((attack, tuple(images)))

    def add(self, attack: str, images: list[int], right: list[bool]) -> None:
        """Note which of a batch's images are right after an attack."""
        self._append({"attack": attack, "images": images, "right": right})

    def remember(self, what: str, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return ``(N,)`` booleans of all images: those that were noted under this name, or what is measured and noted now."""
        for (name, _), right in self._done.items():
            if name == what:
                return torch.tensor(right)
        found = measure()
        self.add(what, list(range(len(found))), found.tolist())
        return found

    def _complete_lines(self) -> list[bytes]:
        """Return the lines that were written to their end, and cut off one that a kill left half-written."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(self._path, sum(map(len, lines[:-1])))
            lines.pop()
        return lines

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def open_journal(folder: Path, ensemble: Ensemble, bench: Bench, header: Header, test_sha256: str) -> Journal:
    """Open ``autoattack.jsonl`` in a folder for a run on these images, or refuse one that belongs to another run."""
    key = {
        "checkpoint_sha256": header.weights_sha256,
        "architecture": json.loads(json.dumps(header.architecture.to_json())),
        "top_k": header.top_k,
        "test_sha256": test_sha256,
        "n": len(bench),
        "seed": bench.seed,
        "batch_size": bench.batch_size,
        "epsilon": ensemble.epsilon,
        "queries": ensemble.queries,
        "pyautoattack": version("pyautoattack"),
    }
    return Journal(folder / "autoattack.jsonl", key)


def run(network: LogProbs, bench: Bench, ensemble: Ensemble, journal: Journal) -> dict[str, torch.Tensor]:
    """Attack every image that is still right, one attack after another.

    Returns:
        In order, ``clean`` and every attack, each with ``(N,)`` booleans: which images were right after it and all before it.
    """
    right = torch.ones(len(bench), dtype=torch.bool)
    after = {}
    for attack in ("clean", *ensemble.attacks):
        rows = right.nonzero().squeeze(1)
        batches = rows.split(bench.batch_size) if len(rows) else ()
        for batch in tqdm(batches, desc=attack, unit="batch", dynamic_ncols=True):
            images = batch.tolist()
            known = journal.find(attack, images)
            if known is None:
                known = _run_batch(attack, network, bench, batch, ensemble)
                journal.add(attack, images, known)
            right[batch] = torch.tensor(known)
        after[attack] = right.clone()
    return after


def _run_batch(attack: str, network: LogProbs, bench: Bench, rows: torch.Tensor, ensemble: Ensemble) -> list[bool]:
    images, labels = next(Bench(bench.split.take(rows), bench.device, batch_size=len(rows)).batches())
    right: list[bool] = right_after(attack, network, images, labels, ensemble.epsilon, bench.seed, ensemble.queries).tolist()
    return right


@torch.no_grad()
def right_after(
    attack: str,
    network: LogProbs,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    seed: int,
    queries: int = QUERIES,
) -> torch.Tensor:
    """Return ``(B,)`` booleans: which images are right after one attack.

    Args:
        attack: One of :data:`ATTACKS`, or ``clean`` for none.
        network: Images ``(B, 3, H, W)`` in ``[0, 1]`` to logits or log-probabilities ``(B, C)``.
        images: ``(B, 3, H, W)``, float32 in ``[0, 1]``.
        labels: ``(B,)``, the true classes.
        epsilon: Radius, in ``[0, 1]`` pixel units.
        seed: Seed of the attack; the global random state is left as it was.
        queries: Square's forward passes per image.
    """

    def channels_last(inputs: torch.Tensor) -> torch.Tensor:
        return network(inputs.contiguous(memory_format=torch.channels_last))

    if attack == "clean":
        return network(images).argmax(dim=1) == labels
    images = images.contiguous()  # the package flattens with view()
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        adversarial = _crafted(attack, channels_last, images, labels, epsilon, seed, queries)
    outside = ((adversarial - images).abs() > epsilon + SLACK) | (adversarial < 0) | (adversarial > 1)
    right = channels_last(adversarial).argmax(dim=1) == labels
    return right | outside.flatten(1).any(dim=1)


def _crafted(
    attack: str,
    network: LogProbs,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    seed: int,
    queries: int,
) -> torch.Tensor:
    """Run one of the package's attacks as its ``run_standard_evaluation`` does."""
    package = AutoAttack(network, eps=epsilon, seed=seed, device=images.device)
    targets = min(TARGETS, network(images[:1]).shape[1] - 1)
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = targets
    package.fab.targeted = True
    package.square.n_queries = queries
    runs = {
        "apgd-ce": package.apgd,
        "apgd-t": package.apgd_targeted,
        "fab-t": package.fab,
        "square": package.square,
    }
    adversarial: torch.Tensor = runs[attack].perturb(images, labels)
    return adversarial


def to_json(after: dict[str, torch.Tensor], ensemble: Ensemble) -> dict[str, Any]:
    """Return how many images each attack left right, with Wilson intervals, and what the ensemble may be called."""
    return {
        "name": describe(ensemble.attacks),
        "epsilon": ensemble.epsilon,
        "queries": ensemble.queries,
        "pyautoattack": version("pyautoattack"),
        "attacks": [
            {"name": NAMES[attack], "robust_after": int(after[attack].sum()), **interval(after[attack])}
            for attack in ensemble.attacks
        ],
        "n": len(after["clean"]),
    }
