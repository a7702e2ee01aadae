"""Shapiro and Wilk's W: how straight a sample lies on a normal quantile plot.

Royston's coefficients ("Approximating the Shapiro-Wilk W-test for non-normality", 1992), which hold for 12 to 5,000 values.
Written out since it is twenty lines and scipy would be the largest dependency of the service; the tests compare it with
scipy's.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np


def shapiro_w(values: np.ndarray) -> float:
    """Return W of ``values`` ``(N,)``, in ``(0, 1]``: 1 for a normal sample. 1, too, where all values are equal.

    Raises:
        ValueError: Fewer than 12 values or more than 5,000.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    centred = ordered - ordered.mean()
    squares = float(centred @ centred)
    if squares <= 1e-12 * max(1.0, float(ordered @ ordered)):
        return 1.0
    return min(1.0, float(_weights(len(ordered)) @ ordered) ** 2 / squares)


@lru_cache(maxsize=8)
def _weights(count: int) -> np.ndarray:
    if not 12 <= count <= 5000:
        raise ValueError(f"{count} values; Royston's approximation is for 12 to 5,000")
    normal = NormalDist()
    scores = np.array([normal.inv_cdf((i - 0.375) / (count + 0.25)) for i in range(1, count + 1)])
    squares = float(scores @ scores)
    u = count**-0.5
    last = scores[-1] / squares**0.5 + np.polyval([-2.706056, 4.434685, -2.07119, -0.147981, 0.221157, 0.0], u)
    second = scores[-2] / squares**0.5 + np.polyval([-3.582633, 5.682633, -1.752461, -0.293762, 0.042981, 0.0], u)
    phi = (squares - 2 * scores[-1] ** 2 - 2 * scores[-2] ** 2) / (1 - 2 * last**2 - 2 * second**2)
    weights: np.ndarray = scores / phi**0.5
    weights[-1], weights[-2], weights[0], weights[1] = last, second, -last, -second
    return weights
