"""The benchmarks of training run, at toy size, and their tables say what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import ablation, training_throughput

ARMS = "baseline;baseline, twice the epochs;CutMix, alpha 1;joint: baseline;joint: logits mixed;joint: top-2 in training"


def run(module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    module.main()  # type: ignore[attr-defined]
    return capsys.readouterr().out.splitlines()


def test_the_ablation_compares_arms_and_goes_on_where_it_stopped(
    colour_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    sizes = ["--width", "4", "--images", "32", "--epochs", "1", "--joint-epochs", "1", "--batch-size", "16", "--holdout", "10"]
    arguments = ["--data", str(colour_file), "--out", str(tmp_path), "--seeds", "2", "--arms", ARMS, *sizes]
    lines = run(ablation, monkeypatch, capsys, arguments)
    rows = json.loads(lines[-1])["rows"]
    assert sorted({row["arm"] for row in rows}) == sorted(ARMS.split(";"))
    assert [row["seed"] for row in rows if row["arm"] == "baseline"] == [0, 1]
    (base,) = [line for line in lines if line.startswith("| baseline | ") and line.endswith(" +0.0 |")]
    assert "+0.0 (+0.0 to +0.0)" in base  # it adds nothing to itself
    assert any(line.startswith("| logits mixed | ") for line in lines)
    written = (tmp_path / "results.jsonl").read_text()
    again = run(ablation, monkeypatch, capsys, arguments)
    assert json.loads(again[-1])["rows"] == rows
    assert (tmp_path / "results.jsonl").read_text() == written


def test_an_arm_of_the_ablation_differs_from_the_baseline_in_one_thing() -> None:
    for arm in (*ablation.SINGLE, *ablation.JOINT):
        changes = [arm.schedule, arm.expert, arm.loss, arm.recipe, arm.activation != "relu", arm.task is not ablation.JointTask]
        assert sum(map(bool, changes)) == (0 if arm.name in (ablation.BASE, ablation.JOINT_BASE) else 1), arm.name


def test_throughput_counts_an_attacks_step_as_two_thirds_of_a_training_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    arguments = ["--device", "cpu", "--widths", "8", "--batch", "2", "--seconds", "0.01"]
    rows = json.loads(run(training_throughput, monkeypatch, capsys, arguments)[-1])["rows"]
    assert [(row["width"], row["dtype"], row["compiled"]) for row in rows] == [(8, "float32", False), (8, "bfloat16", False)]
    for row in rows:
        assert row["attack_flops"] == pytest.approx(row["training_flops"] * 2 / 3, rel=0.05)  # no gradients of parameters
        assert row["training_images_per_s"] > 0
        assert row["share"] > 0
