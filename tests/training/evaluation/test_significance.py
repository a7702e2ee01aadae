"""The evaluation's statistics, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.evaluation.significance import exceeds, interval, paired_tests


def booleans(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def test_paired_tests_count_images_that_only_one_network_gets_right() -> None:
    rights = {
        "mixture": {"clean": booleans("111011"), "PGD-10": booleans("000000")},
        "uniform average": {"clean": booleans("000111"), "PGD-10": booleans("000000")},
        "expert 4": {"clean": booleans("111011"), "PGD-10": booleans("111100")},
    }
    tests = {(test["against"], test["attack"]): test for test in paired_tests(rights, ["uniform average", "expert 4"])}
    clean = tests["uniform average", "clean"]
    assert (clean["only_mixture"], clean["only_other"]) == (3, 1)
    assert clean["difference_points"] == pytest.approx(100 * 2 / 6)
    assert clean["p"] == pytest.approx(2 * (4 + 1) / 2**4)  # four coins: three or more heads, on either side
    attacked = tests["expert 4", "PGD-10"]
    assert (attacked["only_mixture"], attacked["only_other"]) == (0, 4)
    assert attacked["difference_points"] == pytest.approx(-100 * 4 / 6)
    assert attacked["p"] == pytest.approx(2 / 2**4)
    for equal in (tests["expert 4", "clean"], tests["uniform average", "PGD-10"]):
        assert (equal["only_mixture"], equal["only_other"], equal["difference_points"], equal["p"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(("right", "n"), [(15, 20), (0, 20), (20, 20), (1, 3), (500, 1000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    z, share = 1.959964, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    cell = interval(booleans("1" * right + "0" * (n - right)))
    assert cell["percent"] == pytest.approx(100 * share, abs=0.005)
    assert cell["low"] == pytest.approx(100 * (middle - half), abs=0.0051)
    assert cell["high"] == pytest.approx(100 * (middle + half), abs=0.0051)


def test_a_count_exceeds_a_share_when_chance_hardly_gives_it() -> None:
    """Of 5 images, k or more of share 0.1: 0.0815 for 2, 0.0086 for 3, by the binomial formula."""
    assert not exceeds(2, 5, 0.1)
    assert exceeds(3, 5, 0.1)
    assert not exceeds(0, 1000, 0.02)
    assert not exceeds(0, 0, 0.02)
    assert not exceeds(25, 1000, 0.02)
    assert exceeds(40, 1000, 0.02)
