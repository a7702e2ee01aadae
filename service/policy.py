"""Policies: what each tier may ask for, and what of an answer leaves the service. The only way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from model.certificate import read_means, read_votes, tolerated_partitions
from service.quota import Window

BEND = 0.2
"""``gamma`` of the reverse sigmoid: how far from 0 and 1 the bending reaches."""
TINY = 1e-12


@dataclass(frozen=True)
class Protected:
    """What may leave the service of ``N`` answers.

    Attributes:
        best: Index of each image's class, ``(N,)``.
        scores: Rounded probabilities ``(N, C)`` float64, 0 where a policy hides them; ``None`` under label only.
        shown: The classes whose scores may be shown, best first, ``(N, top_n or C)``; ``None`` under label only.
        tolerated: Of how many partitions the training samples may change without changing the class, ``(N,)`` int64; ``None``
            if the experts do not vote or the policy does not show it.
    """

    best: np.ndarray
    scores: np.ndarray | None = None
    shown: np.ndarray | None = None
    tolerated: np.ndarray | None = None


@dataclass(frozen=True)
class Policy:
    """A tier's quota, and how its answers are coarsened.

    Attributes:
        tier: The tier's name.
        decimals: Decimals to which probabilities are rounded.
        top_n: Scores shown, the largest ones; 0 shows all.
        label_only: Show no probabilities at all.
        windows: Quotas of images, none for no limit.
        reverse_sigmoid: How much probabilities are bent before they are rounded, in ``[0, 1]``; 0 does not bend them.
        certificate: Show the certificates of a vote, and so how the votes were split.
    """

    tier: str
    decimals: int
    top_n: int = 0
    label_only: bool = False
    windows: tuple[Window, ...] = ()
    reverse_sigmoid: float = 0.0
    certificate: bool = False

    @property
    def shows_certificates(self) -> bool:
        """Whether certificates are shown; label only hides them too, as they are made of the votes."""
        return self.certificate and not self.label_only

    def protect(self, probabilities: np.ndarray, voters: int = 0) -> Protected:
        """Return what may leave of exact probabilities ``(N, C)``.

        The class is that of the exact probabilities. Rounding is half to even and keeps order, so the class's rounded
        probability is never below another's; rounded probabilities need not sum to 1: with ``C`` classes they sum to 1 within
        ``C / 2`` grains, and to less where ``top_n`` hides some. Rounding once more changes nothing; bending once more does.

        Args:
            probabilities: As the engine computed them.
            voters: How many experts voted, each trained on a partition of its own; 0 if they do not vote.
        """
        best = probabilities.argmax(axis=1)  # (N,)
        if self.label_only:
            return Protected(best)
        exact = probabilities.astype(np.float64)
        tolerated: np.ndarray | None = None
        if voters and self.certificate:
            tolerated = tolerated_partitions(read_votes(exact, voters))
        elif voters:
            exact = hide_votes(exact, best, voters)
        if self.reverse_sigmoid:
            exact = bend(exact, best, self.reverse_sigmoid)
        rounded = np.round(exact, self.decimals) + 0.0  # (N, C); + 0.0 turns -0.0 into 0.0
        # Ordered by the rounded scores: the order of the exact ones would tell ties apart. The answer comes first among its
        # ties; half a grain never lifts it above a larger score.
        ranked = rounded.copy()
        rows = np.arange(len(best))
        ranked[rows, best] += 0.5 * 10.0**-self.decimals
        shown = np.argsort(-ranked, axis=1, kind="stable")[:, : self.top_n or None]
        if self.top_n:
            kept = np.zeros_like(rounded)
            np.put_along_axis(kept, shown, np.take_along_axis(rounded, shown, axis=1), axis=1)
            rounded = kept
        return Protected(best, rounded, shown, tolerated)

    def is_as_strict_as(self, other: Policy) -> bool:
        """Tell whether this policy shows nothing of an answer that ``other`` hides, whether it is a gate's or nine voters'."""
        if self.label_only or other.label_only:
            return self.label_only
        shows_no_more = not other.top_n or 0 < self.top_n <= other.top_n
        hides_votes = other.certificate or not self.certificate
        # Votes plus mean, over E + 1, show the mean E + 1 times as coarsely as the mean alone does at the same decimals.
        decimals = other.decimals - (other.certificate and not self.certificate)
        finer = self.decimals > decimals or self.reverse_sigmoid < other.reverse_sigmoid
        return hides_votes and shows_no_more and not finer

    def describe(self) -> dict[str, Any]:
        """Return the policy as its callers may see it."""
        return {"tier": self.tier, "decimals": self.decimals, "top_n": self.top_n or None, "label_only": self.label_only}


def hide_votes(probabilities: np.ndarray, best: np.ndarray, voters: int) -> np.ndarray:
    """Return what hides how exactly a vote was split: the means of the experts' probabilities.

    Where the mean prefers another class, the answer's is lifted to the largest and the row made to sum to 1 again. Two largest
    scores that are equal therefore tell that vote and mean disagree. And a mean bounds the votes ``v`` of its class from below:
    an expert that votes otherwise gives the class half at most, so ``v >= E (2 mean - 1)``, and a mean near 1 tells that all
    agree. Only label only hides that, too.

    Args:
        probabilities: What ``voters`` voting experts answered, ``(N, C)`` float64.
        best: Their classes, ``(N,)``.
        voters: How many experts voted.

    Returns:
        ``(N, C)`` float64, rows that sum to 1, largest in the column of their class.
    """
    means = read_means(probabilities, voters)
    means[np.arange(len(best)), best] = means.max(axis=1)
    return np.asarray(means / means.sum(axis=1, keepdims=True))


def bend(probabilities: np.ndarray, best: np.ndarray, strength: float) -> np.ndarray:
    """Return probabilities that mislead who trains on them: a reverse sigmoid, which draws large and small ones to the middle.

    After Lee et al., "Defending against neural network model stealing attacks using deceptive perturbations" (2019): ``y``
    turns into ``y - strength (s(gamma logit(y)) - 1/2)``, with the logistic function ``s``, and the row is made to sum to 1
    again. Many different ``y`` come out nearly alike, so it can't be undone exactly. Unlike the paper's, a row whose class
    would change is mixed with the exact one, as much as it takes for the class to stay the largest.

    Args:
        probabilities: ``(N, C)`` float64, rows that sum to 1.
        best: Their classes, ``(N,)``.
        strength: ``beta`` of the paper, in ``[0, 1]``.

    Returns:
        ``(N, C)``, in ``[0, 1]``, rows that sum to 1 within the precision of the sum; the same for the same row.
    """
    rows = np.arange(len(best))
    inside = np.clip(probabilities, TINY, 1 - TINY)
    odds = (inside / (1 - inside)) ** BEND  # s(gamma logit(y)) = odds / (1 + odds)
    bent = np.maximum(probabilities - strength * (odds / (1 + odds) - 0.5), 0.0)
    bent /= bent.sum(axis=1, keepdims=True)
    lead = probabilities[rows, best][:, None] - probabilities  # (N, C), of the class before the others; never negative
    left = bent[rows, best][:, None] - bent
    share = np.where(left < 0, lead / np.where(left < 0, lead - left, 1.0), 1.0).min(axis=1, keepdims=True)  # (N, 1)
    mixed = share * bent + (1 - share) * probabilities
    mixed[rows, best] = mixed.max(axis=1)  # the last bits of a tie
    return np.asarray(mixed.clip(0.0, 1.0))
