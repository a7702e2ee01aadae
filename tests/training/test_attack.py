"""The attacks: where they start, how they step, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from model.mixture import Mixture
from tests.training.evaluation.linear import linear
from training.attack import Attack, frozen_statistics, perturb

EPSILON = 8 / 255
ATTACKS = {
    "FGSM": Attack.fgsm(EPSILON),
    "N-FGSM": Attack.noise_fgsm(EPSILON),
    "N-FGSM, iterated": Attack.noise_fgsm(EPSILON).iterated(),
    "PGD": Attack.pgd(EPSILON, steps=4, step_size=2 / 255),
    "PGD with steps beyond the ball": Attack.pgd(EPSILON, steps=2, step_size=1.0),
    "margin PGD": Attack.pgd(EPSILON, steps=4, step_size=2 / 255, objective="margin"),
}
PROJECTED = [name for name, attack in ATTACKS.items() if attack.project]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def extreme(images: torch.Tensor) -> torch.Tensor:
    """Eight images, a third of whose pixels are fully black or fully white."""
    chance = torch.rand(8, 3, 16, 16, generator=generator(99))  # not the attacks' seed: noise must not follow it
    return images[:8].where(chance > 0.15, 0.0).where(chance < 0.85, 1.0)


@pytest.fixture(scope="module")
def labels(mixture: Mixture, extreme: torch.Tensor) -> torch.Tensor:
    return mixture(extreme).argmax(dim=1)


@pytest.mark.parametrize("name", PROJECTED)
def test_the_result_stays_in_the_ball_and_among_the_images(
    mixture: Mixture, extreme: torch.Tensor, labels: torch.Tensor, name: str
) -> None:
    kept = extreme.clone()
    result = perturb(mixture, extreme, labels, ATTACKS[name], generator())
    assert (result - extreme).abs().max() <= EPSILON + 1e-6
    assert (result - extreme).abs().max() > EPSILON / 2
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(extreme, kept)


@pytest.mark.parametrize("name", ATTACKS)
def test_only_the_images_get_gradients_and_the_result_has_no_history(
    mixture: Mixture, extreme: torch.Tensor, labels: torch.Tensor, name: str
) -> None:
    network = copy.deepcopy(mixture)
    result = perturb(network, extreme, labels, ATTACKS[name], generator())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert not result.requires_grad
    assert result.dtype == torch.float32
    assert not extreme.requires_grad


def test_fgsm_on_a_linear_model_is_the_sign_step_by_hand() -> None:
    weights = torch.randn(48, 3, generator=generator(3))
    images = torch.rand(5, 3, 4, 4, generator=generator(4))
    labels = torch.tensor([0, 1, 2, 0, 1])
    result = perturb(lambda x: x.flatten(1) @ weights, images, labels, Attack.fgsm(0.1), generator())
    errors = (images.flatten(1) @ weights).softmax(dim=1)
    errors[torch.arange(5), labels] -= 1
    expected = (images + 0.1 * (errors @ weights.T).sign().view_as(images)).clamp(0, 1)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_a_margin_step_on_a_linear_model_by_hand() -> None:
    weights = torch.randn(48, 3, generator=generator(3))
    images = torch.rand(5, 3, 4, 4, generator=generator(4))
    labels = torch.tensor([0, 1, 2, 0, 1])
    attack = Attack(epsilon=0.1, steps=1, step_size=0.1, objective="margin")
    result = perturb(lambda x: x.flatten(1) @ weights, images, labels, attack, generator())
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        logits = image.flatten() @ weights
        rival = max((other for other in range(3) if other != label), key=lambda other: logits[other].item())
        expected = (image + 0.1 * (weights[:, rival] - weights[:, label]).sign().view(3, 4, 4)).clamp(0, 1)
        torch.testing.assert_close(result[index], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
@pytest.mark.parametrize("epsilon", [2 / 255, 8 / 255, 20 / 255])
def test_between_two_classes_pgd_breaks_exactly_what_can_be_broken(epsilon: float, objective: Any) -> None:
    network = linear(classes=2)
    attack = Attack.pgd(epsilon, 10, epsilon / 4, objective=objective)
    robust = network.robust(epsilon)
    assert torch.equal(network.bench.correct(network, attack), robust)
    assert 10 < robust.sum() < 98


@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
def test_among_five_classes_pgd_breaks_nothing_that_cannot_be_broken_and_nearly_all_else(objective: Any) -> None:
    network = linear(classes=5)
    right = network.bench.correct(network, Attack.pgd(EPSILON, 20, 2 / 255, objective=objective))
    robust = network.robust(EPSILON)
    assert 10 < robust.sum() < 90
    assert not (robust & ~right).any()
    assert (right & ~robust).sum() < 10


def test_the_margin_has_a_slope_where_the_cross_entropy_is_saturated() -> None:
    network = linear(classes=2)
    confident = {
        objective: network.bench.correct(
            lambda images: 1e6 * network(images), Attack(EPSILON, 10, 2 / 255, objective=objective)
        )
        for objective in ("cross_entropy", "margin")
    }
    assert torch.equal(confident["margin"], network.robust(EPSILON))
    assert torch.equal(confident["cross_entropy"], network.robust(0))  # nothing moved


def test_certain_probabilities_as_labels_are_labels(mixture: Mixture, extreme: torch.Tensor, labels: torch.Tensor) -> None:
    certain = torch.nn.functional.one_hot(labels, 5).float()
    by_label, by_probability = (perturb(mixture, extreme, y, ATTACKS["PGD"], generator()) for y in (labels, certain))
    assert (by_label - by_probability).abs().mean() < 1e-4  # a sign may turn where the gradient is all but zero


def test_pgd_lowers_the_true_class_more_than_noise_and_more_than_fgsm(mixture: Mixture, images: torch.Tensor) -> None:
    labels = mixture(images).argmax(dim=1)
    noise = EPSILON * torch.randn(images.shape, generator=generator()).sign()

    def belief(inputs: torch.Tensor) -> float:
        return mixture(inputs).gather(1, labels.unsqueeze(1)).mean().item()

    fgsm = belief(perturb(mixture, images, labels, ATTACKS["FGSM"], generator()))
    pgd = belief(perturb(mixture, images, labels, Attack.pgd(EPSILON, 10, 2 / 255), generator()))
    assert pgd < fgsm < belief((images + noise).clamp(0, 1))


@pytest.mark.parametrize("name", ["N-FGSM", "PGD"])
def test_the_seed_decides_the_result(mixture: Mixture, extreme: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    first, same, other = (perturb(mixture, extreme, labels, ATTACKS[name], generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def flat(images: torch.Tensor) -> torch.Tensor:
    """A function without slope: attacks on it only add their starting noise."""
    return images.flatten(1)[:, :3] * 0


def test_n_fgsm_starts_with_noise_of_twice_epsilon_and_does_not_project(extreme: torch.Tensor) -> None:
    result = perturb(flat, extreme, torch.zeros(8, dtype=torch.int64), ATTACKS["N-FGSM"], generator())
    distance = (result - extreme).abs().max()
    assert 1.9 * EPSILON < distance <= 2 * EPSILON + 1e-6
    assert result.min() < 0
    assert result.max() > 1


def test_iterated_an_attack_of_one_step_takes_two_and_others_stay_as_they_are() -> None:
    assert ATTACKS["N-FGSM, iterated"].steps == 2
    assert ATTACKS["PGD"].iterated() == ATTACKS["PGD"]


def test_pgd_starts_at_random_in_the_whole_ball(extreme: torch.Tensor) -> None:
    result = perturb(flat, extreme, torch.zeros(8, dtype=torch.int64), ATTACKS["PGD"], generator())
    distance = (result - extreme).abs().max()
    assert 0.95 * EPSILON < distance <= EPSILON + 1e-6


def test_fgsm_starts_at_the_image(extreme: torch.Tensor) -> None:
    result = perturb(flat, extreme, torch.zeros(8, dtype=torch.int64), ATTACKS["FGSM"], generator())
    assert torch.equal(result, extreme)


def test_statistics_stand_still_while_frozen_and_move_again_after(mixture: Mixture, extreme: torch.Tensor) -> None:
    network = copy.deepcopy(mixture).train()
    before = {name: value.clone() for name, value in network.named_buffers()}
    with frozen_statistics(network):
        network(extreme)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert all(module.training for module in network.modules())
    network(extreme)
    assert not torch.equal(network.experts[0].stem[1].running_mean, before["experts.0.stem.1.running_mean"])


def test_a_failure_while_frozen_restores_the_mode(mixture: Mixture) -> None:
    network = copy.deepcopy(mixture).train()
    with pytest.raises(ZeroDivisionError), frozen_statistics(network):
        raise ZeroDivisionError
    assert all(module.training for module in network.modules())
    network.eval()
    with frozen_statistics(network):
        pass
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"restarts": 0}, "restarts"), ({"restarts": 2}, "noise"), ({"objective": "hinge"}, "cross_entropy, margin, not 'hinge'")],
    ids=str,
)
def test_restarts_and_objectives_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attack(**{"epsilon": 0.1, "steps": 1, "step_size": 0.1, **changes})


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"steps": -3}, {"epsilon": -0.1}, {"step_size": -0.1}, {"noise": -0.1}], ids=str
)
def test_a_senseless_attack_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps >= 1 and no negative length"):
        Attack(**{"epsilon": 0.1, "steps": 1, "step_size": 0.1, **changes})
