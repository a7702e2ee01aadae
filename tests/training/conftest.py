"""One whole run of ``palisade-train compact``, as small as can be, for the tests of the pipeline and of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import colour_arrays
from training.cli import main

SETTINGS = [
    "architecture.width=4",
    "architecture.gate_width=4",
    "holdout=10",
    "validation_images=6",
    *(f"{stage}.{setting}" for stage in ("pretrain", "benign", "joint") for setting in ("epochs=1", "batch_size=16")),
]


SMALL_PARTS = ["--set", "pretrain.batch_size=4", "--set", "benign.batch_size=4"]
"""A ninth of the images does not fill a larger batch."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread: None) -> None: ...


@dataclass(frozen=True)
class TinyRun:
    """A finished run, to be read and copied but not changed."""

    data: Path
    folder: Path
    checkpoint: Path

    def arguments(self, folder: Path, data: Path | None = None) -> list[str]:
        """Return what a command on ``folder`` needs to train as this run did."""
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        return ["--data", str(data or self.data), "--device", "cpu", "--run", str(folder), *settings]


@pytest.fixture(scope="session")
def tiny_run(colour_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("tiny")
    run = TinyRun(colour_file, folder / "run", folder / "tiny.safetensors")
    assert main(["compact", *run.arguments(run.folder), "--out", str(run.checkpoint)]) == 0
    return run


@pytest.fixture(scope="session")
def tiny_vote(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One whole run of ``palisade-train partition``."""
    folder = tmp_path_factory.mktemp("vote")
    data = folder / "colours.npz"
    np.savez(data, **colour_arrays(train=108))
    run = TinyRun(data, folder / "run", folder / "vote.safetensors")
    assert main(["partition", *run.arguments(run.folder), *SMALL_PARTS, "--out", str(run.checkpoint)]) == 0
    return run
