"""The defences of benchmarks.poisoning that keep poison out: screening, and experts that see a part of the data each and vote.

What only these need is imported where it is used, so that all other arms run without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.data import Dataset, Split
from training.measure import Bench
from training.recipe import Recipe
from training.worker import Worker

if TYPE_CHECKING:
    from training.partition_run import PartitionRun
    from training.screening.screening import Screening


def told(settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides what a screening with these settings finds, as JSON values."""
    from training.screening.screening import settings_json
    from training.screening.settings import ScreenSettings

    return settings_json(ScreenSettings(**settings))


def screened(dataset: Dataset, folder: Path, settings: dict[str, Any], worker: Worker) -> Screening:
    """Screen the training samples; killed, it goes on from what is in `folder`.

    Args:
        dataset: The data, poisoned or not.
        folder: Where the screeners are kept.
        settings: Those of `training.screening.settings` that differ from the defaults.
        worker: Where to train, and when to stop.
    """
    from training.screening.screening import screen
    from training.screening.settings import ScreenSettings

    return screen(dataset, ScreenSettings(**settings), folder, worker.device, worker)


def partition_run(recipe: Recipe, dataset: Dataset, folder: Path, seed: int, worker: Worker) -> PartitionRun:
    """Return the run that trains each of a recipe's experts on its own part of the data."""
    from training.partition_run import PartitionRun

    return PartitionRun(recipe, dataset, folder, seed, worker)


@torch.no_grad()
def certified(network: torch.nn.Module, experts: int, test: Split, device: torch.device) -> list[float]:
    """Return, for 0, 1, ... changed parts, the share of the test images that are right and stay so whatever the change."""
    from model.certificate import read_votes, tolerated_partitions

    answers = [network(images).exp().cpu().numpy() for images, _ in Bench(test, device).batches()]
    probabilities = np.concatenate(answers)  # (N, C)
    right = probabilities.argmax(axis=1) == test.labels.numpy()
    tolerated = tolerated_partitions(read_votes(probabilities, experts))
    return [float((right & (tolerated >= parts)).mean()) for parts in range((experts - 1) // 2 + 1)]
