"""Stage 1: each expert is trained alone, against its own kind of attack.

Source: arXiv 2512.20821, pre-training: one benign expert, four of the FGSM family, four of the PGD family.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from model.architecture import Architecture
from model.mixture import Mixture
from training.attack import Attack, frozen_statistics, perturb
from training.data import Dataset, Split
from training.losses import mixture_cross_entropy
from training.measure import accuracy_under
from training.recipe import ExpertRecipe, Recipe, Schedule
from training.run_folder import RunFolder
from training.stage import Stage, Values, run_stage


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


def expert_stage(index: int) -> str:
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
        "seed": seed,
    }


def pretrain_expert(
    index: int, recipe: Recipe, dataset: Dataset, folder: RunFolder, device: torch.device, seed: int
) -> nn.Module:
    """Train one expert to the end of its schedule, or take it from the run folder when it is finished there.

    Args:
        index: Which of the recipe's experts, from 0.
        recipe: The recipe.
        dataset: The data, of which some training images are held out.
        folder: Where the expert's state is kept and resumed from.
        device: Where to train.
        seed: The run's seed; each expert derives its own from it, so that they differ in start and in order of data.

    Returns:
        The expert with averaged weights, in eval mode.
    """
    train, holdout = dataset.split_holdout(recipe.holdout)
    torch.manual_seed(seed * 1000 + index)
    network = Alone(Mixture(recipe.architecture).experts[0], recipe.architecture)
    network = network.to(device).to(memory_format=torch.channels_last)
    own = recipe.experts[index]
    schedule = expert_schedule(index, recipe)
    autocast = torch.autocast(device.type, torch.bfloat16)

    def loss(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Values]:
        attack = own.draw(generator)
        with autocast:
            if attack is not None:
                with frozen_statistics(network):
                    images = perturb(network, images, labels, attack, generator)
            log_probs = network(images)
        return mixture_cross_entropy(log_probs, labels, schedule.label_smoothing), {}

    def validate(averaged: nn.Module) -> Values:
        return _validate(averaged, own, holdout.take(slice(recipe.validation_images)), device)

    settings = expert_settings(index, recipe, dataset, seed)
    stage = Stage(expert_stage(index), network, schedule, loss, validate, seed * 1000 + index, settings)
    averaged = run_stage(stage, train, folder, device)
    assert isinstance(averaged, Alone)
    return averaged.expert


def _validate(network: nn.Module, own: ExpertRecipe, holdout: Split, device: torch.device) -> Values:
    with torch.autocast(device.type, torch.bfloat16):
        figures: Values = {"clean": accuracy_under(network, holdout, None, device)}
        if own.family != "benign":
            figures["robust"] = accuracy_under(network, holdout, Attack.pgd(8 / 255, 10, 2 / 255), device)
    return figures
