"""Coverage: over how many of the classes a caller's answers are spread. A thief wants all of them."""

from __future__ import annotations

import numpy as np

LEAST = 0.5
"""Share of the classes from which answers may be those to a thief."""


def coverage(counts: np.ndarray) -> float:
    """Return the number of classes that answers are spread over evenly (exp of their entropy), as a share of all.

    Args:
        counts: Answers by class, ``(C,)``; not all 0.
    """
    shares = counts / counts.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum())) / len(counts)
