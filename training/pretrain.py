"""Stage 1: each expert is trained alone, against its own kind of attack.

Source: arXiv 2512.20821, pre-training: one benign expert, four of the FGSM family, four of the PGD family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from model.architecture import Architecture
from model.mixture import Mixture
from training.attack import Attack, perturb
from training.data import Dataset, Split
from training.losses import mart, mixture_cross_entropy, trades
from training.measure import accuracy_under
from training.recipe import ExpertRecipe, Recipe, Schedule
from training.stage import Stage
from training.task import Figures, Task, Terms


class Alone(nn.Module):
    """One expert with the mixture's normalisation in front: images in ``[0, 1]`` to log-probabilities ``(B, C)``."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, expert: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.expert = expert
        self.register_buffer("mean", torch.tensor(architecture.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities ``(B, C)``."""
        logits: torch.Tensor = self.expert((images - self.mean) / self.std)
        return logits.float().log_softmax(dim=1)


class ExpertTask(Task):
    """Trains one expert.

    Args:
        network: The expert.
        own: Its attack and its loss.
        schedule: Its schedule.
        holdout: What it is judged on.
        device: Where.
    """

    def __init__(self, network: Alone, own: ExpertRecipe, schedule: Schedule, holdout: Split, device: torch.device) -> None:
        super().__init__(network, schedule, holdout, device)
        if own.loss == "mart" and (schedule.cutmix or schedule.mixup or schedule.label_smoothing):
            raise ValueError("MART needs plain classes: set cutmix, mixup and label_smoothing to 0")
        self.own = own

    def attack(
        self, images: torch.Tensor, targets: torch.Tensor, choices: torch.Generator, noise: torch.Generator
    ) -> torch.Tensor:
        """Return the images after the attack drawn for this batch; TRADES' attack leaves the clean answer, not the label."""
        attack = self.own.draw(choices)
        if attack is None:
            return images
        with self.attacking():
            if self.own.loss == "trades":
                with torch.no_grad():  # cross-entropy against p(x) and KL(p(x) || p(x')) have the same gradient
                    targets = self.network(images).exp()
            return perturb(self.network, images, targets, self.drawn(attack), noise)

    def forward(self, attacked: torch.Tensor, clean: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Terms]:
        """Return the loss."""
        own, smoothing = self.own, self.schedule.label_smoothing
        with self.autocast():
            if own.loss == "cross_entropy":
                log_probs = self.network(attacked)
                kept = self.kept(log_probs, targets)
                return mixture_cross_entropy(log_probs[kept], targets[kept], smoothing), {}
            on_attacked, on_clean = self.network(torch.cat([attacked, clean])).chunk(2)
            kept = self.kept(on_clean, targets)
            on_attacked, on_clean, targets = on_attacked[kept], on_clean[kept], targets[kept]
            if own.loss == "trades":
                return trades(on_clean, on_attacked, targets, own.beta, smoothing), {}
            return mart(on_clean, on_attacked, targets, own.beta), {}

    def judge(self, averaged: nn.Module) -> Figures:
        """Return clean accuracy and, but for a benign expert, accuracy under PGD-10."""
        with self.autocast():
            figures = {"clean": accuracy_under(averaged, self.holdout, None, self.device)}
            if self.own.family != "benign":
                attack = Attack.pgd(8 / 255, 10, 2 / 255)
                figures["robust"] = accuracy_under(averaged, self.holdout, attack, self.device)
        return figures

    def experts(self) -> list[nn.Module]:
        """Return the expert."""
        assert isinstance(self.network, Alone)
        return [self.network.expert]


def expert_name(index: int) -> str:
    """Return the name under which expert ``index``'s state is kept in the run folder."""
    return f"expert-{index}"


def expert_schedule(index: int, recipe: Recipe) -> Schedule:
    """Return expert ``index``'s schedule."""
    return recipe.benign if recipe.experts[index].family == "benign" else recipe.pretrain


def expert_settings(index: int, recipe: Recipe, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Return what expert ``index``'s weights depend on."""
    return {
        "architecture": recipe.architecture.to_json(),
        "expert": asdict(recipe.experts[index]),
        "schedule": asdict(expert_schedule(index, recipe)),
        "data_sha256": dataset.digest,
        "holdout": recipe.holdout,
        "validation_images": recipe.validation_images,
        "bag": recipe.bag,
        "seed": seed,
    }


def expert_bag(index: int, recipe: Recipe, digests: Sequence[str], seed: int) -> torch.Tensor:
    """Return the positions ``(K,)``, ascending, of the training samples that expert ``index`` sees.

    Whether a sample is among them follows from its pixels, the seed and the expert alone, with the probability
    ``recipe.bag``: changing or adding other samples moves none in or out, and copies of an image share its lot. After bagging
    (Breiman 1996), without replacement.

    Args:
        index: Which of the recipe's experts, from 0.
        recipe: The recipe.
        digests: Every sample's pixel digest, as :meth:`training.data.Split.digests` gives them.
        seed: The run's seed.
    """
    if not recipe.bag:
        return torch.arange(len(digests))
    below = recipe.bag * 2**64
    drawn = (hashlib.sha256(f"{seed} {index} {digest}".encode()).digest()[:8] for digest in digests)
    return torch.tensor([int.from_bytes(draw) < below for draw in drawn]).nonzero().squeeze(1)


def expert_stage(index: int, recipe: Recipe, dataset: Dataset, device: torch.device, seed: int) -> Stage:
    """Return the stage that trains one expert.

    Args:
        index: Which of the recipe's experts, from 0.
        recipe: The recipe.
        dataset: The data, of which some training images are held out.
        device: Where to train.
        seed: The run's seed; each expert derives its own from it, so that they differ in start and in order of data.
    """
    _, holdout = dataset.split_holdout(recipe.holdout)
    torch.manual_seed(seed * 1000 + index)
    network = Alone(Mixture(recipe.architecture).experts[0], recipe.architecture)
    network = network.to(device).to(memory_format=torch.channels_last)
    judged_on = holdout.take(slice(recipe.validation_images))
    task = ExpertTask(network, recipe.experts[index], expert_schedule(index, recipe), judged_on, device)
    settings = expert_settings(index, recipe, dataset, seed)
    return Stage(expert_name(index), task, recipe.architecture.num_classes, seed * 1000 + index, settings)
