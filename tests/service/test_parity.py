"""Served predictions match the reference model's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.served_parity import compare

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"


def shipped_images() -> np.ndarray:
    """The sample photos and noise of several scales, all 32x32."""
    photos = [np.asarray(Image.open(path)) for path in sorted(SAMPLES.glob("*.png"))]
    generator = np.random.default_rng(0)
    noise = [np.clip(generator.normal(128, scale, (32, 32, 3)), 0, 255).astype(np.uint8) for scale in range(4, 64)]
    return np.stack(photos + noise)


def real_images() -> np.ndarray:
    path = os.environ.get("PALISADE_DATA")
    if path is None:
        pytest.skip("PALISADE_DATA does not name a CIFAR-10 .npz file")
    with np.load(path, allow_pickle=False) as data:
        return data["test_images"][:1000]


@pytest.mark.parametrize("images", [shipped_images, real_images])
def test_served_probabilities_are_the_references_within_the_stated_tolerance(images) -> None:
    result = compare("compact", images())
    assert result["largest_difference"] <= result["tolerance"]
    assert result["clear_labels_disagree"] == 0
