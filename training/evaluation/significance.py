"""The statistics of an evaluation: intervals, paired tests, and what is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import binomtest

Correct = dict[str, dict[str, torch.Tensor]]
"""Network to attack to ``(N,)`` booleans: which images were right."""

PAIRED_ATTACKS = ("clean", "PGD-10", "PGD-50x2")
CHANCE = 0.01
"""A count is more than chance when a one-sided exact binomial test says so at this level."""


def interval(correct: torch.Tensor) -> dict[str, float]:
    """Return the share of ``(N,)`` booleans that are true with its 95 % Wilson interval, in percent."""
    wilson = binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    percent = 100 * correct.float().mean().item()
    return {"percent": round(percent, 2), "low": round(100 * wilson.low, 2), "high": round(100 * wilson.high, 2)}


def paired_tests(correct: Correct, others: Sequence[str]) -> list[dict[str, Any]]:
    """Compare the mixture with other networks image by image (exact McNemar test)."""
    tests = []
    for other in others:
        for attack in PAIRED_ATTACKS:
            if attack not in correct["mixture"]:
                continue
            ours, theirs = correct["mixture"][attack], correct[other][attack]
            only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            discordant = only_ours + only_theirs
            p = binomtest(only_ours, discordant).pvalue if discordant else 1.0
            tests.append(
                {
                    "against": other,
                    "attack": attack,
                    "only_mixture": only_ours,
                    "only_other": only_theirs,
                    "difference_points": 100 * (only_ours - only_theirs) / len(ours),
                    "p": float(p),
                }
            )
    return tests


def exceeds(count: int, n: int, share: float) -> bool:
    """Tell whether ``count`` of ``n`` is more than a true ``share`` would give by chance."""
    return n > 0 and bool(binomtest(count, n, share, alternative="greater").pvalue < CHANCE)
