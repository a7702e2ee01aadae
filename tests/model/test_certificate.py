"""The certificate: what is read back from a vote's answer, and which changes an answer stands."""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement, product

import numpy as np
import pytest
import torch

from model.certificate import read_means, read_votes, tolerated_partitions
from model.mixture import Mixture, vote


def answers(experts: int, classes: int, sharpness: float, count: int = 200) -> torch.Tensor:
    """Return random experts' log-probabilities ``(count, E, C)``."""
    generator = torch.Generator().manual_seed(experts * classes)
    return (sharpness * torch.randn(count, experts, classes, generator=generator)).log_softmax(dim=2)


@pytest.mark.parametrize("experts", [1, 2, 9, 64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("sharpness", [0.0001, 1.0, 30.0])
def test_votes_and_means_are_read_back_from_the_answer_alone(experts: int, classes: int, sharpness: float) -> None:
    log_probs = answers(experts, classes, sharpness)
    log_probs[:20] = log_probs[:20, :1]  # of one opinion
    told = vote(log_probs).exp().numpy()
    expected = np.array([np.bincount(row, minlength=classes) for row in log_probs.argmax(dim=2).numpy()])
    assert np.array_equal(read_votes(told, experts), expected)
    assert np.abs(read_means(told, experts) - log_probs.exp().mean(dim=1).numpy()).max() < 1e-4


@pytest.mark.parametrize("doubt", [0.0, 1e-9, 1e-4, 0.3])
def test_votes_are_read_at_both_ends_of_what_a_mean_can_be(doubt: float) -> None:
    sure = torch.tensor([1 - doubt, doubt])
    rest = torch.tensor([0.5 - 1e-6, 0.5 + 1e-6])  # votes otherwise and lifts the mean of the first class as much as it can
    unanimous, split = torch.stack([sure] * 9), torch.stack([sure] * 8 + [rest])
    told = vote(torch.stack([unanimous, split]).clamp_min(1e-30).log()).exp().numpy()
    assert read_votes(told, 9).tolist() == [[9, 0], [8, 1]]


def test_a_vote_for_one_of_very_many_classes_is_read() -> None:
    log_probs = answers(9, 50_000, 1e-6, count=2)
    assert read_votes(vote(log_probs).exp().numpy(), 9).sum(axis=1).tolist() == [9, 9]


@pytest.mark.parametrize(
    ("votes", "tolerated"),
    [
        ([9, 0, 0], 4),
        ([8, 1, 0], 3),
        ([6, 2, 1], 1),
        ([5, 4, 0], 0),
        ([4, 3, 2], 0),
        ([4, 4, 1], 0),
        ([5, 2, 2], 1),
        ([1, 0], 0),
    ],
)
def test_half_of_the_lead_is_tolerated(votes: list[int], tolerated: int) -> None:
    for order in (votes, votes[::-1]):
        assert tolerated_partitions(np.array([order])).tolist() == [tolerated]


def stays_ahead(ballots: tuple[int, ...], classes: int, changes: int) -> bool:
    """Tell whether the class with the most votes is alone in front after every change of so many votes."""
    winner = int(np.bincount(ballots, minlength=classes).argmax())
    for where in combinations(range(len(ballots)), changes):
        for new in product(range(classes), repeat=changes):
            changed = np.array(ballots)
            changed[list(where)] = new
            votes = np.bincount(changed, minlength=classes)
            if (np.delete(votes, winner) >= votes[winner]).any():
                return False
    return True


@pytest.mark.parametrize("experts", [2, 3, 5, 6])
def test_so_many_changed_votes_leave_the_answer_and_one_more_can_change_it(experts: int) -> None:
    for ballots in combinations_with_replacement(range(3), experts):
        tolerated = int(tolerated_partitions(np.bincount(ballots, minlength=3)[None])[0])
        assert not tolerated or stays_ahead(ballots, 3, tolerated)
        assert not stays_ahead(ballots, 3, tolerated + 1)


def test_the_mixture_answers_with_the_plurality_and_breaks_ties_by_the_mean(voters: Mixture, images: torch.Tensor) -> None:
    with torch.no_grad():
        told = voters(images).exp().numpy()
    votes, means = read_votes(told, 3), read_means(told, 3)
    most = votes == votes.max(axis=1, keepdims=True)
    assert (most.sum(axis=1) > 1).any()  # there are ties
    assert np.array_equal(told.argmax(axis=1), np.where(most, means, -1).argmax(axis=1))
