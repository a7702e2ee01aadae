"""The networks that are compared: made of one mixture's parts."""

from __future__ import annotations

import copy

import pytest
import torch

from model.mixture import Mixture, mix
from training.attack import LogProbs
from training.evaluation.networks import components, networks, routed, through_experts_only, through_gate_only


def test_the_uniform_average_and_the_experts_are_what_they_are_called(mixture: Mixture, images: torch.Tensor) -> None:
    named = networks(mixture)
    assert list(named) == ["mixture", "uniform average", "expert 0", "expert 1", "expert 2"]
    with torch.no_grad():
        alone = torch.stack([named[f"expert {index}"](images).exp() for index in range(3)])
        torch.testing.assert_close(named["uniform average"](images).exp(), alone.mean(dim=0), rtol=0, atol=1e-6)
        weights = mixture.components(images)[0].exp()
        mixed = torch.einsum("be,ebc->bc", weights, alone)
        torch.testing.assert_close(named["mixture"](images).exp(), mixed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, None])
def test_routing_shares_the_weights_and_answers_as_deployed(mixture: Mixture, images: torch.Tensor, k: int | None) -> None:
    deployed = copy.deepcopy(mixture)
    deployed.top_k = k
    other = routed(mixture, k)
    assert mixture.top_k is None
    assert all(a is b for a, b in zip(other.parameters(), mixture.parameters(), strict=True))
    with torch.no_grad():
        expected = deployed(images)
        torch.testing.assert_close(other(images), expected)
        torch.testing.assert_close(mix(*components(other, images)), expected)


@pytest.mark.parametrize("k", [2, None])
def test_the_gradients_through_the_parts_add_up_to_the_whole(mixture: Mixture, images: torch.Tensor, k: int | None) -> None:
    network = routed(mixture, k)
    inputs = images[:8].clone().requires_grad_(True)

    def answer_and_slope(log_probs: LogProbs) -> tuple[torch.Tensor, torch.Tensor]:
        answer = log_probs(inputs)
        return answer, torch.autograd.grad(answer[:, 1].sum(), inputs)[0]

    whole, gate, experts = map(answer_and_slope, (network, through_gate_only(network), through_experts_only(network)))
    for part, slope in (gate, experts):
        torch.testing.assert_close(part, whole[0])
        assert slope.abs().max() > 0.05 * whole[1].abs().max()
    torch.testing.assert_close(gate[1] + experts[1], whole[1], rtol=1e-3, atol=1e-4 * whole[1].abs().max().item())
