"""The terms of the losses, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.mixture import Mixture, mix
from training.losses import (
    RIDGE,
    expert_cross_entropy,
    expert_diversity,
    keep_top_k,
    kl_divergence,
    load_balance,
    mart,
    mixture_cross_entropy,
    trades,
    without_highest,
)

PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
LABELS = torch.tensor([0, 2])
SHARED = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]])
"""Targets as CutMix makes them."""
ATTACKED = torch.tensor([[0.125, 0.125, 0.75], [0.25, 0.5, 0.25]])
LN2, LN3 = math.log(2), math.log(3)
DIVERGENCES = (1.25 * LN2 - 0.25 * LN3, 0.75 * LN3 - LN2)
"""``KL(PROBABILITIES || ATTACKED)`` per image: 0.5 ln 4 + 0.25 ln 2 - 0.25 ln 3, and -2 * 0.125 ln 2 + 0.75 ln 1.5."""


def log_probs_of(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).log_softmax(dim=-1)


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


def test_cross_entropy_of_shared_labels_weighs_every_class_by_its_share() -> None:
    loss = mixture_cross_entropy(PROBABILITIES.log(), SHARED)
    first = 0.75 * math.log(2) + 0.25 * math.log(4)
    second = 0.5 * math.log(4 / 3) + 0.5 * math.log(8)
    assert loss.item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_certain_probabilities_are_classes(smoothing: float) -> None:
    labels = torch.tensor([0, 4, 2, 2])
    certain, experts = F.one_hot(labels, 5).float(), log_probs_of(0, 4, 3, 5)
    for loss, log_probs in ((mixture_cross_entropy, experts[:, 0]), (expert_cross_entropy, experts)):
        torch.testing.assert_close(loss(log_probs, certain, smoothing), loss(log_probs, labels, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_of_shared_labels_is_torchs_own(smoothing: float) -> None:
    logits = 3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    shares = log_probs_of(1, 16, 10).exp()
    expected = F.cross_entropy(logits, shares, label_smoothing=smoothing)
    torch.testing.assert_close(mixture_cross_entropy(logits.log_softmax(dim=1), shares, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_expert_term_is_the_mean_of_the_experts_own_losses(smoothing: float) -> None:
    log_probs = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(dim=2)
    labels = torch.tensor([0, 4, 2, 2])
    own = [mixture_cross_entropy(log_probs[:, expert], labels, smoothing) for expert in range(3)]
    torch.testing.assert_close(expert_cross_entropy(log_probs, labels, smoothing), torch.stack(own).mean())


def test_the_expert_term_of_shared_labels_is_the_mean_of_the_experts_own_losses() -> None:
    log_probs = torch.stack([PROBABILITIES, ATTACKED], dim=1).log()  # (2, 2, 3)
    first = 0.75 * math.log(2) + 0.25 * math.log(4) + 0.5 * math.log(4 / 3) + 0.5 * math.log(8)
    second = 0.75 * math.log(8) + 0.25 * math.log(8) + 0.5 * math.log(2) + 0.5 * math.log(4)
    assert expert_cross_entropy(log_probs, SHARED).item() == pytest.approx((first + second) / 4)


def test_the_divergence_by_hand() -> None:
    assert kl_divergence(PROBABILITIES.log(), ATTACKED.log()).item() == pytest.approx(sum(DIVERGENCES) / 2)


@settings(deadline=None, max_examples=30)
@given(first=st.integers(0, 999), second=st.integers(0, 999), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_the_divergence_is_zero_only_between_equal_answers(first: int, second: int, scale: float) -> None:
    clean, attacked = log_probs_of(first, 4, 5, scale=scale), log_probs_of(second, 4, 5, scale=scale)
    value = kl_divergence(clean, attacked).item()
    assert value == 0 if first == second else value > 1e-6


def test_trades_is_the_clean_loss_and_the_weighted_divergence() -> None:
    clean = (math.log(2) + math.log(8)) / 2
    loss = trades(PROBABILITIES.log(), ATTACKED.log(), LABELS, beta=6)
    assert loss.item() == pytest.approx(clean + 6 * sum(DIVERGENCES) / 2)


def test_trades_takes_shared_labels_and_smoothing() -> None:
    loss = trades(PROBABILITIES.log(), ATTACKED.log(), SHARED, beta=6, smoothing=0.1)
    clean = F.cross_entropy(PROBABILITIES.log(), SHARED, label_smoothing=0.1).item()
    assert loss.item() == pytest.approx(clean + 6 * sum(DIVERGENCES) / 2)


def test_trades_pulls_both_answers_together_whatever_the_label_says() -> None:
    clean = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    attacked = torch.tensor([[0.0, 2.0, 0.0]], requires_grad=True)
    trades(clean.log_softmax(dim=1), attacked.log_softmax(dim=1), torch.tensor([2]), beta=6).backward()
    assert clean.grad is not None
    assert attacked.grad is not None
    assert clean.grad[0, 0] > 0 > clean.grad[0, 1]
    assert attacked.grad[0, 0] < 0 < attacked.grad[0, 1]


def test_mart_by_hand() -> None:
    labels = torch.tensor([0, 1])
    first = -math.log(0.125) - math.log(1 - 0.75) + 5 * DIVERGENCES[0] * (1 - 0.5)
    second = -math.log(0.5) - math.log(1 - 0.25) + 5 * DIVERGENCES[1] * (1 - 0.75)
    loss = mart(PROBABILITIES.log(), ATTACKED.log(), labels, beta=5)
    assert loss.item() == pytest.approx((first + second) / 2)


def test_mart_asks_more_of_an_image_that_is_misclassified() -> None:
    attacked, label = torch.tensor([[0.4, 0.3, 0.3]]).log(), torch.tensor([0])
    extra = []
    for clean in ([[0.8, 0.1, 0.1]], [[0.1, 0.8, 0.1]]):
        answer = torch.tensor(clean).log()
        added = mart(answer, attacked, label, beta=1) - mart(answer, attacked, label, beta=0)
        extra.append((added / kl_divergence(answer, attacked)).item())
    assert extra == pytest.approx([0.2, 0.9], rel=1e-4)


def test_mart_is_finite_where_a_wrong_class_rounds_to_certainty() -> None:
    logits = torch.tensor([[0.0, 60.0, 0.0]], requires_grad=True)
    log_probs = logits.log_softmax(dim=1)
    assert log_probs[0, 1].exp() == 1
    loss = mart(log_probs, log_probs, torch.tensor([0]), beta=5)
    loss.backward()
    assert loss.item() == pytest.approx(60 + 60 - LN2)  # -ln e^-60 - ln(2 e^-60)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] > 1.9


def test_mart_refuses_shared_labels() -> None:
    with pytest.raises(ValueError, match=r"CutMix and MART can't be combined"):
        mart(PROBABILITIES.log(), ATTACKED.log(), SHARED, beta=5)


def test_diversity_by_hand() -> None:
    experts = torch.tensor([[[0.3, 0.3, 0.4], [0.3, 0.4, 0.3]], [[0.1, 0.2, 0.7], [0.2, 0.1, 0.7]]])
    # Wrong classes only, at unit length: (0.6, 0.8) and (0.8, 0.6), then (1, 2) / sqrt 5 and (2, 1) / sqrt 5.
    expected = [math.log((1 + RIDGE) ** 2 - cosine**2) for cosine in (0.96, 0.8)]
    value = expert_diversity(experts.log(), LABELS)
    assert value.item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert value.dtype == torch.float32
    assert expert_diversity(experts.log(), torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.4, 0.6]])).item() == value.item()


def test_diversity_is_numpys_determinant_for_many_experts() -> None:
    experts, labels = log_probs_of(0, 6, 9, 12), torch.arange(6)
    expected = []
    for answers, label in zip(experts.double().exp().numpy(), labels.tolist(), strict=True):
        wrong = np.delete(answers, label, axis=1)  # (9, 11)
        wrong /= np.linalg.norm(wrong, axis=1, keepdims=True)
        expected.append(np.linalg.slogdet(wrong @ wrong.T + RIDGE * np.eye(9))[1])
    assert expert_diversity(experts, labels).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_diversity_ranges_from_alike_experts_to_experts_that_suspect_different_classes() -> None:
    label = torch.tensor([0])
    alike = torch.tensor([[[0.4, 0.3, 0.2, 0.1]] * 3])
    apart = torch.full((1, 3, 4), 1e-9)
    apart[:, :, 0] = 0.5
    apart[0, range(3), range(1, 4)] = 0.5
    assert expert_diversity(alike.log(), label).item() == pytest.approx(math.log(RIDGE**2 * (3 + RIDGE)), rel=1e-4)
    assert expert_diversity(apart.log(), label).item() == pytest.approx(3 * math.log(1 + RIDGE), rel=1e-3)


def test_diversity_has_finite_gradients_when_there_are_more_experts_than_classes() -> None:
    logits = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = expert_diversity(logits.log_softmax(dim=2), torch.arange(4))
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert expert_diversity((logits + 0.01 * gradient.sign()).log_softmax(dim=2), torch.arange(4)) > value


def test_diversity_sees_directions_of_tiny_probabilities_also_under_autocast() -> None:
    logits, label = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    sure = logits.clone()
    sure[:, :, 2] = 200.0  # the wrong classes have probabilities that float32 can't hold
    expected = expert_diversity(logits.log_softmax(dim=2), label)
    with torch.autocast("cpu", torch.bfloat16):
        value = expert_diversity(sure.log_softmax(dim=2), label)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


def test_the_largest_weights_are_kept_and_renormalised() -> None:
    gate = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
    torch.testing.assert_close(keep_top_k(gate, 1).exp(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(keep_top_k(gate[:1], 2).exp(), torch.tensor([[0.625, 0.375, 0.0]]))
    torch.testing.assert_close(keep_top_k(gate, 3), gate)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_kept_weights_make_what_the_mixture_answers_with_top_k(mixture: Mixture, images: torch.Tensor, k: int) -> None:
    served = Mixture(mixture.architecture, top_k=k).eval()
    served.load_state_dict(mixture.state_dict())
    with torch.no_grad():
        gate, experts = mixture.components(images)
        trained = mix(keep_top_k(gate, k), experts)
        torch.testing.assert_close(trained, served(images), rtol=1e-4, atol=1e-5)


def test_dropped_experts_get_no_gradient_and_kept_ones_do() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, -200.0]], requires_grad=True)
    experts = log_probs_of(0, 1, 4, 3).requires_grad_()
    kept = keep_top_k(logits.log_softmax(dim=1), 2)
    (mixture_cross_entropy(mix(kept, experts), torch.tensor([1])) + load_balance(kept)).backward()
    assert logits.grad is not None
    assert experts.grad is not None
    assert (logits.grad[0, 2:].abs() < 1e-6).all()
    assert (experts.grad[0, 2:] == 0).all()
    assert (logits.grad[0, :2].abs() > 1e-3).all()
    assert (experts.grad[0, :2, 1] < 0).all()


def test_more_experts_than_there_are_can_not_be_kept() -> None:
    with pytest.raises(ValueError, match="top_k must be from 1 to 3"):
        keep_top_k(torch.zeros(1, 3), 4)


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


def train_a_gate(balance: float) -> float:
    """Return the entropy of the mean gate weights after training a linear gate over three experts, of which one is better."""
    features = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(32, dtype=torch.int64)
    experts = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.3, 0.7]]).log().expand(32, 3, 2)
    gate = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(gate.weight)
    torch.nn.init.zeros_(gate.bias)
    optimiser = torch.optim.SGD(gate.parameters(), lr=2.0)
    for _ in range(300):
        weights = gate(features).log_softmax(dim=1)
        loss = mixture_cross_entropy(mix(weights, experts), labels) + balance * load_balance(weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return math.log(3) - load_balance(gate(features).log_softmax(dim=1)).item()


def test_balancing_keeps_the_experts_in_use_where_the_gate_would_collapse_onto_one() -> None:
    assert train_a_gate(balance=0) < 0.1
    assert train_a_gate(balance=1) > 0.8  # of ln 3 = 1.1


def test_trimming_leaves_out_the_samples_of_the_highest_loss() -> None:
    first = torch.tensor([0.9, 0.2, 0.5, 0.05, 0.6])
    log_probs, labels = torch.stack([first, 1 - first], dim=1).log(), torch.zeros(5, dtype=torch.int64)
    assert without_highest(log_probs, labels, 0.4).tolist() == [0, 2, 4]  # 0.05 and 0.2 are the least likely
    assert without_highest(log_probs, labels, 0.39).tolist() == [0, 1, 2, 4]  # 1.95 samples: whole ones only
    assert without_highest(log_probs, labels, 0.1).tolist() == [0, 1, 2, 3, 4]
    assert without_highest(log_probs, labels, 0.99).tolist() == [0]
    swapped = torch.tensor([[0.0, 1.0]] * 5)
    assert without_highest(log_probs, swapped, 0.4).tolist() == [1, 2, 3]
    unsure = torch.stack([first, 1 - first], dim=1)
    unsure[3] = torch.tensor([0.95, 0.05])  # who agrees with unsure targets stays, who contradicts sure ones goes
    assert without_highest(log_probs, unsure, 0.2).tolist() == [0, 1, 2, 4]
