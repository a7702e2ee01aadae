"""The joint loss."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.mixture import Mixture, mix
from training.joint import joint_loss
from training.recipe import RECIPES, JointLoss, Recipe

WEIGHTS = {"adversarial": 1.0, "clean": 0.25, "experts": 0.5, "balance": 0.1}


@pytest.fixture
def network(mixture: Mixture) -> Mixture:
    return copy.deepcopy(mixture).train()


@pytest.fixture
def recipe(mixture: Mixture) -> Recipe:
    return replace(RECIPES["compact"], architecture=mixture.architecture)


def labels() -> torch.Tensor:
    return torch.arange(8) % 5


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_loss_is_the_weighted_sum_of_its_terms(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    total, values = joint_loss(network, recipe, images[:8], labels(), generator())
    gate = values.pop("gate")
    assert values.keys() == WEIGHTS.keys()
    expected = sum(WEIGHTS[name] * value for name, value in values.items() if isinstance(value, float))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert isinstance(gate, list)
    assert sum(gate) == pytest.approx(1, abs=1e-5)
    assert len(gate) == 3


@pytest.mark.parametrize("term", ["clean", "experts", "balance"])
def test_a_weight_of_zero_turns_its_term_off(network: Mixture, recipe: Recipe, images: torch.Tensor, term: str) -> None:
    changed = replace(recipe, loss=replace(JointLoss(), **{term: 0.0}))
    total, values = joint_loss(network, changed, images[:8], labels(), generator())
    assert values.keys() == WEIGHTS.keys() - {term} | {"gate"}
    assert torch.isfinite(total)


def test_the_terms_are_computed_on_images_attacked_through_gate_and_experts(
    network: Mixture, recipe: Recipe, images: torch.Tensor
) -> None:
    changed = replace(recipe, loss=replace(JointLoss(), clean=0.0), joint_steps=3)
    _, attacked = joint_loss(copy.deepcopy(network), changed, images[:8], labels(), generator())
    gate, experts = network.components(images[:8])
    unharmed = torch.nn.functional.nll_loss(mix(gate, experts), labels()).item()
    assert isinstance(attacked["adversarial"], float)
    assert attacked["adversarial"] > unharmed


def test_every_parameter_gets_a_gradient_and_statistics_move_once(
    network: Mixture, recipe: Recipe, images: torch.Tensor
) -> None:
    counts = [int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]
    total, _ = joint_loss(network, recipe, images[:8], labels(), generator())
    assert all(parameter.grad is None for parameter in network.parameters())
    total.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in network.parameters())
    after = [int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert after == [count + 1 for count in counts]  # the attack leaves no trace


def test_label_smoothing_reaches_the_loss(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    smooth = replace(recipe, joint=replace(recipe.joint, label_smoothing=0.5))
    values = [joint_loss(copy.deepcopy(network), r, images[:8], labels(), generator())[1] for r in (recipe, smooth)]
    for term in ("adversarial", "clean", "experts"):
        assert values[0][term] != values[1][term]


def test_the_attack_follows_the_generator(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    totals = [joint_loss(copy.deepcopy(network), recipe, images[:8], labels(), g)[0].item() for g in (generator(), generator())]
    other = joint_loss(copy.deepcopy(network), recipe, images[:8], labels(), torch.Generator().manual_seed(9))[0].item()
    assert totals[0] == totals[1]
    assert totals[0] != other
