"""Accuracy against radius and steps."""

from __future__ import annotations

import torch

from tests.training.evaluation.linear import linear
from training.attack import Attack
from training.evaluation.curves import RADII, STEPS, measure_curves


def test_the_curve_over_the_radius_is_the_one_computed_by_hand() -> None:
    network = linear(classes=2)
    curves = measure_curves(network, network.bench, {})
    assert list(curves.epsilon) == [1, 2, 4, 8, 12, 16, 32, 64, 128]
    for radius, right in curves.epsilon.items():
        assert torch.equal(right, network.robust(radius / 255))
    assert curves.epsilon[1].sum() > curves.epsilon[8].sum() > curves.epsilon[32].sum() > curves.epsilon[64].sum() == 0


def test_more_steps_leave_fewer_right_until_the_ball_is_crossed() -> None:
    network = linear(classes=2)
    curves = measure_curves(network, network.bench, {})
    assert list(curves.steps) == [1, 2, 5, 10, 20, 50, 100]
    assert curves.steps[1].sum() > curves.steps[2].sum() > curves.steps[10].sum()
    for steps in (10, 20, 50, 100):  # 10 steps of 2/255 reach any corner of the ball from any start
        assert torch.equal(curves.steps[steps], network.robust(8 / 255))


def test_what_is_known_is_not_measured_again_and_joins_both_curves() -> None:
    network = linear(classes=2)
    known = {f"PGD-{steps}": torch.arange(100) < steps for steps in STEPS}
    curves = measure_curves(network, network.bench.first(60), known)
    assert [right.sum() for right in curves.steps.values()] == [min(steps, 60) for steps in STEPS]
    assert curves.epsilon[8].sum() == 20
    written = curves.to_json()
    assert written["n"] == 60
    assert [point["x"] for point in written["epsilon"]] == list(RADII)
    assert written["steps"][2]["percent"] == 8.33  # 5 of 60
    assert written["steps"][2]["low"] < 8.33 < written["steps"][2]["high"]


def test_a_point_is_the_attack_that_it_is_said_to_be() -> None:
    network = linear(classes=4)
    curves = measure_curves(network, network.bench, {})
    assert torch.equal(curves.steps[5], network.bench.correct(network, Attack.pgd(8 / 255, 5, 2 / 255)))
    assert torch.equal(curves.epsilon[16], network.bench.correct(network, Attack.pgd(16 / 255, 20, 4 / 255)))
    assert torch.equal(curves.epsilon[8], curves.steps[20])
