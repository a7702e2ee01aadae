"""Policies: what of an answer leaves the service. The only way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Policy:
    """How answers are coarsened for a tier.

    Attributes:
        tier: The tier's name.
        decimals: Decimals to which probabilities are rounded.
        top_n: Scores shown, the largest ones; 0 shows all.
        label_only: Show no probabilities at all.
    """

    tier: str
    decimals: int
    top_n: int = 0
    label_only: bool = False

    def protect(self, probabilities: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Return one prediction per row of probabilities ``(N, C)``.

        The label is that of the exact probabilities. Rounding is half to even and keeps order, so the label's rounded
        probability is never below another's; rounded probabilities need not sum to 1.
        """
        best = probabilities.argmax(axis=1)  # (N,)
        predictions: list[dict[str, Any]] = [{"label": labels[i], "index": int(i)} for i in best]
        if self.label_only:
            return predictions
        rounded = np.round(probabilities.astype(np.float64), self.decimals) + 0.0  # (N, C); + 0.0 turns -0.0 into 0.0
        for prediction, exact, row in zip(predictions, probabilities, rounded, strict=True):
            # Sorting the exact row would order ties more finely than the rounded scores tell.
            order = sorted(range(len(row)), key=lambda i: (-row[i], i != prediction["index"], i))
            shown = order[: self.top_n or len(order)]
            prediction["confidence"] = float(row[exact.argmax()])
            prediction["scores"] = {labels[i]: float(row[i]) for i in shown}
        return predictions

    def describe(self) -> dict[str, Any]:
        """Return the policy as its callers may see it."""
        return {"tier": self.tier, "decimals": self.decimals, "top_n": self.top_n or None, "label_only": self.label_only}
