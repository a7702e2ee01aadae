"""Activations: a small group that a screener tells apart from the rest of its label stands out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from training.screening.activations import by_group, clusters, spectral
from training.screening.thresholds import above_others

Scorer = Callable[[np.ndarray], np.ndarray]


def features(poisoned: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features ``(2000, 24)`` of two screeners and five labels; ``poisoned`` samples of label 3 have something of their own."""
    rng = np.random.default_rng(0)
    labels, screener = np.arange(2000) % 5, np.arange(2000) // 5 % 2
    made = rng.normal(size=(2000, 24)) + 4 * np.eye(24)[labels] + 3 * np.eye(24)[10 + screener]
    made[np.flatnonzero(labels == 3)[:poisoned], 20] += 9
    return made, labels, screener


@pytest.mark.parametrize("scorer", [spectral, clusters])
def test_a_poisoned_tenth_of_a_label_is_flagged_and_little_else(scorer: Scorer) -> None:
    made, labels, screener = features(poisoned=40)
    trusted = np.ones(2000, bool)
    scores = by_group(made, labels, screener, trusted, scorer)
    flagged = scores > np.maximum(above_others(scores, labels, trusted, 0.01), 0)
    poison = np.flatnonzero(labels == 3)[:40]
    assert flagged[poison].mean() >= 0.9
    assert np.delete(flagged, poison).mean() <= 0.02


@pytest.mark.parametrize("scorer", [spectral, clusters])
def test_on_clean_features_the_stated_share_is_flagged_at_most(scorer: Scorer) -> None:
    made, labels, screener = features(poisoned=0)
    trusted = np.ones(2000, bool)
    scores = by_group(made, labels, screener, trusted, scorer)
    assert (scores > np.maximum(above_others(scores, labels, trusted, 0.01), 0)).mean() <= 0.02


def test_the_same_features_score_the_same_whatever_was_drawn_before() -> None:
    made, labels, screener = features(poisoned=40)
    one = by_group(made, labels, screener, np.ones(2000, bool), clusters)
    np.random.default_rng().normal(size=3)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    assert np.array_equal(one, by_group(made, labels, screener, np.ones(2000, bool), clusters))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_samples_that_are_quarantined_already_score_nothing() -> None:
    made, labels, screener = features(poisoned=40)
    trusted = np.arange(2000) >= 1000
    scores = by_group(made, labels, screener, trusted, spectral)
    assert not scores[:1000].any()
    assert scores[1000:].all()
