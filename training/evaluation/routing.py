"""How a mixture divides its work: what the gate does for each class, and how differently the experts answer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from model.mixture import Mixture
from training.evaluation.networks import components
from training.measure import Bench


def routing_figures(
    mixture: Mixture, bench: Bench, images: torch.Tensor | None = None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return figures of the gate and of the experts' diversity.

    Args:
        mixture: The mixture; its ``top_k`` counts.
        bench: The images.
        images: Other versions of them, as after an attack, ``(N, 3, H, W)`` float32.

    Returns:
        Of the gate: ``per_class``, the mean weights ``(C, E)`` of each true class (zeros for a class without images);
        ``image_entropy``, the mean entropy of single images' weights; ``mean_entropy``, the entropy of the mean weights; nats.
        Of the experts: ``disagreement``, the share of images on which two experts answer different labels, and ``correlation``,
        the cosine between their probabilities of the wrong classes (after Pang et al. 2019, "Improving adversarial robustness
        via promoting ensemble diversity", section 3.2), both averaged over pairs of experts and images.
    """
    weights, answers, labels = [], [], []
    with torch.no_grad():
        for part, true in bench.batches(images):
            gate, log_probs = components(mixture, part)
            weights.append(gate.exp().cpu())
            answers.append(log_probs.exp().cpu())
            labels.append(true.cpu())
    return _gate(torch.cat(weights), torch.cat(labels), mixture.architecture.num_classes), diversity(
        torch.cat(answers), torch.cat(labels)
    )


def _gate(weights: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, Any]:
    members = F.one_hot(labels, classes).float()  # (N, C)
    per_class = members.T @ weights / members.sum(dim=0).clamp_min(1).unsqueeze(1)  # (C, E)
    return {
        "per_class": [[round(weight, 4) for weight in row] for row in per_class.tolist()],
        "image_entropy": _entropy(weights).mean().item(),
        "mean_entropy": _entropy(weights.mean(dim=0)).item(),
    }


def _entropy(weights: torch.Tensor) -> torch.Tensor:
    entropies: torch.Tensor = torch.special.entr(weights).sum(dim=-1)
    return entropies


def diversity(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the experts' mean pairwise disagreement and the mean pairwise cosine of their wrong classes' probabilities.

    Args:
        probabilities: ``(N, E, C)``.
        labels: ``(N,)``, the true classes.
    """
    experts, classes = probabilities.shape[1:]
    first, second = torch.triu_indices(experts, experts, offset=1)  # the pairs
    if not len(first):
        return {"disagreement": 0.0, "correlation": 1.0}
    answers = probabilities.argmax(dim=2)  # (N, E)
    wrong = probabilities.masked_fill(F.one_hot(labels, classes).bool().unsqueeze(1), 0.0)
    directions = F.normalize(wrong, dim=2)
    cosines = directions @ directions.transpose(1, 2)  # (N, E, E)
    return {
        "disagreement": (answers[:, first] != answers[:, second]).float().mean().item(),
        "correlation": cosines[:, first, second].mean().item(),
    }
