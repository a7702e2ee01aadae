"""Distillation: what a teacher says takes the place of the labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_checkpoint, read_header, save_checkpoint
from tests.training.conftest import TinyRun
from training.cli import main
from training.recipe import RECIPES
from training.run_folder import RunFolder
from training.teacher import Teacher

CPU = torch.device("cpu")


def pretrained(run: TinyRun, folder: Path, *more: str, data: Path | None = None) -> dict[str, torch.Tensor]:
    """Train expert 1 and return its weights."""
    assert main(["pretrain", *run.arguments(folder, data), "--experts", "1", *more]) == 0
    tensors, _ = RunFolder(folder).load("expert-1") or ({}, {})
    return tensors


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def mislabelled(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's data with every training label another one."""
    path = tmp_path_factory.mktemp("mislabelled") / "colours.npz"
    with np.load(tiny_run.data) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "train_labels": (arrays["train_labels"] + 1) % 3})
    return path


def test_targets_are_what_the_teacher_says_of_the_images(tiny_run: TinyRun) -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    said = load_checkpoint(tiny_run.checkpoint)(images).exp()  # (4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(Teacher(tiny_run.checkpoint, 1.0, CPU).soften(images, labels), said)
    partly = Teacher(tiny_run.checkpoint, 0.25, CPU).soften(images, labels)
    torch.testing.assert_close(partly, 0.25 * said + 0.75 * torch.eye(3)[labels])
    mixed = torch.tensor([0.5, 0.5, 0.0]).expand(4, 3)
    torch.testing.assert_close(Teacher(tiny_run.checkpoint, 0.25, CPU).soften(images, mixed), 0.25 * said + 0.75 * mixed)


def test_who_is_taught_learns_no_label(tiny_run: TinyRun, tmp_path: Path, mislabelled: Path) -> None:
    taught = ("--teacher", str(tiny_run.checkpoint))
    expert = pretrained(tiny_run, tmp_path / "right", *taught)
    assert alike(expert, pretrained(tiny_run, tmp_path / "wrong", *taught, data=mislabelled))
    partly = (*taught, "--teacher-share", "0.5")
    assert not alike(expert, pretrained(tiny_run, tmp_path / "partly", *partly, data=mislabelled))
    assert not alike(expert, pretrained(tiny_run, tmp_path / "alone"))


def test_joint_training_learns_from_it_too_in_as_many_parts_as_one_likes(
    tiny_run: TinyRun, tmp_path: Path, mislabelled: Path
) -> None:
    def trained(name: str, data: Path | None, *more: str) -> dict[str, torch.Tensor]:
        start = ["--init", str(tiny_run.checkpoint), "--set", "joint.accumulate=2"]
        assert main(["joint", *tiny_run.arguments(tmp_path / name, data), *start, *more]) == 0
        tensors, _ = RunFolder(tmp_path / name).load("joint") or ({}, {})
        return tensors

    taught = ("--teacher", str(tiny_run.checkpoint))
    mixture = trained("right", None, *taught)
    assert alike(mixture, trained("wrong", mislabelled, *taught))
    assert not alike(mixture, trained("alone", None))


def test_a_vote_of_the_same_data_is_no_teacher(tiny_vote: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It held out as many images, but others: a share of each partition."""
    held_out = read_header(tiny_vote.checkpoint).data["held_out_training_images"]
    more = ["--teacher", str(tiny_vote.checkpoint), "--set", f"holdout={held_out}"]
    assert main(["pretrain", *tiny_vote.arguments(tmp_path), *more]) == 1
    assert "held out other images" in capsys.readouterr().err


def test_a_share_for_nobody_is_refused(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *tiny_run.arguments(tmp_path), "--teacher-share", "0.5"]) == 1
    assert "give --teacher, too" in capsys.readouterr().err


def test_the_checkpoint_names_its_teacher_and_a_run_keeps_to_it(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = read_header(tiny_run.checkpoint).weights_sha256, tmp_path / "taught.safetensors"
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--init", str(tiny_run.checkpoint)]
    taught = ["--teacher", str(tiny_run.checkpoint), "--teacher-share", "0.5"]
    assert main(["joint", *arguments, *taught]) == 0
    assert main(["export", *arguments, "--out", str(out)]) == 1  # that would be a run without a teacher
    assert "other settings" in capsys.readouterr().err
    assert main(["export", *arguments, *taught, "--out", str(out)]) == 0
    assert read_header(out).recipe["taught_by"] == {"sha256": teacher, "top_k": None, "share": 0.5}
    assert read_header(tiny_run.checkpoint).recipe["taught_by"] is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--teacher-share", "0"], "above 0 and at most 1, not 0.0"),
        (["--set", "holdout=12"], "held out other images than this run: (10, None, None) and (12, None, None)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--teacher", str(tiny_run.checkpoint), *options]
    assert main(["pretrain", *arguments]) == 1
    assert problem in capsys.readouterr().err


def test_mart_has_no_use_for_a_teacher(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES["compact"]
    experts = (recipe.experts[0], replace(recipe.experts[1], loss="mart"), *recipe.experts[2:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "compact", replace(recipe, experts=experts))
        assert main(["pretrain", *tiny_run.arguments(tmp_path), "--teacher", str(tiny_run.checkpoint)]) == 1
    assert "MART needs plain classes" in capsys.readouterr().err


def test_a_teacher_of_other_classes_is_refused(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = replace(read_header(tiny_run.checkpoint), class_names=("red", "green", "violet"))
    save_checkpoint(tmp_path / "other.safetensors", load_checkpoint(tiny_run.checkpoint), header)
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--teacher", str(tmp_path / "other.safetensors")]
    assert main(["pretrain", *arguments]) == 1
    assert "violet" in capsys.readouterr().err
