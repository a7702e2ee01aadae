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
from service.policy import Policy

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
