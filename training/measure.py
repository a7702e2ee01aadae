"""Measuring: which images a network gets right, as they are or under attack."""

from __future__ import annotations

import torch

from training.attack import Attack, LogProbs, perturb
from training.augmentation import to_float
from training.data import Split

BATCH = 128


def correct_under(
    log_probs: LogProbs, split: Split, attack: Attack | None, device: torch.device, seed: int = 0, batch_size: int = BATCH
) -> torch.Tensor:
    """Return ``(N,)`` booleans: which images of ``split`` are classified rightly, after ``attack`` if there is one.

    The starting noise of each batch follows from the seed and the batch's number, so that networks that are compared face
    the same noise.
    """
    results = []
    for number, start in enumerate(range(0, len(split), batch_size)):
        part = split.take(slice(start, start + batch_size))
        images = to_float(part.images, device)
        labels = part.labels.to(device)
        if attack is not None:
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            images = perturb(log_probs, images, labels, attack, generator)
        with torch.no_grad():
            results.append((log_probs(images).argmax(dim=1) == labels).cpu())
    return torch.cat(results)


def accuracy_under(log_probs: LogProbs, split: Split, attack: Attack | None, device: torch.device) -> float:
    """Return the share, in ``[0, 1]``, that :func:`correct_under` finds right."""
    return correct_under(log_probs, split, attack, device).float().mean().item()
