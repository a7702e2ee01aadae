"""Thresholds keep the false-positive rate that was stated."""

from __future__ import annotations

import numpy as np
import pytest

from training.screening.thresholds import above_others, wrong_label_threshold


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4])
def test_the_threshold_among_mixed_labels_leaves_the_stated_share_of_right_ones(share: float) -> None:
    rng = np.random.default_rng(1)
    right = rng.normal(-3, 1.5, round(20_000 * (1 - share)))  # some overlap with the wrong ones
    wrong = rng.normal(2, 1, round(20_000 * share))
    threshold, estimate = wrong_label_threshold(np.concatenate([right, wrong]), rng.normal(2, 1, 20_000), 0.03)
    assert (right > threshold).mean() == pytest.approx(0.03, abs=0.012)
    assert estimate == pytest.approx(share, abs=0.02)


def test_wrong_labels_that_look_likelier_than_random_ones_cost_no_more_right_ones() -> None:
    rng = np.random.default_rng(2)
    right, wrong = rng.normal(-3, 1.5, 16_000), rng.normal(0, 1, 4_000)  # swapped for a similar class
    threshold, estimate = wrong_label_threshold(np.concatenate([right, wrong]), rng.normal(2, 1, 20_000), 0.03)
    assert (right > threshold).mean() <= 0.035
    assert estimate < 0.2


def test_a_label_is_measured_by_the_others() -> None:
    rng = np.random.default_rng(3)
    labels, scores = np.repeat(np.arange(5), 1000), rng.exponential(size=5000)
    scores[:400] += 20  # two fifths of label 0 are poison
    thresholds = above_others(scores, labels, np.ones(5000, bool), 0.01)
    assert (scores > thresholds)[:400].all()
    assert (scores > thresholds)[400:1000].mean() <= 0.02
    assert (scores > thresholds)[1000:].mean() <= 0.01  # theirs are higher, as the poison is among what they are measured by


def test_without_other_labels_nothing_is_flagged() -> None:
    thresholds = above_others(np.arange(5.0), np.zeros(5, int), np.ones(5, bool), 0.1)
    assert not (np.arange(5.0) > thresholds).any()
