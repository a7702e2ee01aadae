"""The gate's figures and the experts' diversity, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from model.mixture import Mixture
from training.data import Split
from training.evaluation.networks import routed
from training.evaluation.routing import diversity, routing_figures
from training.measure import Bench


@pytest.fixture
def bench(pixels: torch.Tensor) -> Bench:
    """Images of the classes 0 to 3; class 4 has none."""
    return Bench(Split(pixels, torch.arange(33) % 4), torch.device("cpu"), batch_size=10)


def test_weights_are_averaged_by_true_class(mixture: Mixture, bench: Bench, images: torch.Tensor) -> None:
    with torch.no_grad():
        weights = mixture.components(images)[0].exp().double()
    gate, _ = routing_figures(mixture, bench)
    for label in range(4):
        assert gate["per_class"][label] == pytest.approx(weights[label::4].mean(dim=0).tolist(), abs=1e-4)
    assert gate["per_class"][4] == [0, 0, 0]
    single = -(weights * weights.log()).sum(dim=1).mean().item()
    mean = weights.mean(dim=0)
    assert gate["image_entropy"] == pytest.approx(single, abs=1e-4)
    assert gate["mean_entropy"] == pytest.approx(-(mean * mean.log()).sum().item(), abs=1e-4)
    assert 0 < gate["image_entropy"] < gate["mean_entropy"] < math.log(3)


def test_hard_routing_to_one_expert_leaves_no_entropy(mixture: Mixture, bench: Bench) -> None:
    gate, _ = routing_figures(routed(mixture, 1), bench)
    assert gate["image_entropy"] == pytest.approx(0, abs=1e-6)
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in gate["per_class"][:4])


def test_other_versions_of_the_images_can_be_measured(mixture: Mixture, bench: Bench, images: torch.Tensor) -> None:
    assert routing_figures(mixture, bench, images) == routing_figures(mixture, bench)
    assert routing_figures(mixture, bench, 1 - images) != routing_figures(mixture, bench)


def test_diversity_of_three_experts_on_two_images() -> None:
    probabilities = torch.tensor(
        [
            [[0.6, 0.4, 0.0], [0.8, 0.2, 0.0], [0.2, 0.0, 0.8]],  # labels 0, 0, 2; wrong parts along (1, 0), (1, 0), (0, 1)
            [[0.0, 0.7, 0.3], [0.3, 0.4, 0.3], [0.4, 0.6, 0.0]],  # labels 1, 1, 1; along (0, 1), (1, 1), (1, 0)
        ]
    )
    figures = diversity(probabilities, torch.tensor([0, 1]))
    assert figures["disagreement"] == pytest.approx(2 / 6)
    assert figures["correlation"] == pytest.approx((1 + 0 + 0 + math.sqrt(0.5) + 0 + math.sqrt(0.5)) / 6)


def test_a_single_expert_agrees_with_itself() -> None:
    assert diversity(torch.full((2, 1, 3), 1 / 3), torch.tensor([0, 1])) == {"disagreement": 0.0, "correlation": 1.0}
