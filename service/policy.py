"""Policies: what each tier may ask for, and what of an answer leaves the service. The only way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from service.quota import Window


@dataclass(frozen=True)
class Protected:
    """What may leave the service of ``N`` answers.

    Attributes:
        best: Index of each image's class, ``(N,)``.
        scores: Rounded probabilities ``(N, C)`` float64, 0 where a policy hides them; ``None`` under label only.
        shown: The classes whose scores may be shown, best first, ``(N, top_n or C)``; ``None`` under label only.
    """

    best: np.ndarray
    scores: np.ndarray | None = None
    shown: np.ndarray | None = None


@dataclass(frozen=True)
class Policy:
    """A tier's quota, and how its answers are coarsened.

    Attributes:
        tier: The tier's name.
        decimals: Decimals to which probabilities are rounded.
        top_n: Scores shown, the largest ones; 0 shows all.
        label_only: Show no probabilities at all.
        windows: Quotas of images, none for no limit.
    """

    tier: str
    decimals: int
    top_n: int = 0
    label_only: bool = False
    windows: tuple[Window, ...] = ()

    def protect(self, probabilities: np.ndarray) -> Protected:
        """Return what may leave of exact probabilities ``(N, C)``.

        The class is that of the exact probabilities. Rounding is half to even and keeps order, so the class's rounded
        probability is never below another's; rounded probabilities need not sum to 1.
        """
        best = probabilities.argmax(axis=1)  # (N,)
        if self.label_only:
            return Protected(best)
        rounded = np.round(probabilities.astype(np.float64), self.decimals) + 0.0  # (N, C); + 0.0 turns -0.0 into 0.0
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
        return Protected(best, rounded, shown)

    def describe(self) -> dict[str, Any]:
        """Return the policy as its callers may see it."""
        return {"tier": self.tier, "decimals": self.decimals, "top_n": self.top_n or None, "label_only": self.label_only}
