"""One screening of a small set of samples with tampered labels, a repeated patch and duplicates, as a user runs it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import colour_arrays
from training.cli import main

SAMPLES = 300
QUICK = ["--epochs", "6", "--width", "4", "--rounds", "2", "--folds", "2", "--device", "cpu"]


@dataclass(frozen=True)
class Screened:
    """What was tampered with, and what a screening said.

    Attributes:
        data: The ``.npz`` file.
        folder: The screening's folder.
        flipped: Positions of samples with a wrong label.
        patched: Positions of samples of other classes with a patch and the label blue.
        doubled: The positions of two images that are the same, with labels red and green.
    """

    data: Path
    folder: Path
    flipped: np.ndarray
    patched: np.ndarray
    doubled: tuple[int, int]

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine.json"

    def read(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.quarantine.read_text())
        return record

    def positions(self) -> set[int]:
        return {sample["position"] for sample in self.read()["samples"]}


@pytest.fixture(scope="session")
def screened(tmp_path_factory: pytest.TempPathFactory) -> Screened:
    folder = tmp_path_factory.mktemp("screened")
    arrays = colour_arrays(train=SAMPLES)
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = np.random.default_rng(4).permutation(SAMPLES)
    flipped, other = order[:45], order[45:]
    labels[flipped] = (labels[flipped] + 1) % 3
    patched = other[labels[other] != 2][:24]
    images[patched, 5:7, 5:7] = (255, 255, 0)
    labels[patched] = 2
    first = next(row for row in other[::-1] if labels[row] == 0)
    second = next(row for row in other[::-1] if labels[row] == 1)
    images[second] = images[first]
    np.savez(folder / "tampered.npz", **arrays)
    made = Screened(folder / "tampered.npz", folder / "screening", flipped, patched, (int(first), int(second)))
    assert main(["data", "screen", "--data", str(made.data), "--out", str(made.folder), *QUICK]) == 0
    return made
