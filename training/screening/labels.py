"""Labels that the screeners dispute: by disagreement, and by confident learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.screening.thresholds import wrong_label_threshold

DRAWS = 3
"""So many random wrong labels per sample show how wrong labels score."""
SURE = 2.0
"""Another class is proposed as the label if it is so many times as likely as any other."""

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Disputed:
    """What a detector of wrong labels found.

    Attributes:
        scores: ``(N,)``, larger is more suspicious.
        threshold: From this score on a sample is flagged.
        wrong: Share of all labels that is wrong, by this detector's estimate.
    """

    scores: np.ndarray
    threshold: float
    wrong: float

    @property
    def flagged(self) -> np.ndarray:
        """``(N,)`` booleans."""
        return self.scores > self.threshold


def disagreement(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return ``(N,)`` log-odds of the likeliest other class against the label, in nats; above 0 means disagreement.

    Args:
        probabilities: ``(N, C)``, of screeners that have not seen the sample.
        labels: ``(N,)`` integers.
    """
    rows = np.arange(len(labels))
    logs = np.log(np.clip(probabilities, 1e-6, None))
    own = logs[rows, labels].copy()
    logs[rows, labels] = -np.inf
    difference: np.ndarray = logs.max(axis=1) - own
    return difference


def dispute(probabilities: np.ndarray, labels: np.ndarray, rate: float, seed: int) -> Disputed:
    """Score labels by :func:`disagreement`."""
    return _judged(disagreement, probabilities, labels, rate, seed)


def confident(probabilities: np.ndarray, labels: np.ndarray, rate: float, seed: int) -> Disputed:
    """Score labels by confident learning (Northcutt et al. 2021), as cleanlab does it.

    Probabilities are corrected for how sure screeners are of each class on average, and a label's quality is then its
    normalised margin; the score is 1 minus that, in ``[0, 1]``. ``wrong`` is cleanlab's estimate from the confident joint.
    """
    from cleanlab.count import get_confident_thresholds, num_label_issues
    from cleanlab.rank import get_label_quality_scores

    sure = get_confident_thresholds(labels, probabilities)  # (C,)
    adjusted = probabilities - sure + sure.max()
    adjusted /= adjusted.sum(axis=1, keepdims=True)

    def score(rows: np.ndarray, under: np.ndarray) -> np.ndarray:
        quality = get_label_quality_scores(under, rows, method="normalized_margin", adjust_pred_probs=False)
        return 1 - np.asarray(quality, np.float64)

    found = _judged(score, adjusted, labels, rate, seed)
    wrong = num_label_issues(labels, probabilities) / len(labels)
    return Disputed(found.scores, found.threshold, float(wrong))


def _judged(score: Score, probabilities: np.ndarray, labels: np.ndarray, rate: float, seed: int) -> Disputed:
    generator = np.random.default_rng(seed)
    classes = probabilities.shape[1]
    given = score(probabilities, labels)
    wrong = [score(probabilities, (labels + generator.integers(1, classes, len(labels))) % classes) for _ in range(DRAWS)]
    threshold, share = wrong_label_threshold(given, np.concatenate(wrong), rate)
    return Disputed(given, threshold, share)
