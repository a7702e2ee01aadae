"""Stage 2: gate and experts are trained together, against an attack that goes through the whole mixture.

Source: arXiv 2512.20821, joint training; the loss is ours (not published): adversarial cross-entropy of the mixture, a small
clean term, a mean per-expert adversarial term (published attacks on mixtures find the experts to be the weak link) and load
balancing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.mixture import Mixture, mix
from training.attack import Attack, frozen_statistics, perturb
from training.data import Dataset
from training.losses import expert_cross_entropy, load_balance, mixture_cross_entropy
from training.measure import accuracy_under
from training.recipe import Recipe
from training.run_folder import RunFolder
from training.stage import Stage, Values, run_stage

JOINT = "joint"


def train_jointly(
    mixture: Mixture,
    recipe: Recipe,
    dataset: Dataset,
    folder: RunFolder,
    device: torch.device,
    seed: int,
    went_on_from: str | None = None,
) -> Mixture:
    """Train a mixture of pre-trained experts end to end.

    Args:
        mixture: The mixture with pre-trained experts; trained in place.
        recipe: The recipe.
        dataset: The data, of which some training images are held out.
        folder: Where the state is kept and resumed from.
        device: Where to train.
        seed: The run's seed.
        went_on_from: Digest of the checkpoint that the mixture comes from, if it does.

    Returns:
        The mixture with averaged weights, in eval mode.
    """
    train, holdout = dataset.split_holdout(recipe.holdout)
    mixture = mixture.to(device).to(memory_format=torch.channels_last)

    def loss(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Values]:
        with torch.autocast(device.type, torch.bfloat16):
            return joint_loss(mixture, recipe, images, labels, generator)

    def validate(averaged: nn.Module) -> Values:
        part = holdout.take(slice(recipe.validation_images))
        with torch.autocast(device.type, torch.bfloat16):
            return {
                "clean": accuracy_under(averaged, part, None, device),
                "robust": accuracy_under(averaged, part, Attack.pgd(8 / 255, 10, 2 / 255), device),
            }

    settings = joint_settings(recipe, dataset, seed, went_on_from)
    stage = Stage(JOINT, mixture, recipe.joint, loss, validate, seed * 1000 + 999, settings)
    averaged = run_stage(stage, train, folder, device)
    assert isinstance(averaged, Mixture)
    return averaged


def joint_settings(recipe: Recipe, dataset: Dataset, seed: int, went_on_from: str | None) -> dict[str, Any]:
    """Return what joint training's result depends on, as JSON values."""
    settings = {"recipe": recipe.to_json(), "data_sha256": dataset.digest, "seed": seed}
    return settings if went_on_from is None else {**settings, "went_on_from": went_on_from}


def joint_loss(
    mixture: Mixture, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, Values]:
    """Attack the mixture and return the joint loss with the values of its terms.

    Args:
        mixture: The mixture, in training mode.
        recipe: Which attack, and the weight of every term.
        images: ``(B, 3, H, W)``, float32 in ``[0, 1]``.
        labels: ``(B,)``.
        generator: Source of the attack's randomness.
    """
    weights, smoothing = recipe.loss, recipe.joint.label_smoothing
    with frozen_statistics(mixture):
        attacked = perturb(mixture, images, labels, recipe.draw_joint(generator), generator)
    clean_count = round(len(images) * weights.clean_share) if weights.clean else 0
    # One pass over both keeps batch-norm statistics those of the joined batch.
    gate, experts = mixture.components(torch.cat([attacked, images[:clean_count]]))  # (B + n, E), (B + n, E, C)
    log_probs = mix(gate, experts)  # (B + n, C)
    batch = len(images)
    terms = {"adversarial": mixture_cross_entropy(log_probs[:batch], labels, smoothing)}
    if clean_count:
        terms["clean"] = mixture_cross_entropy(log_probs[batch:], labels[:clean_count], smoothing)
    if weights.experts:
        terms["experts"] = expert_cross_entropy(experts[:batch], labels, smoothing)
    if weights.balance:
        terms["balance"] = load_balance(gate)
    total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    values: Values = {name: term.item() for name, term in terms.items()}
    values["gate"] = gate[:batch].detach().exp().mean(dim=0).tolist()
    return total, values
