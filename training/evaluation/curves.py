"""The mixture's accuracy against the attack's radius and against its number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from training.attack import Attack, LogProbs
from training.evaluation.levels import EPSILON, PGD_20, STEP
from training.evaluation.significance import interval
from training.measure import Bench

IMAGES = 500
"""Curves and sanity checks use the first so many images of the subset, or all if there are fewer."""
RADII = (1, 2, 4, 8, 12, 16, 32, 64, 128)
"""In 255ths. PGD-20 with steps of a quarter of the radius, which is 2/255 at 8/255."""
STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of steps of 2/255 at radius 8/255."""


@dataclass(frozen=True)
class Curves:
    """Which images were right, ``(N,)`` booleans per point.

    Attributes:
        epsilon: By radius in 255ths, under PGD-20.
        steps: By number of steps, at radius 8/255.
    """

    epsilon: dict[int, torch.Tensor]
    steps: dict[int, torch.Tensor]

    def to_json(self) -> dict[str, Any]:
        """Return both curves with Wilson intervals, and how many images they stand on."""
        curves = {"epsilon": self.epsilon, "steps": self.steps}
        points = {name: [{"x": x, **interval(right)} for x, right in curve.items()] for name, curve in curves.items()}
        return {**points, "n": len(next(iter(self.epsilon.values())))}


def measure_curves(network: LogProbs, bench: Bench, known: Mapping[str, torch.Tensor]) -> Curves:
    """Attack a network with every radius and every number of steps.

    Args:
        network: The attacked network.
        bench: The images.
        known: What is known already, ``PGD-<steps>`` at 8/255 to ``(M,)`` booleans, M at least the bench's N.
    """

    def steps_point(steps: int) -> torch.Tensor:
        right = known.get(f"PGD-{steps}")
        return bench.correct(network, Attack.pgd(EPSILON, steps, STEP)) if right is None else right[: len(bench)]

    steps = {count: steps_point(count) for count in tqdm(STEPS, desc="steps", unit="point", dynamic_ncols=True)}
    epsilon = {}
    for radius in tqdm(RADII, desc="radii", unit="point", dynamic_ncols=True):
        attack = Attack.pgd(radius / 255, PGD_20.steps, radius / 255 / 4)
        epsilon[radius] = steps[PGD_20.steps] if attack == PGD_20 else bench.correct(network, attack)
    return Curves(epsilon, steps)
