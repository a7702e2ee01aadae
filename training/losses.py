"""The terms of the joint loss: small pure functions of log-probabilities and gate weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def mixture_cross_entropy(log_probs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean cross-entropy of log-probabilities ``(B, C)``, with label smoothing in ``[0, 1)``."""
    likelihood = F.nll_loss(log_probs, labels)
    return likelihood if smoothing == 0 else (1 - smoothing) * likelihood - smoothing * log_probs.mean()


def expert_cross_entropy(log_probs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean over experts of their own cross-entropies; log-probabilities ``(B, E, C)``, labels ``(B,)``."""
    experts = log_probs.shape[1]
    return mixture_cross_entropy(log_probs.flatten(0, 1), labels.repeat_interleave(experts), smoothing)


def load_balance(gate: torch.Tensor) -> torch.Tensor:
    """Return ``log E - H(mean gate weights)``: 0 when a batch uses all experts alike, ``log E`` when it uses one.

    Entropy of the mean, not mean of the entropies: single images may be routed sharply as long as the batch is spread.

    Args:
        gate: Log gate weights ``(B, E)``.
    """
    mean = gate.exp().mean(dim=0)  # (E,)
    return math.log(gate.shape[1]) + (mean * mean.clamp_min(1e-12).log()).sum()
