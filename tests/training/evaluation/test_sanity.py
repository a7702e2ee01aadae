"""The sanity checks, each against a network that hides its gradients in the way that the check is there to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.training.evaluation.linear import Linear, linear
from training.attack import Attack, LogProbs
from training.evaluation import sanity
from training.evaluation.curves import Curves, measure_curves
from training.evaluation.levels import EPSILON, PGD_20, QUICK, STANDARD
from training.measure import Bench


@pytest.fixture(scope="module")
def network() -> Linear:
    return linear(classes=2)


def curves_of(network: LogProbs, bench: Bench) -> Curves:
    return measure_curves(network, bench, {})


class _Misleading(torch.autograd.Function):
    """The images themselves, with the true slope where pixels are as in the test set and a false, steeper one elsewhere."""

    @staticmethod
    def forward(context: Any, images: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(images)
        return images.clone()

    @staticmethod
    def backward(context: Any, slope: torch.Tensor) -> torch.Tensor:
        thirds = 85 * context.saved_tensors[0]  # whole numbers, as the test images' pixels are multiples of 3/255
        return torch.where((thirds - thirds.round()).abs() < 1e-3, slope, -100 * slope)


def saturated(network: Linear) -> LogProbs:
    """Float32 rounds these probabilities to 0 and 1, and their slope to 0."""
    return lambda images: (1e6 * network(images)).softmax(dim=1)


def stepped(network: Linear) -> LogProbs:
    return lambda images: (40 * network(images)).round() / 40


def misleading(network: Linear) -> LogProbs:
    return lambda images: network(_Misleading.apply(images))


def random(network: Linear) -> LogProbs:
    return lambda images: network(images) + 0.1 * torch.randn(len(images), 2)


def centred(network: Linear) -> LogProbs:
    """As batch norm does in training mode."""
    return lambda images: network(images) - network(images).mean(dim=0)


# --- a network that hides nothing


def test_an_honest_network_passes_every_check(network: Linear) -> None:
    bench = network.bench
    curves = curves_of(network, bench)
    fgsm = bench.correct(network, QUICK["FGSM"])
    survived = bench.correct(network, STANDARD["PGD-50x2"])
    findings = [
        sanity.more_steps(curves, fgsm),
        sanity.large_epsilon(curves, 2),
        sanity.square(network, bench, survived, EPSILON, queries=300),
        sanity.partial(fgsm, fgsm, fgsm),
        sanity.top_k({1: fgsm}, {1: fgsm}, deployed=1),
        sanity.gradients(network, bench),
        sanity.determinism(network, bench),
    ]
    assert [finding.check for finding in findings if not finding.passed] == []
    assert sanity.failed([finding.to_json() for finding in findings]) == []
    assert all(finding.raised_if and finding.meaning for finding in findings)


# --- steps and radius


def test_an_attack_that_many_steps_make_weaker_than_one_is_found(network: Linear) -> None:
    bench = network.bench
    curves = curves_of(misleading(network), bench)
    fgsm = bench.correct(misleading(network), QUICK["FGSM"])
    assert torch.equal(fgsm, network.robust(EPSILON))  # the first step sees the true slope
    finding = sanity.more_steps(curves, fgsm)
    assert not finding.passed
    assert finding.figures["PGD-100"] > finding.figures["FGSM"] + 5


def rights(*counts: int, n: int = 300) -> list[torch.Tensor]:
    return [torch.arange(n) < count for count in counts]


@pytest.mark.parametrize(
    ("counts", "passed"),
    [
        ((200, 150, 120, 100, 100, 100), True),
        ((200, 150, 120, 100, 104, 104), True),  # 4 of 300 may be chance
        ((200, 150, 120, 100, 105, 100), False),
        ((200, 150, 120, 100, 100, 105), False),
        ((200, 150, 120, 100, 103, 106), False),  # little by little
        ((200, 150, 190, 100, 100, 100), True),  # few steps don't cross the ball
    ],
)
def test_accuracy_may_not_rise_with_the_steps(counts: tuple[int, ...], passed: bool) -> None:
    steps = dict(zip((1, 2, 5, 10, 20, 100), rights(*counts), strict=True))
    assert sanity.more_steps(Curves({}, steps), rights(150)[0]).passed is passed


@pytest.mark.parametrize(("fgsm", "passed"), [(150, True), (96, True), (95, False)])
def test_one_step_may_not_beat_many(fgsm: int, passed: bool) -> None:
    steps = dict(zip((5, 10, 20), rights(140, 100, 100), strict=True))
    assert sanity.more_steps(Curves({}, steps), rights(fgsm)[0]).passed is passed


@pytest.mark.parametrize("hide", [saturated, stepped])
def test_a_network_that_survives_any_radius_is_found(network: Linear, hide: Callable[[Linear], LogProbs]) -> None:
    finding = sanity.large_epsilon(curves_of(hide(network), network.bench), 2)
    assert not finding.passed
    assert finding.figures["right at 128/255"] > 80


@pytest.mark.parametrize(
    ("right", "classes", "passed"), [(6, 10, True), (20, 10, False), (6, 100, False), (2, 100, True), (0, 1000, True)]
)
def test_hardly_any_image_may_survive_the_largest_radius(right: int, classes: int, passed: bool) -> None:
    finding = sanity.large_epsilon(Curves({8: rights(200)[0], 64: rights(right)[0]}, {}), classes)
    assert finding.passed is passed


# --- transfer


@pytest.mark.parametrize(("transferred", "passed"), [(140, True), (96, True), (95, False)])
def test_an_experts_images_may_not_break_the_mixture_more_often_than_its_own(transferred: int, passed: bool) -> None:
    itself, weak, strong = rights(100, 150, transferred)
    assert sanity.transfer(itself, {"expert 0": weak, "expert 1": strong}).passed is passed


# --- black box


@pytest.mark.parametrize(("last", "passed"), [(100, True), (99, True), (98, False)])
def test_a_black_box_attack_may_not_break_what_autoattacks_gradients_left(last: int, passed: bool) -> None:
    clean, before, after = rights(200, 100, last)
    assert sanity.square_after_ensemble({"clean": clean, "apgd-ce": before, "square": after}).passed is passed


def test_gradients_that_are_no_use_are_found_by_an_attack_without_gradients(network: Linear) -> None:
    bench, epsilon = network.bench, 24 / 255
    survived = bench.correct(stepped(network), Attack.pgd(epsilon, 10, epsilon / 4))
    finding = sanity.square(stepped(network), bench, survived, epsilon, queries=300)
    assert not finding.passed
    assert finding.figures["broken"] > 5
    assert finding.figures["survivors"] == survived.sum()


# --- parts


def mixed(network: Linear, part: str) -> LogProbs:
    """A gate that is easily turned from an expert that is right to one that is always wrong; ``part`` gives the slope.

    The right expert's slope misleads, and is so steep that the gate's is lost in it.
    """
    towards_wrong = torch.randn(192, generator=torch.Generator().manual_seed(5)) / 10

    def log_probs(images: torch.Tensor) -> torch.Tensor:
        answers = (4 * misleading(network)(images)).log_softmax(dim=1)
        wrong = (-4 * network(images)).log_softmax(dim=1)
        turn = (images.flatten(1) - 0.5) @ towards_wrong - 0.4
        gate = torch.stack([-turn, turn], dim=1).log_softmax(dim=1)
        if part == "gate":
            answers, wrong = answers.detach(), wrong.detach()
        if part == "experts":
            gate = gate.detach()
        if part == "hard":
            gate = torch.stack([turn < 0, turn >= 0], dim=1).float().log()
        return torch.logsumexp(gate.unsqueeze(2) + torch.stack([answers, wrong], dim=1), dim=1)

    return log_probs


def test_a_part_that_breaks_more_than_the_whole_is_found(network: Linear) -> None:
    bench, whole = network.bench, mixed(network, "both")
    full = bench.correct(whole, PGD_20)
    gate_only = bench.correct(whole, PGD_20, crafted_on=mixed(network, "gate"))
    experts_only = bench.correct(whole, PGD_20, crafted_on=mixed(network, "experts"))
    assert gate_only.sum() < full.sum()
    assert not sanity.partial(full, gate_only, experts_only).passed
    assert not sanity.partial(full, experts_only, gate_only).passed
    assert sanity.partial(gate_only, experts_only, experts_only).passed


def test_hard_routing_whose_choice_the_attack_cannot_see_is_found_and_counts_only_where_it_is_deployed(
    network: Linear,
) -> None:
    bench, hard = network.bench, mixed(network, "hard")
    itself = {1: bench.correct(hard, PGD_20)}
    transferred = {1: bench.correct(hard, PGD_20, crafted_on=mixed(network, "gate"))}
    assert transferred[1].sum() < itself[1].sum() - 10
    deployed = sanity.top_k(itself, transferred, deployed=1)
    assert (deployed.passed, deployed.informational) == (False, False)
    assert sanity.failed([deployed.to_json()]) == ["top_k"]
    soft = sanity.top_k(itself, transferred, deployed=None)
    assert (soft.passed, soft.informational) == (False, True)
    assert sanity.failed([soft.to_json()]) == []
    other = sanity.top_k({**itself, 2: itself[1]}, {**transferred, 2: itself[1]}, deployed=2)
    assert other.passed


# --- gradients and determinism


@pytest.mark.parametrize("hide", [saturated, stepped])
def test_gradients_that_are_zero_are_found(network: Linear, hide: Callable[[Linear], LogProbs]) -> None:
    finding = sanity.gradients(hide(network), network.bench)
    assert not finding.passed
    assert finding.figures["all zero"] > 80


def test_a_gradient_that_is_not_finite_is_found(network: Linear) -> None:
    def explodes(images: torch.Tensor) -> torch.Tensor:
        """The root's slope at 0 is infinite; one image in the batch has such a pixel."""
        dark = images[:, 0, 0, 0]
        return network(images) + (dark - dark.min()).sqrt().unsqueeze(1) * torch.tensor([1.0, 0.0])

    finding = sanity.gradients(explodes, network.bench)
    assert not finding.passed
    assert finding.figures["not finite"] >= 1


def test_random_answers_are_found(network: Linear) -> None:
    finding = sanity.determinism(random(network), network.bench)
    assert not finding.passed
    assert finding.figures["repeated"] > 1e-3


def test_answers_that_depend_on_the_batch_are_found(network: Linear) -> None:
    finding = sanity.determinism(centred(network), network.bench)
    assert not finding.passed
    assert finding.figures["repeated"] <= sanity.ROUNDING
    assert finding.figures["other batch-mates"] > 0.1


def test_answers_that_are_not_numbers_are_no_reason_for_confidence(network: Linear) -> None:
    finding = sanity.determinism(lambda images: network(images) * torch.nan, network.bench)
    assert not finding.passed
    assert finding.figures["repeated"] == 1
