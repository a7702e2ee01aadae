"""What a thief meets in benchmarks.extraction: images to ask about, and Palisade's answers to them under a policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.detection_callers import Predict
from service.policy import Policy
from training.data import Dataset, Split

RECORDED = Path("build")

POLICIES = {
    "full": Policy("full", decimals=9),  # finer than float32
    "4 decimals": Policy("4 decimals", decimals=4),
    "2 decimals": Policy("2 decimals", decimals=2),
    "1 decimal": Policy("1 decimal", decimals=1),
    "top 3, 2 decimals": Policy("top 3", decimals=2, top_n=3),
    "top 1, 2 decimals": Policy("top 1", decimals=2, top_n=1),
    "reverse sigmoid": Policy("reverse sigmoid", decimals=4, reverse_sigmoid=1.0),
    "label only": Policy("label only", decimals=0, label_only=True),
}
"""What the answers are worth to a thief, from the most to the least; the strongest bending that the service offers.

A thief who throws probabilities away ("hard labels") is one who gets labels only: the class is that of the exact ones either
way.
"""


@dataclass(frozen=True)
class Pool:
    """Images that a thief may ask about: as they are, and then all of them mirrored, so that twice as many queries differ.

    Attributes:
        images: ``(2 N, 3, H, W)`` uint8.
        kinds: A class for each, of whatever set they are from, ``(2 N,)``.
        exact: The model's probabilities, ``(2 N, C)``.
    """

    images: np.ndarray
    kinds: np.ndarray
    exact: np.ndarray

    @property
    def plain(self) -> int:
        """How many of the images are not mirrored."""
        return len(self.images) // 2

    def offered(self, budget: int) -> np.ndarray:
        """Return which images a thief chooses from: mirrored ones only when there are too few others."""
        if budget > len(self.images):
            raise ValueError(
                f"a budget of {budget} queries, but the pool has {len(self.images)} images, mirrored ones included"
            )
        return np.arange(self.plain if budget <= self.plain else len(self.images))


@dataclass(frozen=True)
class Scene:
    """All that the cells of the grid share.

    Attributes:
        predict: The model's exact probabilities of images ``(N, 3, H, W)``, uint8 or float32.
        pools: By name.
        scored: Images and labels on which clones are judged, never asked about.
        scored_exact: The model's probabilities of them.
        attacked: Those of ``scored`` that transfer attacks start from: the model gets them right.
    """

    predict: Predict
    pools: dict[str, Pool]
    scored: Split
    scored_exact: np.ndarray
    attacked: Split


def make_scene(dataset: Dataset, pool: tuple[np.ndarray, np.ndarray], predict: Predict, name: str, attacked: int) -> Scene:
    """Halve the test images between the thief and the judge, and ask the model about everything once.

    Args:
        dataset: Of whose test images half are the pool ``cifar10``.
        pool: Images ``(N, H, W, 3)`` uint8 and classes ``(N,)`` of the pool ``cifar100``.
        predict: The model.
        name: Names the file under ``build/`` that keeps its answers; it must change with the model and the data.
        attacked: From how many images transfer attacks start.
    """
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))
    mine = dataset.test.take(order[: len(order) // 2])
    scored = dataset.test.take(order[len(order) // 2 :])
    images = {"cifar10": mine.images.numpy(), "cifar100": pool[0].transpose(0, 3, 1, 2)}
    kinds = {"cifar10": mine.labels.numpy(), "cifar100": pool[1].astype(np.int64)}
    kinds["both"] = np.concatenate([kinds["cifar10"], kinds["cifar100"] + kinds["cifar10"].max() + 1])
    queries = {key: np.concatenate([value, value[..., ::-1]]) for key, value in images.items()}
    answers = _answers({**queries, "scored": scored.images.numpy()}, predict, RECORDED / f"extraction-{name}.npz")
    halves = [(key, half) for half in (0, 1) for key in ("cifar10", "cifar100")]

    def both(of: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.split(of[key], 2)[half] for key, half in halves])

    queries["both"], answers["both"] = both(queries), both(answers)
    pools = {key: Pool(queries[key], np.tile(kinds[key], 2), answers[key]) for key in queries}
    exact = answers["scored"]
    right = torch.from_numpy(exact.argmax(axis=1)) == scored.labels
    return Scene(predict, pools, scored, exact, scored.take(right.nonzero().squeeze(1)[:attacked]))


def _answers(queries: dict[str, np.ndarray], predict: Predict, path: Path) -> dict[str, np.ndarray]:
    """Return the exact answers to all images, computed unless the file has them."""
    if not path.exists():
        found = {key: predict(np.ascontiguousarray(images)) for key, images in queries.items()}
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **found)
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in queries}


def shown(policy: Policy, exact: np.ndarray) -> np.ndarray:
    """Return what leaves the service, ``(N, C)`` float64: hidden scores are 0, a label alone is a 1."""
    protected = policy.protect(exact)
    return np.eye(exact.shape[1])[protected.best] if protected.scores is None else protected.scores


def as_targets(answers: np.ndarray) -> np.ndarray:
    """Return distributions to train on: what is missing to 1 is spread over the classes that show nothing."""
    silent = answers == 0
    missing = np.maximum(1 - answers.sum(axis=1, keepdims=True), 0) / np.maximum(silent.sum(axis=1, keepdims=True), 1)
    filled = answers + silent * missing
    return np.asarray(filled / filled.sum(axis=1, keepdims=True))
