"""Settings: everything that decides what a screening finds."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = {"folds": 0.84, "parts": 0.04, "confident": 0.04, "spectral": 0.04, "clusters": 0.04}
"""How the false positives that are allowed are shared out among the detectors that make some; the shares add up to 1.

Folds get most since they catch most for the same price: see docs/experiments.md.
"""


@dataclass(frozen=True)
class ScreenSettings:
    """What a screening does.

    Attributes:
        false_positives: Share of the clean samples, in ``(0, 0.5)``, that may be quarantined, by all detectors together.
        parts: Disjoint parts, each of which trains one screener that votes on all other parts. Nine, as there are experts.
        folds: Parts of which all but one train a screener that judges the one.
        rounds: How often the folds are judged; every round after the first trains on what the one before kept.
        epochs: Passes of each screener of a fold over its samples; a part's screener makes twice as many.
        width: Channels of a screener's first stage.
        layer: Stage of a screener, from 1 to 4, whose output, averaged over the image, ``spectral`` and ``clusters`` look at.
            The last is what the logits are made of.
        batch_size: Samples per training step.
        seed: Parts, folds and screeners follow from it.
    """

    false_positives: float = 0.05
    parts: int = 9
    folds: int = 4
    rounds: int = 2
    epochs: float = 10.0
    width: int = 16
    layer: int = 4
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.false_positives < 0.5:
            raise ValueError(f"false_positives is a share of the clean samples: from 0 to 0.5, not {self.false_positives}")
        if min(self.parts, self.folds) < 2 or self.rounds < 1:
            raise ValueError(
                f"a screening needs at least 2 parts, 2 folds and 1 round, not {self.parts}, {self.folds} and {self.rounds}"
            )
        if not 1 <= self.layer <= 4:
            raise ValueError(f"layer is one of a screener's stages, from 1 to 4, not {self.layer}")
