"""Thresholds: from which score on a sample is suspicious, so that a stated share of the clean samples is.

What is clean is not known, so each rule says what it takes for clean instead.
"""

from __future__ import annotations

import numpy as np

STEPS = 4000
"""At so many thresholds a distribution is looked at."""
CLEAREST = 0.2
"""The share of wrong labels is read off where at least this share of known wrong labels scores higher."""
MOST_WRONG = 0.9


def above_others(scores: np.ndarray, groups: np.ndarray, trusted: np.ndarray, rate: float) -> np.ndarray:
    """Return each sample's threshold: the score that a share ``rate`` of the other groups' trusted samples exceeds.

    An attacker's samples share one label as a rule. Thus a label is measured by all the others, and can't raise its own
    threshold.

    Args:
        scores: ``(N,)``, larger is more suspicious, comparable between groups.
        groups: ``(N,)`` integers: the samples' labels.
        trusted: ``(N,)`` booleans: samples that nothing speaks against so far.
        rate: The false-positive rate, in ``(0, 1)``.

    Returns:
        ``(N,)``; infinite where no other group has trusted samples.
    """
    thresholds = np.full(len(scores), np.inf)
    for group in np.unique(groups):
        others = scores[trusted & (groups != group)]
        if len(others):
            thresholds[groups == group] = np.quantile(others, 1 - rate, method="higher")
    return thresholds


def wrong_label_threshold(given: np.ndarray, wrong: np.ndarray, rate: float) -> tuple[float, float]:
    """Return the score that a share ``rate`` of the rightly labelled samples exceeds, and the share of wrong labels.

    The given labels are a mixture of right ones and a share ``w`` of wrong ones. How wrong ones score is known: score every
    sample once more under labels drawn at random. With ``F`` the share of given labels above a score and ``W`` that of random
    ones, the right labels' share above it is ``(F - w W) / (1 - w)``. It can't be negative, so ``w`` is at most ``F / W``
    everywhere; the least of these bounds, with ``F`` a standard error higher, is taken for it (Blanchard, Lee and Scott 2010,
    "Semi-supervised novelty detection", section 4). Labels changed for similar classes score lower than random ones: then
    ``w`` comes out too small and the threshold too high, so that fewer samples are quarantined, not more.

    Args:
        given: ``(N,)``, scores of the samples under their labels; larger is more suspicious.
        wrong: ``(M,)``, scores of the same samples under labels drawn at random from the others.
        rate: The false-positive rate, in ``(0, 1)``.
    """
    grid = np.quantile(np.concatenate([given, wrong]), np.linspace(0, 1, STEPS))
    given_above = 1 - np.searchsorted(np.sort(given), grid, side="right") / len(given)  # (STEPS,)
    wrong_above = 1 - np.searchsorted(np.sort(wrong), grid, side="right") / len(wrong)
    clear = wrong_above >= CLEAREST
    error = np.sqrt(given_above * (1 - given_above) / len(given))
    share = min(float(((given_above + error)[clear] / wrong_above[clear]).min()), MOST_WRONG)
    right_above = (given_above - share * wrong_above) / (1 - share)
    right_above = np.maximum.accumulate(right_above[::-1])[::-1]  # it can't grow with the threshold
    return float(grid[np.argmax(right_above <= rate)]), share
