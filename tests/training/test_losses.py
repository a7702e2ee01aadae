"""The terms of the joint loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from training.losses import expert_cross_entropy, load_balance, mixture_cross_entropy

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
LABELS = torch.tensor([0, 2])


def test_cross_entropy_is_the_mean_negative_log_of_the_true_class() -> None:
    loss = mixture_cross_entropy(PROBABILITIES.log(), LABELS)
    assert loss.item() == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_smoothing_gives_every_class_its_share() -> None:
    loss = mixture_cross_entropy(PROBABILITIES[:1].log(), LABELS[:1], smoothing=0.3)
    assert loss.item() == pytest.approx(0.8 * math.log(2) + 0.1 * math.log(4) + 0.1 * math.log(4))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_torchs_own(smoothing: float) -> None:
    logits = 3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 10
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(mixture_cross_entropy(logits.log_softmax(dim=1), labels, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_expert_term_is_the_mean_of_the_experts_own_losses(smoothing: float) -> None:
    log_probs = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(dim=2)
    labels = torch.tensor([0, 4, 2, 2])
    own = [mixture_cross_entropy(log_probs[:, expert], labels, smoothing) for expert in range(3)]
    torch.testing.assert_close(expert_cross_entropy(log_probs, labels, smoothing), torch.stack(own).mean())


def test_load_balance_is_zero_when_all_experts_are_used_alike() -> None:
    uniform = torch.full((4, 9), 1 / 9).log()
    sharp_but_spread = torch.eye(9).log()  # each image uses one expert, the batch uses all
    assert load_balance(uniform).item() == pytest.approx(0, abs=1e-6)
    assert load_balance(sharp_but_spread).item() == pytest.approx(0, abs=1e-6)


def test_load_balance_is_the_log_of_the_number_of_experts_when_one_is_used() -> None:
    one_hot = torch.eye(9)[torch.zeros(4, dtype=torch.int64)].log()
    assert load_balance(one_hot).item() == pytest.approx(math.log(9), abs=1e-5)


def test_load_balance_by_hand() -> None:
    gate = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert load_balance(gate).item() == pytest.approx(math.log(2) - entropy, abs=1e-6)


def test_load_balance_pulls_weight_from_the_expert_used_most() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    load_balance(logits.log_softmax(dim=1)).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0
    assert (logits.grad[0, 1:] < 0).all()
