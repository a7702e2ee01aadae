"""Screeners: quick networks, trained on some samples as they are, that say what they think of samples they have not seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from model.architecture import BLOCKS_PER_STAGE, Architecture
from model.backbone import ResNet18
from training.augmentation import to_float
from training.data import Split
from training.measure import BATCH
from training.pretrain import Alone, ExpertTask
from training.recipe import ExpertRecipe, Schedule
from training.run_folder import RunFolder
from training.screening.settings import ScreenSettings
from training.stage import Stage, run_stage
from training.task import Figures
from training.worker import Worker

PART_EPOCHS = 2
"""A part's screener makes so many times the epochs of a fold's, as its samples are so much fewer."""
SMALLEST_BATCH = 16


class _ScreenerTask(ExpertTask):
    """Trains a screener: an expert without an attack, judged by nobody, since what it holds out is what it votes on."""

    def judge(self, averaged: nn.Module) -> Figures:
        del averaged
        return {}


@dataclass(frozen=True)
class Opinion:
    """What one screener thinks of samples that it has not seen.

    Attributes:
        positions: ``(M,)`` int64, which samples.
        probabilities: ``(M, C)`` float32.
        features: ``(M, F)`` float32: what :class:`ScreenSettings` calls the layer, averaged over the image.
    """

    positions: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray


class Screeners:
    """Trains screeners on a split and asks them.

    Args:
        split: The samples.
        num_classes: Number of classes ``C``.
        settings: How they are trained.
        folder: Where their states are kept, so that a killed screening goes on.
        worker: Where they are trained.
    """

    def __init__(self, split: Split, num_classes: int, settings: ScreenSettings, folder: RunFolder, worker: Worker) -> None:
        self._split, self._settings, self._folder, self._worker = split, settings, folder, worker
        height, width = split.images.shape[2:]
        self._architecture = Architecture(
            width=settings.width, num_classes=num_classes, num_experts=1, height=height, input_width=width
        )

    def parts(self) -> Iterator[Opinion]:
        """Train a screener on each of the disjoint parts and yield what it thinks of all other parts."""
        for number, part in enumerate(self._shares(self._settings.parts)):
            others = np.setdiff1d(np.arange(len(self._split)), part)
            yield self._opinion(f"part-{number}", part, others, PART_EPOCHS * self._settings.epochs)

    def folds(self, kept: np.ndarray, turn: int) -> Iterator[Opinion]:
        """Yield, for every fold, what a screener trained on the kept samples of all other folds thinks of it.

        Args:
            kept: ``(N,)`` booleans: on which samples screeners may be trained.
            turn: The round's number, from 0.
        """
        for number, fold in enumerate(self._shares(self._settings.folds)):
            trained = np.setdiff1d(np.flatnonzero(kept), fold)
            yield self._opinion(f"round-{turn}-fold-{number}", trained, fold, self._settings.epochs)

    def _shares(self, count: int) -> list[np.ndarray]:
        """Return disjoint random shares of all positions, each sorted."""
        order = np.random.default_rng((self._settings.seed, count)).permutation(len(self._split))
        return [np.sort(share) for share in np.array_split(order, count)]

    def _opinion(self, name: str, trained: np.ndarray, asked: np.ndarray, epochs: float) -> Opinion:
        network = self._train(name, self._split.take(torch.from_numpy(trained)), epochs)
        unseen = self._split.take(torch.from_numpy(asked))
        probabilities, features = _ask(network, unseen, self._settings.layer, self._worker.device)
        return Opinion(asked, probabilities, features)

    def _train(self, name: str, data: Split, epochs: float) -> Alone:
        fitting = max(min(self._settings.batch_size, len(data) // 24), SMALLEST_BATCH)
        schedule = Schedule(epochs=epochs, batch_size=fitting, label_smoothing=0.1)
        seed = int.from_bytes(hashlib.sha256(f"{self._settings.seed} {name}".encode()).digest()[:4])
        torch.manual_seed(seed)
        expert = ResNet18(self._settings.width, self._architecture.num_classes)
        network = Alone(expert, self._architecture).to(self._worker.device).to(memory_format=torch.channels_last)
        task = _ScreenerTask(network, ExpertRecipe("benign"), schedule, data, self._worker.device)
        stage = Stage(name, task, self._architecture.num_classes, seed, self._identity(data, schedule))
        trained = run_stage(stage, data, self._folder, self._worker)
        assert isinstance(trained, Alone)
        return trained

    def _identity(self, data: Split, schedule: Schedule) -> dict[str, Any]:
        """Return what a screener's weights depend on."""
        return {
            "architecture": self._architecture.to_json(),
            "schedule": asdict(schedule),
            "data_sha256": data.digest(),
            "seed": self._settings.seed,
        }


@torch.no_grad()
def _ask(network: Alone, split: Split, layer: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities ``(M, C)``, the mean over an image and its mirror image, and the image's features ``(M, F)``."""
    probabilities, features = [], []
    seen: list[torch.Tensor] = []
    assert isinstance(network.expert, ResNet18)
    last = network.expert.blocks[sum(BLOCKS_PER_STAGE[:layer]) - 1]
    hook = last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.mean(dim=(2, 3)).float().cpu()))
    with hook, torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(split), BATCH):
            images = to_float(split.images[start : start + BATCH], device).contiguous(memory_format=torch.channels_last)
            straight, mirrored = network(images).exp(), network(images.flip(3)).exp()
            probabilities.append(((straight + mirrored) / 2).cpu())
            features.append(seen[0])
            seen.clear()
    return torch.cat(probabilities).numpy(), torch.cat(features).numpy()
