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
from training.attack import Attack, perturb
from training.data import Dataset, Split
from training.losses import expert_cross_entropy, expert_diversity, keep_top_k, load_balance, mixture_cross_entropy
from training.measure import accuracy_under
from training.recipe import Recipe
from training.stage import Stage
from training.task import Figures, Task, Terms

JOINT = "joint"


class JointTask(Task):
    """Trains a mixture of pre-trained experts end to end.

    Args:
        mixture: The mixture.
        recipe: Which attack, and the weight of every term.
        holdout: What it is judged on.
        device: Where.
    """

    def __init__(self, mixture: Mixture, recipe: Recipe, holdout: Split, device: torch.device) -> None:
        super().__init__(mixture, recipe.joint, holdout, device)
        self.recipe = recipe

    @property
    def mixture(self) -> Mixture:
        """The trained mixture."""
        assert isinstance(self.network, Mixture)
        return self.network

    def mix(self, gate: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Mix log weights ``(B, E)`` and log-probabilities ``(B, E, C)``, of the ``top_k`` heaviest experts if so trained."""
        return mix(keep_top_k(gate, self.recipe.loss.top_k) if self.recipe.loss.top_k else gate, experts)

    def attack(
        self, images: torch.Tensor, targets: torch.Tensor, choices: torch.Generator, noise: torch.Generator
    ) -> torch.Tensor:
        """Return the images after an attack through gate and experts."""
        attack = self.drawn(self.recipe.draw_joint(choices))
        with self.attacking():
            return perturb(lambda x: self.mix(*self.mixture.components(x)), images, targets, attack, noise)

    def forward(self, attacked: torch.Tensor, clean: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Terms]:
        """Return the joint loss, its terms and the gate's mean weights ``(E,)`` under attack."""
        weights, smoothing = self.recipe.loss, self.recipe.joint.label_smoothing
        batch = len(attacked)
        clean_count = max(1, round(batch * weights.clean_share)) if weights.clean else 0
        with self.autocast():
            # One pass over both keeps batch-norm statistics those of the joined batch.
            gate, experts = self.mixture.components(torch.cat([attacked, clean[:clean_count]]))  # (B + n, E), (B + n, E, C)
        log_probs = self.mix(gate, experts)  # (B + n, C)
        kept = self.kept(log_probs[:batch], targets)
        kept_clean = kept[kept < clean_count] if isinstance(kept, torch.Tensor) else slice(clean_count)
        aims = targets[kept]  # (K,) or (K, C)
        terms = {"adversarial": mixture_cross_entropy(log_probs[:batch][kept], aims, smoothing)}
        on_clean = log_probs[batch:][kept_clean]  # (n', C), empty if trimming left none of them
        if len(on_clean):
            terms["clean"] = mixture_cross_entropy(on_clean, targets[kept_clean], smoothing)
        if weights.experts:
            terms["experts"] = expert_cross_entropy(experts[:batch][kept], aims, smoothing)
        if weights.balance:
            terms["balance"] = load_balance(torch.cat([gate[:batch][kept], gate[batch:][kept_clean]]))
        if weights.diversity:
            terms["diversity"] = -expert_diversity(experts[:batch][kept], aims)
        total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        values = {name: term.detach() for name, term in terms.items()}
        return total, {**values, "gate": gate[:batch].detach().exp().mean(dim=0)}

    def judge(self, averaged: nn.Module) -> Figures:
        """Return the mixture's clean accuracy and its accuracy under PGD-10."""
        assert isinstance(averaged, Mixture)

        def log_probs(images: torch.Tensor) -> torch.Tensor:
            return self.mix(*averaged.components(images))

        with self.autocast():
            return {
                "clean": accuracy_under(log_probs, self.holdout, None, self.device),
                "robust": accuracy_under(log_probs, self.holdout, Attack.pgd(8 / 255, 10, 2 / 255), self.device),
            }

    def experts(self) -> list[nn.Module]:
        """Return the experts."""
        return list(self.mixture.experts)


def joint_settings(recipe: Recipe, dataset: Dataset, seed: int, went_on_from: str | None) -> dict[str, Any]:
    """Return what joint training's result depends on, as JSON values."""
    settings = {"recipe": recipe.to_json(), "data_sha256": dataset.digest, "seed": seed}
    return settings if went_on_from is None else {**settings, "went_on_from": went_on_from}


def joint_stage(
    mixture: Mixture,
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    seed: int,
    went_on_from: str | None = None,
) -> Stage:
    """Return the stage that trains gate and experts together.

    Args:
        mixture: The mixture with pre-trained experts; trained in place.
        recipe: The recipe.
        dataset: The data, of which some training images are held out.
        device: Where to train.
        seed: The run's seed.
        went_on_from: Digest of the checkpoint that the mixture comes from, if it does.
    """
    _, holdout = dataset.split_holdout(recipe.holdout)
    mixture.gate.set_temperature(recipe.gate_temperature)
    mixture = mixture.to(device).to(memory_format=torch.channels_last)
    task = JointTask(mixture, recipe, holdout.take(slice(recipe.validation_images)), device)
    settings = joint_settings(recipe, dataset, seed, went_on_from)
    return Stage(JOINT, task, recipe.architecture.num_classes, seed * 1000 + 999, settings)
