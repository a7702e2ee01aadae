"""Pictures for the tests of the watch, drawn from a seed: smooth ones, that differ from each other as photos do."""

from __future__ import annotations

import numpy as np


def photos(count: int, seed: int, side: int = 32) -> np.ndarray:
    """Return ``(count, 3, side, side)`` uint8: coarse noise, made smooth, with some grain."""
    chance = np.random.default_rng(seed)
    coarse = chance.uniform(0, 255, (count, 3, side // 4, side // 4))
    smooth = np.kron(coarse, np.ones((4, 4)))
    return levels(smooth + chance.normal(0, 6, smooth.shape))


def levels(values: np.ndarray) -> np.ndarray:
    """Return values rounded to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
