"""The mixture: what it computes, and which experts it runs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.architecture import Architecture
from model.mixture import Mixture

EXPERTS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def by_hand(mixture: Mixture, images: torch.Tensor, k: int = EXPERTS) -> torch.Tensor:
    """Return ``sum_k g_k softmax(z_k)`` over the ``k`` heaviest experts, image by image, in double precision."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mixture.architecture.mean, mixture.architecture.std))
    normalised = (images - mean) / std
    weights = mixture.gate(normalised).double().softmax(dim=1)
    answers = [expert(normalised).double().softmax(dim=1) for expert in mixture.experts]
    rows = []
    for image, row in enumerate(weights):
        chosen = sorted(range(len(row)), key=row.tolist().__getitem__, reverse=True)[:k]
        total = torch.stack([row[expert] for expert in chosen]).sum()
        rows.append(torch.stack([row[expert] / total * answers[expert][image] for expert in chosen]).sum(dim=0))
    return torch.stack(rows)


def with_top_k(mixture: Mixture, k: int | None) -> Mixture:
    changed = Mixture(mixture.architecture, k).eval()
    changed.load_state_dict(mixture.state_dict())
    return changed


def test_the_answer_is_the_log_of_the_weighted_sum_of_softmaxes(mixture: Mixture, images: torch.Tensor) -> None:
    log_probs = mixture(images)
    assert log_probs.shape == (33, 5)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), by_hand(mixture, images).log(), **CLOSE)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_probabilities_sum_to_one(mixture: Mixture, images: torch.Tensor, k: int | None) -> None:
    totals = with_top_k(mixture, k)(images).exp().sum(dim=1)
    torch.testing.assert_close(totals, torch.ones(33), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_top_k_renormalises_the_k_heaviest_experts(mixture: Mixture, images: torch.Tensor, k: int) -> None:
    torch.testing.assert_close(with_top_k(mixture, k)(images).double(), by_hand(mixture, images, k).log(), **CLOSE)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_extreme_logits_give_finite_log_probabilities_and_gradients(
    mixture: Mixture, images: torch.Tensor, k: int | None
) -> None:
    extreme = with_top_k(mixture, k)
    with torch.no_grad():
        extreme.gate.head.bias.copy_(torch.tensor([1e4, -1e4, 0.0]))
        for sign, expert in zip((1, -1, 1), extreme.experts, strict=True):
            expert.head.bias.copy_(sign * torch.tensor([1e4, -1e4, 0.0, 5e3, -5e3]))
    inputs = images[:4].clone().requires_grad_()
    log_probs = extreme(inputs)
    log_probs.sum().backward()
    assert torch.isfinite(log_probs).all()
    assert (log_probs.argmax(dim=1) == 0).all()
    assert inputs.grad is not None
    assert torch.isfinite(inputs.grad).all()


@pytest.mark.parametrize("k", range(1, EXPERTS))
def test_only_chosen_experts_run_and_only_on_their_images(mixture: Mixture, images: torch.Tensor, k: int) -> None:
    changed = with_top_k(mixture, k)
    images_seen = [0] * EXPERTS
    for index, expert in enumerate(changed.experts):

        def count(_: object, inputs: tuple[torch.Tensor], __: object, index: int = index) -> None:
            images_seen[index] += len(inputs[0])

        expert.register_forward_hook(count)
    changed(images)
    gate, _ = mixture.components(images)
    chosen = gate.topk(k, dim=1).indices.flatten()
    assert images_seen == [int((chosen == index).sum()) for index in range(EXPERTS)]
    assert sum(images_seen) == 33 * k
    images_seen[:] = [0] * EXPERTS
    changed(images[:1])
    assert sorted(images_seen) == [0] * (EXPERTS - k) + [1] * k


def test_top_k_is_refused_in_training_mode(mixture: Mixture, images: torch.Tensor) -> None:
    changed = with_top_k(mixture, 2).train()
    with pytest.raises(RuntimeError, match="inference only"):
        changed(images)


@pytest.mark.parametrize("k", [0, -1, EXPERTS + 1])
def test_top_k_out_of_range_is_refused(architecture: Architecture, k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be from 1 to {EXPERTS}"):
        Mixture(architecture, top_k=k)


def test_an_untrained_gate_averages_the_experts_uniformly(architecture: Architecture, images: torch.Tensor) -> None:
    fresh = Mixture(architecture).eval()
    normalised = fresh.normalise(images)
    average = torch.stack([expert(normalised).softmax(dim=1) for expert in fresh.experts]).mean(dim=0)
    torch.testing.assert_close(fresh(images).exp(), average, **CLOSE)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_the_gradient_at_the_image_passes_through_gate_and_experts(
    mixture: Mixture, images: torch.Tensor, k: int | None
) -> None:
    got, expected = images[:4].clone().requires_grad_(), images[:4].clone().requires_grad_()
    with_top_k(mixture, k)(got)[:, 0].sum().backward()
    by_hand(mixture, expected, k or EXPERTS)[:, 0].log().sum().backward()
    assert got.grad is not None
    assert expected.grad is not None
    assert got.grad.dtype == torch.float32
    assert (got.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_normalisation_happens_inside_the_model(mixture: Mixture, images: torch.Tensor) -> None:
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    inside = Mixture(replace(mixture.architecture, mean=mean, std=std)).eval()
    outside = Mixture(replace(mixture.architecture, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))).eval()
    for changed in (inside, outside):
        changed.load_state_dict(mixture.state_dict())
    shifted = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(inside(images), outside(shifted), **CLOSE)
    assert (inside(images) - outside(images)).abs().max() > 0.01


def test_an_image_is_judged_alike_alone_and_in_company(mixture: Mixture, images: torch.Tensor) -> None:
    for k in (None, 1, 2):
        changed = with_top_k(mixture, k)
        alone = torch.cat([changed(images[index : index + 1]) for index in range(7)])
        torch.testing.assert_close(changed(images)[:7], alone, **CLOSE)


def votes_by_hand(mixture: Mixture, images: torch.Tensor) -> torch.Tensor:
    """Return ``(votes + mean) / (E + 1)``, expert by expert, in double precision."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mixture.architecture.mean, mixture.architecture.std))
    total = torch.zeros(len(images), 5, dtype=torch.float64)
    for expert in mixture.experts:
        answer = expert((images - mean) / std).double().softmax(dim=1)
        total += answer / EXPERTS
        for row, label in enumerate(answer.argmax(dim=1).tolist()):
            total[row, label] += 1
    return total / (EXPERTS + 1)


def test_a_vote_answers_with_the_votes_and_the_mean(voters: Mixture, images: torch.Tensor) -> None:
    log_probs = voters(images)
    assert (log_probs.shape, log_probs.dtype) == ((33, 5), torch.float32)
    torch.testing.assert_close(log_probs.double(), votes_by_hand(voters, images).log(), **CLOSE)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(33), rtol=0, atol=1e-5)


def test_a_vote_has_no_gate_and_equal_weights(voters: Mixture, images: torch.Tensor) -> None:
    assert not [name for name in voters.state_dict() if name.startswith("gate")]
    torch.testing.assert_close(voters.components(images)[0].exp(), torch.full((33, 3), 1 / 3))


def test_a_vote_has_the_gradient_of_the_mean_and_stays_finite(voters: Mixture, images: torch.Tensor) -> None:
    extreme = copy.deepcopy(voters)
    with torch.no_grad():
        for expert in extreme.experts:
            expert.head.weight.mul_(1e4)
    for mixture in (voters, extreme):
        inputs = images.clone().requires_grad_()
        mixture(inputs)[:, 0].sum().backward()
        assert inputs.grad is not None
        assert inputs.grad.isfinite().all()
        assert inputs.grad.abs().sum() > 0
        assert mixture(images).isfinite().all()


def test_every_expert_of_a_vote_has_its_say(voters: Mixture) -> None:
    with pytest.raises(ValueError, match="top_k=2: every expert of a vote has its say"):
        Mixture(voters.architecture, top_k=2)
    assert Mixture(voters.architecture, top_k=3).top_k == 3
