"""Shapiro and Wilk's W, against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import shapiro

from service.watch.normality import shapiro_w


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(12, 500),
    shape=st.sampled_from(["normal", "exponential", "uniform", "two"]),
)
@settings(max_examples=60, deadline=None)
def test_w_is_scipys(seed: int, count: int, shape: str) -> None:
    chance = np.random.default_rng(seed)
    values = {
        "normal": chance.normal(3, 2, count),
        "exponential": chance.exponential(size=count),
        "uniform": chance.uniform(size=count),
        "two": np.where(chance.random(count) < 0.5, 0.0, 9.0) + chance.normal(0, 0.1, count),
    }[shape]
    assert shapiro_w(values) == pytest.approx(shapiro(values).statistic, abs=1e-7)


def test_equal_values_have_no_shape() -> None:
    assert shapiro_w(np.full(100, 7.25)) == 1.0


@pytest.mark.parametrize("count", [3, 11, 5001])
def test_counts_that_the_approximation_is_not_for_are_named(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} values"):
        shapiro_w(np.arange(count))
