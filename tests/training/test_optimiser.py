"""The optimiser: what a step does, and that a saved one goes on exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.backbone import ResNet18
from training.optimiser import Optimiser
from training.recipe import Schedule

SCHEDULE = Schedule(epochs=1)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet18(width=8, num_classes=3).to(memory_format=torch.channels_last)


def train(network: nn.Module, optimiser: Optimiser, steps: range, lr: float = 0.02) -> None:
    for step in steps:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        network(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        optimiser.step(lr)


def hidden_kernels(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.ndim == 4 and parameter.shape[1] > 3]


def test_one_step_changes_every_parameter_and_clears_every_gradient(network: nn.Module) -> None:
    before = copy.deepcopy(network)
    train(network, Optimiser(network, SCHEDULE), range(1))
    for (name, parameter), old in zip(network.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(parameter, old), name
        assert torch.isfinite(parameter).all(), name
        assert parameter.grad is None, name


def test_kernels_are_set_to_the_root_of_their_outputs_in_length_and_keep_their_direction(network: nn.Module) -> None:
    before = copy.deepcopy(network)
    train(network, Optimiser(network, SCHEDULE), range(1), lr=0.0)
    assert len(hidden_kernels(network)) == 19  # 16 in blocks, 3 shortcuts
    for kernel, old in zip(hidden_kernels(network), hidden_kernels(before), strict=True):
        assert kernel.norm().item() == pytest.approx(len(kernel) ** 0.5, rel=1e-5)
        torch.testing.assert_close(kernel / kernel.norm(), old / old.norm())
    assert torch.equal(network.stem[0].weight, before.stem[0].weight)
    assert torch.equal(network.head.weight, before.head.weight)


def test_kernels_move_as_torchs_muon_moves_them(network: nn.Module) -> None:
    twin, optimiser = copy.deepcopy(network), Optimiser(network, SCHEDULE)
    kernels = hidden_kernels(twin)
    matrices = [nn.Parameter(kernel.detach().permute(0, 2, 3, 1).flatten(1)) for kernel in kernels]
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=SCHEDULE.momentum, nesterov=True, ns_steps=4)
    for step in range(3):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        twin.load_state_dict(network.state_dict())  # what is not a kernel is torch's SGD in both
        for each in (network, twin):
            each(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        for kernel, matrix in zip(kernels, matrices, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.permute(0, 2, 3, 1).flatten(1).contiguous()
            matrix.data.mul_(len(matrix) ** 0.5 / matrix.norm())
            kernel.grad = None
        reference.step()
        optimiser.step(0.02)
        for kernel, matrix in zip(hidden_kernels(network), matrices, strict=True):
            torch.testing.assert_close(kernel.detach().permute(0, 2, 3, 1).flatten(1), matrix.detach(), rtol=0, atol=1e-3)


def test_a_network_whose_kernels_would_not_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        Optimiser(ResNet18(width=8, num_classes=3), SCHEDULE)


def test_kernels_keep_their_storage_and_memory_format(network: nn.Module) -> None:
    places = [kernel.data_ptr() for kernel in hidden_kernels(network)]
    train(network, Optimiser(network, SCHEDULE), range(2))
    assert [kernel.data_ptr() for kernel in hidden_kernels(network)] == places
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in hidden_kernels(network))


def test_a_restored_optimiser_goes_on_bit_for_bit(network: nn.Module) -> None:
    optimiser = Optimiser(network, SCHEDULE)
    train(network, optimiser, range(2))
    state = {name: buffer.clone().contiguous() for name, buffer in optimiser.state().items()}
    twin = copy.deepcopy(network)
    train(network, optimiser, range(2, 4))

    restored = Optimiser(twin, SCHEDULE)
    restored.load_state(state)
    kept = {name: buffer.clone() for name, buffer in state.items()}
    train(twin, restored, range(2, 4))
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert all(torch.equal(state[name], buffer) for name, buffer in kept.items())


def test_the_state_is_empty_before_the_first_step_and_holds_every_parameter_after(network: nn.Module) -> None:
    optimiser = Optimiser(network, SCHEDULE)
    assert optimiser.state() == {}
    train(network, optimiser, range(1))
    assert len(optimiser.state()) == len(list(network.parameters()))
    assert all(buffer.abs().max() > 0 for buffer in optimiser.state().values())


def test_a_forgotten_momentum_is_noticed(network: nn.Module) -> None:
    optimiser = Optimiser(network, SCHEDULE)
    train(network, optimiser, range(2))
    twin = copy.deepcopy(network)
    train(network, optimiser, range(2, 3))
    train(twin, Optimiser(twin, SCHEDULE), range(2, 3))
    assert not torch.equal(hidden_kernels(network)[0], hidden_kernels(twin)[0])
    assert not torch.equal(network.head.weight, twin.head.weight)


def test_a_kernel_without_a_gradient_is_reported(network: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        Optimiser(network, SCHEDULE).step(0.1)
