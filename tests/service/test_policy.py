"""What a policy lets out of exact probabilities."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.classify import predictions_of
from service.policy import Policy, bend, hide_votes

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox")


def answer(policy: Policy, exact: np.ndarray) -> list[dict[str, Any]]:
    return predictions_of(policy.protect(exact), LABELS)


@st.composite
def probability_rows(draw: st.DrawFn) -> np.ndarray:
    """Rows that sum to 1, with ties, zeros and near-ties on purpose."""
    weight = st.one_of(
        st.floats(0, 1, width=32),
        st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e-30, 0.1000001, 0.0049999, 0.005, 0.0050001]),
    )
    rows = draw(st.lists(st.lists(weight, min_size=len(LABELS), max_size=len(LABELS)), min_size=1, max_size=4))
    exact = np.array(rows, np.float32)
    exact[exact.sum(axis=1) == 0] = 1
    return exact / exact.sum(axis=1, keepdims=True)


@given(exact=probability_rows(), decimals=st.integers(0, 6), top_n=st.integers(0, 8))
@settings(max_examples=400, deadline=None)
def test_every_answer_is_coarse_ordered_and_true_to_the_exact_label(exact: np.ndarray, decimals: int, top_n: int) -> None:
    policy = Policy("anonymous", decimals, top_n)
    text = orjson.dumps(answer(policy, exact))
    assert text == orjson.dumps(answer(policy, exact.copy())), "the same row gave two answers"
    predictions = json.loads(text, parse_float=Decimal)
    assert len(predictions) == len(exact)
    step = Decimal(1).scaleb(-decimals)
    for prediction, row in zip(predictions, exact, strict=True):
        assert prediction["index"] == int(row.argmax())
        assert prediction["label"] == LABELS[row.argmax()]
        names, scores = list(prediction["scores"]), list(prediction["scores"].values())
        assert names[0] == prediction["label"]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == min(top_n or len(LABELS), len(LABELS))
        assert prediction["confidence"] == scores[0]
        for score in (prediction["confidence"], *scores):
            assert score == score.quantize(step), "finer than the policy's decimals"
            assert not score.is_signed()
        for name, score in prediction["scores"].items():
            assert abs(float(score) - row[LABELS.index(name)]) <= float(step) / 2 + 1e-6


def test_the_order_of_scores_does_not_tell_ties_apart() -> None:
    finer = np.array([[0.5, 0.10, 0.11, 0.09, 0.12, 0.08]], np.float32)
    coarser = np.array([[0.5, 0.12, 0.08, 0.11, 0.09, 0.10]], np.float32)
    policy = Policy("anonymous", 1)
    assert orjson.dumps(answer(policy, finer)) == orjson.dumps(answer(policy, coarser))


def test_no_zero_is_negative() -> None:
    (prediction,) = answer(Policy("anonymous", 2), np.array([[1.0, -0.0, -1e-9, 0.0, 0.0, 0.0]], np.float32))
    assert all(math.copysign(1, score) == 1 for score in prediction["scores"].values())


def test_the_largest_scores_are_the_ones_shown() -> None:
    exact = np.array([[0.04, 0.3, 0.01, 0.4, 0.05, 0.2]], np.float32)
    (prediction,) = answer(Policy("anonymous", 2, top_n=3), exact)
    assert prediction["scores"] == {"dog": 0.4, "bee": 0.3, "fox": 0.2}


def test_the_tensor_of_scores_is_as_coarse_and_hides_as_much_as_the_list() -> None:
    exact = np.array([[0.0449, 0.3, 0.0149, 0.4, 0.05, 0.1901]], np.float32)
    assert Policy("anonymous", 2, top_n=3).protect(exact).scores.tolist() == [[0.0, 0.3, 0.0, 0.4, 0.0, 0.19]]
    assert Policy("anonymous", 1).protect(exact).scores.tolist() == [[0.0, 0.3, 0.0, 0.4, 0.1, 0.2]]
    assert Policy("anonymous", 2, label_only=True).protect(exact).scores is None


def test_label_only_shows_nothing_else() -> None:
    exact = np.array([[0.04, 0.3, 0.01, 0.4, 0.05, 0.2]], np.float32)
    assert answer(Policy("anonymous", 6, top_n=3, label_only=True), exact) == [{"label": "dog", "index": 3}]


@pytest.mark.parametrize(("top_n", "shown"), [(0, None), (5, 5)])
def test_a_policy_describes_itself(top_n: int, shown: int | None) -> None:
    expected = {"tier": "anonymous", "decimals": 2, "top_n": shown, "label_only": False}
    assert Policy("anonymous", 2, top_n).describe() == expected


@given(exact=probability_rows(), strength=st.floats(0, 1), decimals=st.integers(0, 6), top_n=st.integers(0, 8))
@settings(max_examples=300, deadline=None)
def test_bent_answers_keep_the_label_and_the_grid(exact: np.ndarray, strength: float, decimals: int, top_n: int) -> None:
    policy = Policy("anonymous", decimals, top_n, reverse_sigmoid=strength)
    text = orjson.dumps(answer(policy, exact))
    assert text == orjson.dumps(answer(policy, exact.copy())), "the same row gave two answers"
    step = Decimal(1).scaleb(-decimals)
    for prediction, row in zip(json.loads(text, parse_float=Decimal), exact, strict=True):
        assert prediction["index"] == int(row.argmax())
        names, scores = list(prediction["scores"]), list(prediction["scores"].values())
        assert names[0] == prediction["label"]
        assert scores == sorted(scores, reverse=True)
        assert all(score == score.quantize(step) and not score.is_signed() and 0 <= score <= 1 for score in scores)


@given(exact=probability_rows(), strength=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_bent_probabilities_are_probabilities(exact: np.ndarray, strength: float) -> None:
    rows = exact.astype(np.float64) / exact.astype(np.float64).sum(axis=1, keepdims=True)
    best = rows.argmax(axis=1)
    bent = bend(rows, best, strength)
    assert bent.min() >= 0
    assert bent.max() <= 1
    np.testing.assert_allclose(bent.sum(axis=1), 1, atol=1e-9)
    assert (bent.max(axis=1) == bent[np.arange(len(best)), best]).all()


def test_bending_draws_a_sure_answer_to_the_middle_as_the_formula_says() -> None:
    # y - beta (s(gamma logit(y)) - 1/2) with beta 0.5 and gamma 0.2, worked out apart from the code
    def bent(y: float) -> float:
        return y - 0.5 * (1 / (1 + math.exp(-0.2 * math.log(y / (1 - y)))) - 0.5)

    raw = [bent(0.98), bent(0.01), bent(0.01)]
    expected = [value / sum(raw) for value in raw]
    found = bend(np.array([[0.98, 0.01, 0.01]]), np.array([0]), 0.5)[0]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[0] < 0.8


@given(exact=probability_rows(), decimals=st.integers(0, 6), top_n=st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_rounded_scores_are_their_own_answer(exact: np.ndarray, decimals: int, top_n: int) -> None:
    policy = Policy("anonymous", decimals, top_n)
    first = policy.protect(exact)
    assert first.scores is not None
    again = policy.protect(first.scores)
    assert np.array_equal(first.scores, again.scores)
    assert (np.abs(policy.protect(exact).scores.sum(axis=1) - 1) <= len(LABELS) / 2 * 10.0**-decimals + 1e-6).all() or top_n


@pytest.mark.parametrize(
    ("suspect", "other", "is_strict"),
    [
        (Policy("suspect", 6, label_only=True), Policy("anonymous", 0, 1), True),
        (Policy("suspect", 0, 1), Policy("anonymous", 2, label_only=True), False),
        (Policy("suspect", 1), Policy("anonymous", 2), True),
        (Policy("suspect", 3), Policy("anonymous", 2), False),
        (Policy("suspect", 1), Policy("anonymous", 2, 3), False),
        (Policy("suspect", 1, 3), Policy("anonymous", 2), True),
        (Policy("suspect", 1, 3), Policy("anonymous", 2, reverse_sigmoid=0.5), False),
        (Policy("suspect", 1, certificate=True), Policy("anonymous", 2), False),
        (Policy("suspect", 1, certificate=True), Policy("trusted", 2, certificate=True), True),
        (Policy("suspect", 2, certificate=True), Policy("trusted", 2, certificate=True), True),
        (Policy("suspect", 2), Policy("trusted", 2, certificate=True), False),
        (Policy("suspect", 1), Policy("trusted", 2, certificate=True), True),
        (Policy("suspect", 2, label_only=True), Policy("trusted", 2, certificate=True), True),
        (Policy("suspect", 2), Policy("trusted", 2, label_only=True, certificate=True), False),
        (Policy("suspect", 1, label_only=True, certificate=True), Policy("anonymous", 2), True),
    ],
)
def test_a_policy_that_shows_more_is_not_as_strict(suspect: Policy, other: Policy, is_strict: bool) -> None:
    assert suspect.is_as_strict_as(other) is is_strict


# --- votes: experts that answer with probabilities, and what a policy lets out of what they came to

VOTERS = 5


def vote_of(experts: np.ndarray) -> np.ndarray:
    """Return what experts' probabilities ``(N, E, C)`` come to, as docs/training.md defines it."""
    votes = np.array([np.bincount(row, minlength=len(LABELS)) for row in experts.argmax(axis=2)])
    return ((votes + experts.mean(axis=1)) / (VOTERS + 1)).astype(np.float32)


def two_ways_to_one_mean() -> np.ndarray:
    """Return experts whose means are the same and who elect the same class, once with three votes and once with all."""
    narrow = [[0.55, 0.45], [0.55, 0.45], [0.55, 0.45], [0.45, 0.55], [0.45, 0.55]]
    wide = [[0.51, 0.49]] * 5
    experts = np.zeros((2, VOTERS, len(LABELS)))
    experts[:, :, :2] = [narrow, wide]
    return experts


@pytest.mark.parametrize(
    "policy",
    [
        Policy("anonymous", 6),
        Policy("anonymous", 2, top_n=1),
        Policy("anonymous", 6, reverse_sigmoid=0.7),
        Policy("anonymous", 6, label_only=True, certificate=True),
    ],
)
def test_a_policy_without_certificates_does_not_tell_votes_with_equal_means_apart(policy: Policy) -> None:
    exact = vote_of(two_ways_to_one_mean())
    assert np.abs(exact[0] - exact[1]).max() > 0.3
    first, second = predictions_of(policy.protect(exact, VOTERS), LABELS)
    assert "certificate" not in first
    assert first["label"] == second["label"] == "ant"
    for one, other in zip(first.get("scores", {}).values(), second.get("scores", {}).values(), strict=True):
        assert one == pytest.approx(other, abs=2e-6)  # what float32 leaves of the mean


def test_at_the_same_decimals_shares_of_votes_hide_means_that_scores_without_votes_tell_apart() -> None:
    experts = np.zeros((2, 9, len(LABELS)))
    experts[:, :, 0] = [[0.601] * 9, [0.629] * 9]
    experts[:, :, 1] = 1 - experts[:, :, 0]
    exact = ((np.eye(len(LABELS))[0] * 9 + experts.mean(axis=1)) / 10).astype(np.float32)
    shares, same, coarser = (
        predictions_of(policy.protect(exact, 9), LABELS)
        for policy in (Policy("trusted", 2, certificate=True), Policy("suspect", 2), Policy("suspect", 1))
    )
    assert shares[0] == shares[1]
    assert same[0] != same[1]
    assert coarser[0] == coarser[1]


def test_a_policy_with_certificates_shows_the_votes_and_what_they_tolerate() -> None:
    exact = vote_of(two_ways_to_one_mean())
    policy = Policy("trusted", 6, certificate=True)
    protected = policy.protect(exact, VOTERS)
    assert protected.scores is not None
    assert np.abs(protected.scores - exact).max() < 1e-6
    narrow, wide = predictions_of(protected, LABELS)
    assert narrow["certificate"] == {"tolerated_partitions": 0}  # three to two
    assert wide["certificate"] == {"tolerated_partitions": 2}  # five to none
    assert policy.protect(exact).tolerated is None  # of a mixture with a gate


@given(
    st.lists(st.lists(st.lists(st.floats(0.001, 1), min_size=6, max_size=6), min_size=5, max_size=5), min_size=1, max_size=3)
)
@settings(max_examples=100, deadline=None)
def test_scores_without_votes_are_the_means_with_the_answer_on_top(weights: list[list[list[float]]]) -> None:
    experts = np.array(weights)
    experts /= experts.sum(axis=2, keepdims=True)
    exact = vote_of(experts)
    best = exact.argmax(axis=1)
    scores = hide_votes(exact.astype(np.float64), best, VOTERS)
    assert (scores[np.arange(len(best)), best] >= scores.max(axis=1)).all()
    assert np.abs(scores.sum(axis=1) - 1).max() < 1e-9
    means = experts.mean(axis=1)
    agreed = means.argmax(axis=1) == best
    assert np.abs(scores - means)[agreed].max(initial=0) < 1e-5
