"""The mixture of experts: the reference implementation, written for reading.

Source: Meymani and Razavi-Far, "Defending against adversarial attacks using mixture of experts" (arXiv 2512.20821): nine
ResNet-18 experts and a soft gate, optimised end to end. Mixing in probability space is ours, as the paper leaves it open.
Voting is that of Levine and Feizi, "Deep Partition Aggregation: provable defense against general poisoning attacks" (2021),
section 3; see :mod:`model.certificate`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from model.architecture import Architecture
from model.backbone import ResNet18
from model.gate import Gate


class Mixture(nn.Module):
    """Nine experts that answer with one distribution, weighed by a gate or counted as votes.

    With a gate it computes ``log sum_k g_k(x) softmax(z_k(x))`` in log space, where ``g`` is the softmax of the gate's logits
    and ``z_k`` are expert ``k``'s logits; see :func:`mix`. For a vote see :func:`vote`. Normalisation happens inside, so inputs
    and perturbations are in ``[0, 1]`` pixel units.

    Args:
        architecture: The shapes.
        top_k: Run only the ``k`` experts with the largest gate weights, renormalised. Inference only. ``None`` runs all.

    Attributes:
        gate: The gate; a mixture whose experts vote has none.

    Raises:
        ValueError: ``top_k`` is out of range, or leaves out experts of a vote.
    """

    gate: Gate
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, architecture: Architecture, top_k: int | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.top_k = check_top_k(top_k, architecture.num_experts)
        if architecture.votes and top_k not in (None, architecture.num_experts):
            raise ValueError(f"top_k={top_k}: every expert of a vote has its say; give {architecture.num_experts} or None")
        self.experts = nn.ModuleList(
            ResNet18(architecture.width, architecture.num_classes, architecture.activation)
            for _ in range(architecture.num_experts)
        )
        if not architecture.votes:
            self.gate = Gate(architecture.gate_width, architecture.num_experts)
        self.register_buffer("mean", torch.tensor(architecture.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)`` in ``[0, 1]`` to zero mean and unit deviation per channel."""
        return (images - self.mean) / self.std

    def components(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log gate weights ``(B, E)`` and every expert's log-probabilities ``(B, E, C)`` for images in ``[0, 1]``.

        In a vote all weights are alike.
        """
        normalised = self.normalise(images)
        logits = torch.stack([expert(normalised) for expert in self.experts], dim=1)  # (B, E, C)
        return self.weigh(normalised).log_softmax(dim=1), logits.float().log_softmax(dim=2)

    def weigh(self, normalised: torch.Tensor) -> torch.Tensor:
        """Return the gate's logits ``(B, E)`` for normalised images ``(B, 3, H, W)``, float32; zeros where there is no gate."""
        if self.architecture.votes:
            return normalised.new_zeros(normalised.shape[0], self.architecture.num_experts, dtype=torch.float32)
        logits: torch.Tensor = self.gate(normalised)
        return logits.float()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)``, float32 in ``[0, 1]``, to log-probabilities ``(B, C)``."""
        if self.top_k is not None and self.top_k < self.architecture.num_experts:
            return self._forward_top_k(images, self.top_k)
        gate, log_probs = self.components(images)
        return vote(log_probs) if self.architecture.votes else mix(gate, log_probs)

    def _forward_top_k(self, images: torch.Tensor, k: int) -> torch.Tensor:
        if self.training:
            raise RuntimeError(f"top_k={k} is for inference only: call eval() first or set top_k=None to train")
        normalised = self.normalise(images)
        gate, chosen = self.gate(normalised).float().topk(k, dim=1)  # both (B, k)
        log_probs = gate.new_zeros(len(images), k, self.architecture.num_classes)  # (B, k, C)
        for index, expert in enumerate(self.experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            if len(rows):
                answers = expert(normalised[rows]).float().log_softmax(dim=1)
                log_probs = log_probs.index_put((rows, slots), answers)
        return mix(gate.log_softmax(dim=1), log_probs)


def mix(gate: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Return ``log sum_k exp(gate[:, k]) exp(log_probs[:, k])``: ``(B, E)`` and ``(B, E, C)`` to ``(B, C)``."""
    return torch.logsumexp(gate.unsqueeze(2) + log_probs, dim=1)


def vote(log_probs: torch.Tensor) -> torch.Tensor:
    """Return ``log((votes + mean of the experts' probabilities) / (E + 1))``: ``(B, E, C)`` to log-probabilities ``(B, C)``.

    A vote goes to an expert's likeliest class. The mean, which is below 1 wherever anybody votes otherwise, orders classes of
    as many votes and has the gradients that counting lacks; :func:`model.certificate.read_votes` takes the two apart again.
    """
    experts = log_probs.shape[1]
    mean = log_probs.logsumexp(dim=1) - math.log(experts)  # (B, C), a logarithm
    return torch.logaddexp(count_votes(log_probs).log(), mean) - math.log(experts + 1)


def count_votes(answers: torch.Tensor) -> torch.Tensor:
    """Return how many experts' largest value is each class's: values ``(B, E, C)`` of any scale to ``(B, C)`` float32."""
    classes = torch.arange(answers.shape[2], device=answers.device)
    return (answers.argmax(dim=2, keepdim=True) == classes).float().sum(dim=1)


def check_top_k(top_k: int | None, num_experts: int) -> int | None:
    """Return ``top_k`` if it is ``None`` or between 1 and ``num_experts``; else raise ``ValueError``."""
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be from 1 to {num_experts} (the number of experts) or None, not {top_k}")
    return top_k
