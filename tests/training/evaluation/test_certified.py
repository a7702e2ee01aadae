"""Certified accuracy: its figures, and how an evaluation of a vote shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from model.checkpoint import load_checkpoint, read_header
from training.cli import main
from training.evaluation.certified import certified_markdown, certified_section
from training.loading import load_dataset
from training.plots import plot_certified
from training.replay import held_out

if TYPE_CHECKING:
    from tests.training.conftest import TinyRun


@pytest.fixture(scope="module")
def evaluated(tiny_vote: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "report"
    arguments = ["--device", "cpu", "--data", str(tiny_vote.data), "--checkpoint", str(tiny_vote.checkpoint)]
    assert main(["evaluate", *arguments, "--out", str(folder)]) == 0
    return folder


def figures(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return values


def test_certified_accuracy_counts_what_is_right_with_enough_of_a_lead(tiny_vote: TinyRun, evaluated: Path) -> None:
    test, mixture = load_dataset(str(tiny_vote.data)).test, load_checkpoint(tiny_vote.checkpoint)
    with torch.no_grad():
        ballots = mixture.components(test.images.float() / 255)[1].argmax(dim=2).numpy()  # (N, 9)
        told = mixture(test.images.float() / 255).argmax(dim=1)
    counts = np.sort([np.bincount(row, minlength=3) for row in ballots], axis=1)
    lead, right = counts[:, -1] - counts[:, -2], (told == test.labels).numpy()
    found = figures(evaluated)["certified"]
    assert (found["partitions"], found["n"]) == (9, 24)
    assert [point["poisons"] for point in found["points"]] == [0, 1, 2, 3, 4]
    for point in found["points"]:
        poisons = point["poisons"]
        stands = right & (lead > 2 * poisons) if poisons else right
        assert point["percent"] == pytest.approx(100 * stands.mean(), abs=0.01)
        assert point["low"] <= point["percent"] <= point["high"]
    assert found["points"][0]["percent"] == figures(evaluated)["accuracy"]["mixture"]["clean"]["percent"]


def test_the_report_shows_the_certificate_and_says_what_was_attacked(evaluated: Path) -> None:
    table, page = (evaluated / "table.md").read_text(), (evaluated / "report.html").read_text()
    for text in (table, page):
        assert "inserted, removed or relabelled" in text
        assert "cross-entropy (PGD) lower the mean" in text
        assert "(CW) log(v_o + m_o) - log(v_y + m_y)" in text
    assert "| poisons | certified accuracy |" in table
    assert "Certified accuracy under poisoned training data" in page
    assert "Does the vote add anything?" in page
    assert (evaluated / "certified.png").read_bytes().startswith(b"\x89PNG")
    assert not (evaluated / "gate.png").exists()


def test_experts_are_compared_on_images_that_none_of_them_was_trained_on(tiny_vote: TinyRun, evaluated: Path) -> None:
    assert figures(evaluated)["best_single_expert"]["chosen_on"] == "9 held-out training images, PGD-10"
    dataset = load_dataset(str(tiny_vote.data))
    assert len(held_out(read_header(tiny_vote.checkpoint), dataset, tiny_vote.checkpoint)) == 9


def test_a_test_split_that_lacks_a_class_is_evaluated(tiny_vote: TinyRun, tmp_path: Path) -> None:
    with np.load(tiny_vote.data) as arrays:
        found = dict(arrays)
    kept = found["test_labels"] != 2
    data = tmp_path / "fewer.npz"
    np.savez(data, **(found | {name: found[name][kept] for name in ("test_images", "test_labels")}))
    arguments = ["--device", "cpu", "--data", str(data), "--checkpoint", str(tiny_vote.checkpoint)]
    assert main(["evaluate", *arguments, "--n", "4", "--out", str(tmp_path / "report")]) == 0
    assert figures(tmp_path / "report")["best_single_expert"]["chosen_on"] == "9 held-out training images, PGD-10"
    assert main(["replay", *arguments, "--n", "2", "--steps", "1", "--out", str(tmp_path / "replay.npz")]) == 0


def test_a_mixture_with_a_gate_has_no_such_section() -> None:
    assert certified_markdown({}) == certified_section({}, {}) == ""


def test_the_plot_is_drawn_from_the_figures(tmp_path: Path) -> None:
    points = [{"poisons": r, "percent": 80.0 - 20 * r, "low": 75.0 - 20 * r, "high": 85.0 - 20 * r} for r in range(4)]
    plot_certified({"certified": {"partitions": 7, "n": 100, "points": points}}, tmp_path / "certified.png")
    assert (tmp_path / "certified.png").read_bytes().startswith(b"\x89PNG")
