"""How thoroughly an evaluation attacks: the levels and their attacks."""

from __future__ import annotations

from typing import Literal

from training.attack import Attack

Level = Literal["quick", "standard", "full"]

EPSILON = 8 / 255
STEP = 2 / 255

QUICK: dict[str, Attack | None] = {
    "clean": None,
    "FGSM": Attack.fgsm(EPSILON),
    "PGD-10": Attack.pgd(EPSILON, 10, STEP),
}
"""On every network, at every level."""

PGD_20 = Attack.pgd(EPSILON, 20, STEP)
STANDARD: dict[str, Attack] = {
    "PGD-20": PGD_20,
    "PGD-50x2": Attack.pgd(EPSILON, 50, STEP, restarts=2),
    "CW-PGD-20": Attack.pgd(EPSILON, 20, STEP, objective="margin"),
}
"""On the mixture and its rivals, from level ``standard`` on."""

TOP_K = (1, 2, 3)
"""Numbers of experts whose hard selection is measured from level ``standard`` on."""
