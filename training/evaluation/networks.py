"""The networks that an evaluation compares: a mixture, what is made of its parts, and other checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint
from model.fast import fold_batch_norms
from model.mixture import Mixture, mix
from training.attack import LogProbs
from training.losses import keep_top_k


def networks(mixture: Mixture) -> dict[str, LogProbs]:
    """Return the mixture as it is deployed, the uniform average of its experts, and each expert alone."""
    experts = mixture.architecture.num_experts

    def uniform(images: torch.Tensor) -> torch.Tensor:
        gate, log_probs = mixture.components(images)
        return mix(torch.full_like(gate, -math.log(experts)), log_probs)

    named: dict[str, LogProbs] = {"mixture": mixture, "uniform average": uniform}
    return named | {f"expert {index}": alone(mixture, index) for index in range(experts)}


def others(checkpoints: Sequence[str], device: torch.device) -> dict[str, LogProbs]:
    """Return other checkpoints as they are deployed, each under its file's name.

    Args:
        checkpoints: Paths or names of embedded checkpoints.
        device: Where to run them.

    Raises:
        ValueError: Two have the same name.
    """
    named: dict[str, LogProbs] = {}
    for checkpoint in checkpoints:
        name = f"checkpoint {Path(checkpoint).stem}"
        if name in named:
            raise ValueError(f"--compare {checkpoint}: another file is called {Path(checkpoint).stem}, too: rename one of them")
        named[name] = fold_batch_norms(load_checkpoint(checkpoint, device)).to(memory_format=torch.channels_last)
    return named


def alone(mixture: Mixture, index: int) -> LogProbs:
    """Return one expert: images ``(B, 3, H, W)`` in ``[0, 1]`` to log-probabilities ``(B, C)``."""
    return lambda images: mixture.experts[index](mixture.normalise(images)).float().log_softmax(dim=1)


def routed(mixture: Mixture, top_k: int | None) -> Mixture:
    """Return a mixture of the same weights (shared, not copied) that runs the ``top_k`` heaviest experts; ``None`` runs all."""
    other = copy.copy(mixture)
    other.top_k = top_k
    return other


def components(mixture: Mixture, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log gate weights ``(B, E)``, as ``top_k`` leaves them, and every expert's log-probabilities ``(B, E, C)``.

    What :func:`model.mixture.mix` makes of them is what the mixture answers.
    """
    gate, log_probs = mixture.components(images)
    return gate if mixture.top_k is None else keep_top_k(gate, mixture.top_k), log_probs


def through_gate_only(mixture: Mixture) -> LogProbs:
    """Return the mixture with gradients through the gate only, as an attacker sees it who leaves the experts alone."""

    def log_probs(images: torch.Tensor) -> torch.Tensor:
        gate, experts = components(mixture, images)
        return mix(gate, experts.detach())

    return log_probs


def through_experts_only(mixture: Mixture) -> LogProbs:
    """Return the mixture with gradients through the experts only, as an attacker sees it who leaves the gate alone."""

    def log_probs(images: torch.Tensor) -> torch.Tensor:
        gate, experts = components(mixture, images)
        return mix(gate.detach(), experts)

    return log_probs
