"""What replicas write down for each other comes back as it was, and nothing of another form does harm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from service.watch.evidence import (
    Forgiven,
    Judged,
    Sent,
    Suspicion,
    read_evidence,
    read_verdict,
    write_judged,
    write_sent,
    write_verdict,
)
from service.watch.fingerprint import Fingerprinter
from tests.service.watch.pictures import photos

KEY = "00ff" * 8


def test_evidence_comes_back_as_it_was() -> None:
    prints = Fingerprinter(b"secret").take(photos(1, seed=1))
    sent = Sent(2**64 - 1, prints.free[0], prints.fixed[0])
    (found,) = read_evidence(write_sent(sent))
    assert isinstance(found, Sent)
    assert found.exact == 2**64 - 1
    assert np.array_equal(found.free, sent.free)
    assert np.array_equal(found.fixed, sent.fixed)
    judged = [Judged(7, 3, 10, True, 12.5), Judged(8, 999, 1000, None, None, 2**32 - 1), Judged(9, 0, 10, False, 0.25)]
    assert read_evidence(write_judged(judged)) == judged


def test_verdicts_come_back_as_they_were() -> None:
    for verdict in (Suspicion(KEY, "distances", 41), Forgiven(KEY)):
        assert read_verdict(write_verdict(verdict)) == verdict


@pytest.mark.parametrize("cut", [0, 1, 5, 100])
def test_what_is_cut_short_or_longer_says_nothing(cut: int) -> None:
    prints = Fingerprinter(b"secret").take(photos(1, seed=1))
    for whole in (write_sent(Sent(1, prints.free[0], prints.fixed[0])), write_judged([Judged(7, 3, 10, True, 12.5)])):
        assert read_evidence(whole[: min(cut, len(whole) - 1)]) == read_evidence(whole + b"x") == []
    whole = write_verdict(Suspicion(KEY, "distances", 41))
    assert read_verdict(whole[: min(cut, len(whole) - 1)]) is read_verdict(whole + b"x") is None


def test_an_answer_that_no_model_gives_says_nothing() -> None:
    assert read_evidence(write_judged([Judged(7, 10, 10, True, 1.0)])) == []


@pytest.mark.parametrize("distance", [math.inf, -math.inf, math.nan])
def test_a_distance_that_is_no_number_says_nothing(distance: float) -> None:
    assert read_evidence(write_judged([Judged(7, 3, 10, True, distance)])) == [Judged(7, 3, 10, True, None)]
