"""Our PGD and another implementation's break equally many images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.cross_check import compare
from training.data import Split
from training.measure import Bench


@pytest.fixture
def bench() -> Bench:
    """1,000 images of four kinds of smooth stripes in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 4
    across = torch.linspace(0, 3, 8)
    waves = torch.stack(
        [across.sin().expand(8, 8), across.cos().expand(8, 8), across.sin().expand(8, 8).T, -across.cos().expand(8, 8)]
    )
    images = 127 + 25 * waves[labels].unsqueeze(1) + 40 * torch.randn(1000, 3, 8, 8, generator=generator)
    return Bench(Split(images.clamp(0, 255).to(torch.uint8), labels), torch.device("cpu"))


@pytest.fixture
def network(bench: Bench) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    images = bench.split.images.float() / 255
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), bench.split.labels).backward()
        optimiser.step()
    return network.eval().requires_grad_(False)


def test_another_implementation_agrees_within_a_point(network: nn.Module, bench: Bench) -> None:
    found = compare(network, bench, steps=10)
    assert found["image"]["ours"] == pytest.approx(found["image"]["art"], abs=0.2)
    assert found["random"]["ours"] == pytest.approx(found["random"]["art"], abs=1.0)
    assert 5 < found["image"]["ours"] < 95
