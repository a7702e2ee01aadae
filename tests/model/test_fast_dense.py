"""How experts are stacked; what stacks of them answer is compared in test_fast.py."""

from __future__ import annotations

import copy

import pytest
import torch

from model.fast import fold_batch_norms
from model.fast_dense import DenseMixture, StackedExperts
from model.mixture import Mixture


def test_a_top_k_of_all_experts_is_dense(mixture: Mixture, images: torch.Tensor) -> None:
    all_three = copy.deepcopy(mixture)
    all_three.top_k = 3
    ours, theirs = (DenseMixture(each, torch.float32).predict(images) for each in (all_three, mixture))
    assert torch.equal(ours.probabilities, theirs.probabilities)


@pytest.mark.parametrize("stack", [0, 4])
def test_a_stack_of_more_or_fewer_experts_than_there_are_is_refused(mixture: Mixture, stack: int) -> None:
    with pytest.raises(ValueError, match=f"stack must be from 1 to 3 .* not {stack}"):
        DenseMixture(mixture, torch.float32, stack)


def test_stacked_experts_give_every_experts_logits(mixture: Mixture, images: torch.Tensor) -> None:
    folded = fold_batch_norms(copy.deepcopy(mixture))
    with torch.no_grad():
        expected = torch.stack([expert(images) for expert in mixture.experts], dim=1)
        got = StackedExperts(list(folded.experts))(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_experts_with_batch_norms_are_not_stacked(mixture: Mixture) -> None:
    with pytest.raises(ValueError, match=r"after the expert's stem\.0 is not folded"):
        StackedExperts(list(mixture.experts))
