"""What the tests share. Torch is imported inside the fixtures, so that the service's tests start without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

    from model.architecture import Architecture
    from model.mixture import Mixture


# For every process that the tests start, too: tiny networks gain nothing from more threads, and threads that wait for others
# cost a busy machine minutes.
os.environ["OMP_NUM_THREADS"] = "1"

LONGEST = (
    "service/test_tune.py",
    "service/test_admin.py",
    "training/test_pipeline.py",
    "model/test_fast.py",
    "test_benchmarks.py",
    "service/test_page.py",
    "service/test_frontends.py",
    "service/test_openapi.py",
    "training/test_worker.py",
    "deploy/test_k8s_training.py",
    "deploy/test_monitoring.py",
    "service/test_quota_replicas.py",
)
"""Files that take longest, the longest first. The last file to begin decides when several workers are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Run torch on one thread, whatever a test before has chosen."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    from model.architecture import Architecture

    return Architecture(width=8, num_classes=5, num_experts=3, gate_width=4, height=16, input_width=16)


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """33 smooth, colourful images ``(33, 3, 16, 16)`` uint8; plain noise would look alike to a network that averages."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(33, 3, 3, 3, generator=generator)
    smooth = F.interpolate(coarse, size=16, mode="bilinear") + 0.1 * torch.rand(33, 3, 16, 16, generator=generator)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def images(pixels: torch.Tensor) -> torch.Tensor:
    """The same in ``[0, 1]``."""
    return pixels.float() / 255


@pytest.fixture(scope="session")
def mixture(architecture: Architecture, images: torch.Tensor) -> Mixture:
    """A mixture in eval mode whose batch norms and gate all matter; shared, so copy it before changing it."""
    import torch
    from torch import nn

    from model.mixture import Mixture

    torch.manual_seed(7)
    mixture = Mixture(architecture)
    norms = [module for module in mixture.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # one pass sets the statistics to the batch's
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
        mixture.train()(images)
        for norm in norms:
            norm.momentum = 0.1
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.add_(0.2 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt())
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4))
        for expert in mixture.experts:
            expert.head.weight.mul_(3)
        mixture.gate.head.weight.normal_()
        mixture.gate.head.bias.normal_()
    return mixture.eval()


@pytest.fixture(scope="session")
def voters(mixture: Mixture) -> Mixture:
    """The mixture's experts, which vote; shared, so copy it before changing it."""
    from dataclasses import replace

    from model.mixture import Mixture

    voters = Mixture(replace(mixture.architecture, aggregation="vote"))
    voters.experts.load_state_dict(mixture.experts.state_dict())
    return voters.eval()


@dataclass(frozen=True)
class Bomb:
    """An object that makes the file ``witness`` when something unpickles it."""

    witness: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / "unpickled")


def colour_arrays(train: int = 42, test: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    """Return 8x8 images that are mostly red, green or blue, as the arrays of an ``.npz`` file."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {"label_names": np.array(["red", "green", "blue"])}
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 120, (count, 8, 8, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 130
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    return arrays


@pytest.fixture
def colours() -> dict[str, np.ndarray]:
    """The arrays of a tiny separable dataset, to be changed freely."""
    return colour_arrays()


@pytest.fixture
def other_colours() -> dict[str, np.ndarray]:
    """Other images of the same shapes and classes."""
    return colour_arrays(seed=1)


@pytest.fixture(scope="session")
def colour_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    np.savez(path, **colour_arrays())
    return path
