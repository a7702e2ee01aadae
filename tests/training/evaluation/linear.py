"""Linear classifiers, whose robustness against an L-infinity attack can be computed by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.data import Split
from training.measure import Bench


@dataclass(frozen=True)
class Linear:
    """A linear softmax model with images that it gets right by more or less.

    ``radius`` is the length of the shortest perturbation that makes another class win, ``(N,)`` in ``[0, 1]`` pixel units: the
    logits' difference over the L1 norm of the weights' difference, for the nearest class. It is negative for images that are
    wrong already. No pixel is so dark or bright that clipping would matter up to 64/255, and all are multiples of 3/255.
    """

    weights: torch.Tensor
    split: Split

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) - 0.5) @ self.weights.to(images.dtype)

    @property
    def radius(self) -> torch.Tensor:
        labels = self.split.labels
        logits = self(self.split.images.double() / 255)  # (N, C)
        lead = logits.gather(1, labels.unsqueeze(1)) - logits
        reach = (self.weights.T[labels].unsqueeze(1) - self.weights.T.unsqueeze(0)).abs().sum(dim=2)  # (N, C)
        return (lead / reach).masked_fill(reach == 0, torch.inf).min(dim=1).values

    @property
    def bench(self) -> Bench:
        return Bench(self.split, torch.device("cpu"), batch_size=40)

    def robust(self, epsilon: float) -> torch.Tensor:
        """Return which images no perturbation up to ``epsilon`` can break; none is a close call."""
        assert (self.radius - epsilon).abs().min() > 1e-5
        return self.radius > epsilon


def linear(classes: int, count: int = 100, seed: int = 0) -> Linear:
    """Return 8x8 images whose radius is spread from about 0 to 40/255, and a few that are wrong."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(192, classes, generator=generator, dtype=torch.float64) / 10
    labels = torch.arange(count) % classes
    own = weights.T[labels]
    others = (weights.sum(dim=1) - own) / (classes - 1)
    strength = torch.rand(count, 1, generator=generator) * 42 - 2
    pixels = 127.5 + strength * (own - others).sign() + 20 * torch.rand(count, 192, generator=generator) - 10
    images = (3 * (pixels / 3).round()).to(torch.uint8).view(count, 3, 8, 8)
    return Linear(weights, Split(images, labels))
