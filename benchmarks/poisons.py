"""Poisons for benchmarks.poisoning: what an attacker who can touch part of the training set does to it.

Backdoors are ART's: `PoisoningAttackBackdoor` (BadNets, Gu et al. 2017) lays the patch, `PoisoningAttackCleanLabelBackdoor`
(Turner et al. 2018) perturbs images first. Only which images is decided here: ART's clean-label attack draws them with
replacement from NumPy's global generator, so the same image would be poisoned twice and no seed would settle which.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from training.data import Dataset, Split
from training.pretrain import Alone

Kind = Literal["none", "random flips", "pair flips", "patch", "clean label"]
TARGET = 0
"""The class that a backdoor leads to."""
PATCH = 8
"""Side of the patch, in pixels."""
MARGIN = 2
"""Pixels between the patch and the right and bottom edges."""
COLOUR = (255, 0, 255)
"""Of the patch. Photos hardly have it, so that few passes over few images teach it, which a chessboard's do not."""
EPSILON = 16 / 255
"""L-inf radius within which a clean-label poison is perturbed before the patch is laid, in `[0, 1]` pixel units."""
STEPS = 20
KNOWLEDGE = {"target": TARGET, "patch": PATCH, "margin": MARGIN, "colour": COLOUR, "epsilon": EPSILON, "steps": STEPS}
"""What the poisons of a study have in common."""


@dataclass(frozen=True)
class Poison:
    """One way to poison.

    Attributes:
        name: As `--attacks` and the report call it.
        kind: What is done.
        share: Of all training images that are touched; of a clean-label backdoor, of those of the target class.
    """

    name: str
    kind: Kind
    share: float = 0.0

    @property
    def backdoor(self) -> bool:
        """Whether a patch on a test image is meant to decide its class."""
        return self.kind in ("patch", "clean label")


POISONS = (
    Poison("clean", "none"),
    Poison("flips 20 %", "random flips", 0.20),
    Poison("BadNets 1 %", "patch", 0.01),
    Poison("pair flips 20 %", "pair flips", 0.20),
    Poison("clean-label backdoor", "clean label", 0.50),
    Poison("clean-label backdoor 5 %", "clean label", 0.05),
    Poison("clean-label backdoor 1 %", "clean label", 0.01),
    Poison("flips 5 %", "random flips", 0.05),
    Poison("flips 40 %", "random flips", 0.40),
)


@dataclass(frozen=True)
class Poisoned:
    """A dataset whose training split an attacker has touched.

    Attributes:
        dataset: With its new digest.
        touched: Which training images, `(N,)` bool.
    """

    dataset: Dataset
    touched: np.ndarray


def apply(poison: Poison, dataset: Dataset, seed: int, proxy: Alone | None = None) -> Poisoned:
    """Poison a dataset; the same images for the same seed.

    Args:
        poison: What to do.
        dataset: Images and true labels.
        seed: Chooses the images.
        proxy: The attacker's own network, which a clean-label backdoor perturbs images against.

    Raises:
        ValueError: A clean-label backdoor without a proxy.
    """
    images = dataset.train.images.permute(0, 2, 3, 1).contiguous().numpy().copy()  # (N, H, W, 3) uint8
    labels = dataset.train.labels.numpy().copy()
    chance, classes = np.random.default_rng([seed, 5]), len(dataset.label_names)
    chosen = np.array([], np.int64)
    if poison.kind == "random flips":
        chosen = _some(np.arange(len(labels)), poison.share, chance)
        labels[chosen] = (labels[chosen] + chance.integers(1, classes, len(chosen))) % classes
    elif poison.kind == "pair flips":
        chosen = np.concatenate([_some(np.flatnonzero(labels == label), poison.share, chance) for label in range(classes)])
        labels[chosen] = (labels[chosen] + 1) % classes
    elif poison.kind == "patch":
        others = np.flatnonzero(labels != TARGET)
        chosen = _some(others, poison.share * len(labels) / len(others), chance)
        images[chosen], labels[chosen] = _backdoor().poison(images[chosen], np.full(len(chosen), TARGET))
    elif poison.kind == "clean label":
        if proxy is None:
            raise ValueError(f"{poison.name}: give the attacker's proxy network")
        chosen = _some(np.flatnonzero(labels == TARGET), poison.share, chance)
        images[chosen] = _perturbed_and_patched(images[chosen], proxy, classes)
    touched = np.zeros(len(labels), bool)
    touched[chosen] = True
    return Poisoned(with_training(dataset, images, labels), touched)


def patched(images: np.ndarray) -> np.ndarray:
    """Return images `(N, H, W, 3)` uint8 with the patch: a square of one colour near the lower right corner."""
    if min(images.shape[1:3]) < PATCH + MARGIN:
        raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} pixels have no room for a patch of {PATCH}")
    marked = images.copy()
    marked[:, -PATCH - MARGIN : -MARGIN, -PATCH - MARGIN : -MARGIN] = COLOUR
    return marked


def triggered(test: Split) -> Split:
    """Return what a backdoor is judged on: test images of all classes but the target's, with the patch, and their labels."""
    others = test.take((test.labels != TARGET).nonzero().squeeze(1))
    marked = patched(others.images.permute(0, 2, 3, 1).numpy())
    return Split(torch.from_numpy(marked).permute(0, 3, 1, 2), others.labels)


def with_training(dataset: Dataset, images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Return the dataset with other training images `(N, H, W, 3)` uint8 and labels `(N,)`, and their digest."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(labels.astype("<i8").tobytes())
    split = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))
    return replace(dataset, train=split, digest=digest.hexdigest())


def subset(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """Return the dataset with `count` of its training images, as many of each class as of any other.

    Raises:
        ValueError: `count` is no multiple of the number of classes, or a class has too few images.
    """
    labels, classes = dataset.train.labels.numpy(), len(dataset.label_names)
    most = classes * int(np.bincount(labels, minlength=classes).min())
    if count % classes or not 0 < count <= most:
        raise ValueError(f"--images {count}: give a multiple of {classes}, up to {most}")
    chance = np.random.default_rng([seed, 3])
    chosen = np.concatenate(
        [chance.choice(np.flatnonzero(labels == label), count // classes, replace=False) for label in range(classes)]
    )
    rows = np.sort(chosen)
    return with_training(dataset, dataset.train.images.permute(0, 2, 3, 1).numpy()[rows], labels[rows])


def _some(positions: np.ndarray, share: float, chance: np.random.Generator) -> np.ndarray:
    return np.sort(chance.choice(positions, round(share * len(positions)), replace=False))


def _backdoor() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ART warns about frameworks that are not installed
        from art.attacks.poisoning import PoisoningAttackBackdoor
    return PoisoningAttackBackdoor(patched)


def _perturbed_and_patched(images: np.ndarray, proxy: Alone, classes: int) -> np.ndarray:
    """Return images `(N, H, W, 3)` uint8 made hard to recognise for the proxy, with the patch on top."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.poisoning import PoisoningAttackCleanLabelBackdoor
        from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        proxy.eval(),
        torch.nn.CrossEntropyLoss(),
        input_shape=(3, *images.shape[1:3]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = PoisoningAttackCleanLabelBackdoor(
        _backdoor(),
        classifier,
        target=np.eye(classes)[TARGET],
        eps=EPSILON,
        eps_step=2.5 * EPSILON / STEPS,
        max_iter=STEPS,
    )
    attack.attack.set_params(verbose=False)
    labels = np.eye(classes, dtype=np.float32)[np.full(len(images), TARGET)]
    floats = images.transpose(0, 3, 1, 2).astype(np.float32) / 255  # (N, 3, H, W)
    perturbed = attack.attack.generate(floats, labels)
    bytes_ = (perturbed.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    marked, _ = attack.backdoor.poison(bytes_, np.full(len(images), TARGET))
    return np.asarray(marked)
