"""Adversarial weight perturbation: where the weights go, and that they come back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.weight_perturbation import ascended


def linear() -> nn.Linear:
    """A weight of length 5 whose gradient points along its second entry."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.fill_(7.0)
    layer.weight.grad = torch.tensor([[0.0, -0.2]])
    layer.bias.grad = torch.tensor([1.0])
    return layer


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return layers.to(memory_format=torch.channels_last)


def loss(module: nn.Module) -> torch.Tensor:
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.cross_entropy(module(images), torch.arange(16) % 4)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_matrix_moves_along_its_gradient_by_gamma_times_its_length_and_a_vector_stays() -> None:
    layer = linear()
    with ascended(layer, 0.01):
        torch.testing.assert_close(layer.weight.detach(), torch.tensor([[3.0, 3.95]]))  # 4 - 0.01 * 5
        assert layer.bias.item() == 7
        assert layer.weight.grad is None
        assert layer.bias.grad is None
    assert layer.weight.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("gradient", [None, torch.zeros(1, 2)])
def test_a_weight_without_a_direction_stays(gradient: torch.Tensor | None) -> None:
    layer = linear()
    layer.weight.grad = gradient
    with ascended(layer, 0.01):
        assert layer.weight.tolist() == [[3.0, 4.0]]
    assert layer.weight.tolist() == [[3.0, 4.0]]


def test_a_weight_of_zeros_stays() -> None:
    layer = linear()
    nn.init.zeros_(layer.weight)
    with ascended(layer, 0.01):
        assert layer.weight.tolist() == [[0.0, 0.0]]


def test_the_loss_rises_and_every_bit_comes_back() -> None:
    module = network()
    before, pointers = weights(module), [parameter.data_ptr() for parameter in module.parameters()]
    start = loss(module)
    start.backward()
    with ascended(module, 0.02):
        assert loss(module) > start + 0.01
        moved = [not torch.equal(a, b) for a, b in zip(weights(module), before, strict=True)]
        assert moved == [parameter.ndim > 1 for parameter in module.parameters()]
    assert same(weights(module), before)
    assert [parameter.data_ptr() for parameter in module.parameters()] == pointers  # the optimiser holds views
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_weights_come_back_when_the_block_raises() -> None:
    module = network()
    before = weights(module)
    loss(module).backward()
    with pytest.raises(FloatingPointError, match="no loss"), ascended(module, 0.02):
        raise FloatingPointError("no loss")
    assert same(weights(module), before)


def test_the_gradients_afterwards_are_those_at_the_perturbed_weights() -> None:
    module, gamma = network(), 0.02
    moved = copy.deepcopy(module)
    parameters = list(moved.parameters())
    gradients = torch.autograd.grad(loss(moved), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.ndim > 1:
                parameter += gamma * parameter.norm() * gradient / gradient.norm()
    expected = torch.autograd.grad(loss(moved), parameters)

    loss(module).backward()
    with ascended(module, gamma):
        loss(module).backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected[0], gradients[0], rtol=0.01, atol=1e-6)


def test_a_negative_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma must be 0 or more, not -0\.1"), ascended(linear(), -0.1):
        pass


def test_a_forgotten_backward_is_refused() -> None:
    with pytest.raises(ValueError, match="backward"), ascended(nn.Linear(2, 1), 0.1):
        pass
