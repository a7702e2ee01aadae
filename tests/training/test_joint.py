"""The joint loss."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.mixture import Mixture, mix
from training.data import Split
from training.joint import JointTask
from training.recipe import RECIPES, JointLoss, Recipe

WEIGHTS = {"adversarial": 1.0, "clean": 0.25, "experts": 0.5, "balance": 0.1}
CPU = torch.device("cpu")


@pytest.fixture
def network(mixture: Mixture) -> Mixture:
    return copy.deepcopy(mixture).train()


@pytest.fixture
def recipe(mixture: Mixture) -> Recipe:
    return replace(RECIPES["compact"], architecture=mixture.architecture)


def labels() -> torch.Tensor:
    return torch.arange(8) % 5


def step(network: Mixture, recipe: Recipe, images: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Attack a batch and return the loss and its terms, as the stage does."""
    holdout = Split((images * 255).to(torch.uint8), torch.arange(len(images)) % 5)
    task = JointTask(network, recipe, holdout, CPU).train()
    choices, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    attacked = task.attack(images[:8], labels(), choices, noise)
    total, terms = task(attacked, images[:8], labels())
    return total, terms


def test_the_loss_is_the_weighted_sum_of_its_terms(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    total, terms = step(network, recipe, images)
    gate = terms.pop("gate")
    assert terms.keys() == WEIGHTS.keys()
    assert total.item() == pytest.approx(sum(WEIGHTS[name] * term.item() for name, term in terms.items()), rel=1e-5)
    assert gate.shape == (3,)
    assert gate.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("term", ["clean", "experts", "balance"])
def test_a_weight_of_zero_turns_its_term_off(network: Mixture, recipe: Recipe, images: torch.Tensor, term: str) -> None:
    changed = replace(recipe, loss=replace(JointLoss(), **{term: 0.0}))
    total, terms = step(network, changed, images)
    assert terms.keys() == WEIGHTS.keys() - {term} | {"gate"}
    assert torch.isfinite(total)


def test_diversity_is_rewarded_where_it_has_a_weight(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    plain, _ = step(copy.deepcopy(network), recipe, images)
    total, terms = step(network, replace(recipe, loss=replace(JointLoss(), diversity=0.5)), images)
    assert total.item() == pytest.approx(plain.item() + 0.5 * terms["diversity"].item(), rel=1e-4)
    twins = copy.deepcopy(network)
    for expert in twins.experts:
        expert.load_state_dict(twins.experts[0].state_dict())
    _, alike = step(twins, replace(recipe, loss=replace(JointLoss(), diversity=0.5)), images)
    assert alike["diversity"] > terms["diversity"]  # it is a loss: less is more diverse


def test_training_with_top_k_leaves_the_other_experts_out_of_the_mixture(
    network: Mixture, recipe: Recipe, images: torch.Tensor
) -> None:
    only = replace(recipe.loss, top_k=2, clean=0.0, experts=0.0, balance=0.0)
    network.gate.head.weight.data.zero_()
    network.gate.head.bias.data.copy_(torch.tensor([0.0, 5.0, 4.0]))
    total, _ = step(network, replace(recipe, loss=only), images)
    total.backward()
    moved = [any(p.grad is not None and p.grad.abs().max() > 1e-12 for p in expert.parameters()) for expert in network.experts]
    assert moved == [False, True, True]


def test_the_terms_are_computed_on_images_attacked_through_gate_and_experts(
    network: Mixture, recipe: Recipe, images: torch.Tensor
) -> None:
    changed = replace(recipe, loss=replace(JointLoss(), clean=0.0), joint_steps=3)
    _, attacked = step(copy.deepcopy(network), changed, images)
    gate, experts = network.components(images[:8])
    unharmed = torch.nn.functional.nll_loss(mix(gate, experts), labels()).item()
    assert attacked["adversarial"].item() > unharmed


def test_every_parameter_gets_a_gradient_and_statistics_move_once(
    network: Mixture, recipe: Recipe, images: torch.Tensor
) -> None:
    counts = [int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]
    total, _ = step(network, recipe, images)
    assert all(parameter.grad is None for parameter in network.parameters())  # the attack computes none
    total.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in network.parameters())
    after = [int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert after == [count + 1 for count in counts]  # the attack leaves no trace


def test_statistics_that_are_not_held_move_with_the_attack_too(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    step(network, replace(recipe, joint=replace(recipe.joint, hold_statistics=False)), images)
    counts = {int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {3}  # the fixture's one, the attack, the training pass


def test_label_smoothing_reaches_the_loss(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    smooth = replace(recipe, joint=replace(recipe.joint, label_smoothing=0.5))
    values = [step(copy.deepcopy(network), r, images)[1] for r in (recipe, smooth)]
    for term in ("adversarial", "clean", "experts"):
        assert values[0][term] != values[1][term]


def test_the_attack_follows_the_generator(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    totals = [step(copy.deepcopy(network), recipe, images)[0].item() for _ in range(2)]
    other = step(copy.deepcopy(network), recipe, images, seed=9)[0].item()
    assert totals[0] == totals[1]
    assert totals[0] != other


def test_iterated_the_joint_attack_leaves_the_ball_no_more(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    task = JointTask(network, recipe, Split((images * 255).to(torch.uint8), torch.arange(len(images)) % 5), CPU).train()
    reach = {}
    for task.iterated in (False, True):
        attacked = task.attack(images[:8], labels(), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0))
        reach[task.iterated] = (attacked - images[:8]).abs().max().item()
    assert reach[True] <= 8 / 255 + 1e-6 < reach[False]


def test_a_gates_temperature_changes_how_it_learns_but_not_what_it_answers(mixture: Mixture, images: torch.Tensor) -> None:
    warm = copy.deepcopy(mixture)
    warm.gate.set_temperature(0.25)
    torch.testing.assert_close(warm(images), mixture(images))
    with torch.no_grad():
        warm.gate.head.bias.add_(torch.tensor([0.1, 0.0, 0.0]))
    sharper, plain = warm.components(images)[0], mixture.components(images)[0]
    torch.testing.assert_close((sharper - plain)[:, 0] - (sharper - plain)[:, 1], torch.full((len(images),), 0.4))
    warm.gate.set_temperature(1.0)
    torch.testing.assert_close(warm.components(images)[0], sharper)


def test_a_small_part_of_a_batch_keeps_a_clean_image(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    _, terms = step(network, replace(recipe, loss=replace(recipe.loss, clean_share=0.01)), images)
    assert "clean" in terms


def test_a_trimmed_sample_moves_nothing_clean_or_attacked(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    whole = replace(recipe, loss=JointLoss(clean_share=1.0), joint=replace(recipe.joint, precision="float32"))
    task = JointTask(network, whole, Split((images * 255).to(torch.uint8), torch.arange(len(images)) % 5), CPU).eval()
    task.trim = 0.4
    attacked, clean = images[8:16].clone().requires_grad_(), images[:8].clone().requires_grad_()
    total, terms = task(attacked, clean, labels())
    total.backward()
    losses = -network(attacked).detach()[torch.arange(8), labels()]
    dropped = set(losses.argsort()[-3:].tolist())  # 3.2 samples: whole ones only
    for given in (attacked, clean):
        assert given.grad is not None
        assert set((given.grad.flatten(1) == 0).all(dim=1).nonzero().flatten().tolist()) == dropped
    assert terms["adversarial"].item() == pytest.approx(losses.sort().values[:5].mean().item(), rel=1e-4)


def test_trimming_may_leave_no_clean_image(network: Mixture, recipe: Recipe, images: torch.Tensor) -> None:
    task = JointTask(network, recipe, Split((images * 255).to(torch.uint8), torch.arange(len(images)) % 5), CPU).train()
    task.trim = 0.9
    seen = []
    for shift in range(8):
        total, terms = task(images[:8].roll(shift, 0), images[:8].roll(shift, 0), labels().roll(shift))
        assert torch.isfinite(total)
        seen.append("clean" in terms)
    assert True in seen
    assert False in seen
