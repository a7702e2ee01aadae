"""The commands that train, from data to checkpoint, as a user types them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import training.pretrain
import training.stage
from model.checkpoint import load_checkpoint, read_header
from training.cli import main
from training.loading import load_dataset
from training.recipe import RECIPES, Recipe
from training.run_folder import RunFolder

if TYPE_CHECKING:
    from tests.training.conftest import TinyRun

STAGES = [*(f"expert-{index}" for index in range(9)), "joint"]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must fail with one line for a person (after progress bars, if any), and return that line."""
    capsys.readouterr()
    assert main(arguments) == 1
    *bars, message, end = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert end == ""
    assert message.startswith("palisade-train: ")
    assert all("%|" in bar for bar in bars if bar)
    return message


def same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_the_checkpoint_loads_and_says_what_it_was_made_of(tiny_run: TinyRun) -> None:
    header, dataset = read_header(tiny_run.checkpoint), load_dataset(str(tiny_run.data))
    assert header.class_names == ("red", "green", "blue")
    assert (header.architecture.width, header.architecture.height, header.architecture.num_experts) == (4, 8, 9)
    assert header.data == {"name": "colours", "training_sha256": dataset.digest, "held_out_training_images": 10}
    assert header.recipe["seed"] == 0
    assert header.recipe["joint_training_steps"] == 2
    assert header.recipe["joint_steps"] == 0  # of the attack: N-FGSM
    assert header.recipe["joint"]["batch_size"] == 16
    assert header.recipe["git_revision"]
    log_probs = load_checkpoint(tiny_run.checkpoint)(dataset.test.images[:4].float() / 255)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(4))


def test_the_header_is_stamped_with_figures_and_how_they_were_measured(tiny_run: TinyRun) -> None:
    header = read_header(tiny_run.checkpoint)
    metrics = header.metrics
    assert metrics["checkpoint_sha256"] == header.weights_sha256
    assert (metrics["n"], metrics["seed"], metrics["precision"]) == (24, 0, "float32")
    assert metrics["data"]["test_sha256"] == load_dataset(str(tiny_run.data)).test_digest
    pgd = metrics["attacks"]["PGD-10"]
    assert (pgd["epsilon"], pgd["steps"], pgd["step_size"], pgd["restarts"]) == (8 / 255, 10, 2 / 255, 1)
    test = load_dataset(str(tiny_run.data)).test
    right = load_checkpoint(tiny_run.checkpoint)(test.images.float() / 255).argmax(dim=1) == test.labels
    assert metrics["accuracy"]["mixture"]["clean"]["percent"] == pytest.approx(100 * right.float().mean().item(), abs=0.01)


def test_the_run_folder_holds_configuration_log_states_and_plots(tiny_run: TinyRun) -> None:
    names = {path.name for path in tiny_run.folder.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "robust.png",
        "gate.png",
        "events",
        *(f"{stage}.safetensors" for stage in STAGES),
    }
    for plot in ("loss.png", "robust.png", "gate.png"):
        assert (tiny_run.folder / plot).read_bytes().startswith(b"\x89PNG")
    config = json.loads((tiny_run.folder / "config.json").read_text())
    assert config["settings"]["recipe"]["holdout"] == 10
    rows = RunFolder(tiny_run.folder).metrics()
    assert {row["stage"] for row in rows} == set(STAGES)
    assert all("holdout_robust" in row for row in rows if row["stage"] == "joint" and "holdout_clean" in row)
    assert not any("holdout_robust" in row for row in rows if row["stage"] == "expert-0")  # benign: clean images only


def test_exporting_again_gives_the_same_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "again.safetensors"
    assert main(["export", *tiny_run.arguments(tiny_run.folder), "--out", str(out)]) == 0
    assert read_header(out).weights_sha256 == read_header(tiny_run.checkpoint).weights_sha256
    assert read_header(out).metrics == {}


def test_one_expert_can_be_trained_alone_and_comes_out_as_in_the_whole_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    assert main(["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1"]) == 0
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["expert-1.safetensors"]
    assert same(tmp_path / "expert-1.safetensors", tiny_run.folder / "expert-1.safetensors")
    assert {row["stage"] for row in RunFolder(tmp_path).metrics()} == {"expert-1"}


def test_another_seed_gives_another_expert(tiny_run: TinyRun, tmp_path: Path) -> None:
    assert main(["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1", "--seed", "1"]) == 0
    assert not same(tmp_path / "expert-1.safetensors", tiny_run.folder / "expert-1.safetensors")


@pytest.mark.parametrize("experts", ["99", "9", "0,9", "one", "1.5", "=-1"])
def test_experts_that_do_not_exist_are_refused(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: str
) -> None:
    option = [f"--experts{experts}"] if experts.startswith("=") else ["--experts", experts]
    message = refusal(capsys, ["pretrain", *tiny_run.arguments(tmp_path), *option])
    assert f"--experts {experts.removeprefix('=')}" in message
    assert not list(tmp_path.glob("*.safetensors"))


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make Ctrl-C arrive in the middle of training step ``step`` of the next stage, whose every step is saved."""
    loss, calls = training.pretrain.mixture_cross_entropy, iter(range(1000))

    def interrupted(*arguments: torch.Tensor) -> torch.Tensor:
        if next(calls) == step:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(training.stage, "SAVE_EVERY", 1)
    monkeypatch.setattr(training.stage, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training.pretrain, "mixture_cross_entropy", interrupted)


def test_an_interrupted_command_says_so_and_the_same_command_finishes_it(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in_step(patch, 1)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not same(tmp_path / "expert-1.safetensors", tiny_run.folder / "expert-1.safetensors")
    assert main(command) == 0
    assert same(tmp_path / "expert-1.safetensors", tiny_run.folder / "expert-1.safetensors")


def test_finished_experts_are_not_even_made_again(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = copy_of(tiny_run, tmp_path / "run", *STAGES[:2]), list[int]()
    stage = training.pipeline.expert_stage
    monkeypatch.setattr(training.pipeline, "expert_stage", lambda index, *more: (made.append(index), stage(index, *more))[1])
    assert main(["pretrain", *tiny_run.arguments(folder), "--experts", "0,1,2"]) == 0
    assert made == [2]
    assert "other settings" in refusal(capsys, ["pretrain", *tiny_run.arguments(folder), "--seed", "7", "--experts", "0"])


def test_joint_training_without_experts_is_refused(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, ["joint", *tiny_run.arguments(tmp_path)])
    assert "no expert-0" in message
    assert "palisade-train pretrain" in message


def copy_of(run: TinyRun, folder: Path, *stages: str) -> Path:
    """Return a copy of the run folder that holds only these stages."""
    shutil.copytree(run.folder, folder)
    for path in folder.glob("*.safetensors"):
        if path.stem not in stages:
            path.unlink()
    return folder


def test_joint_training_names_the_expert_that_is_missing(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(tiny_run, tmp_path / "run", *STAGES[:4], *STAGES[5:9])
    assert "no expert-4" in refusal(capsys, ["joint", *tiny_run.arguments(folder)])


def test_joint_training_refuses_an_expert_whose_training_was_cut_short(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(tiny_run, tmp_path / "run", *STAGES[:4], *STAGES[5:9])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in_step(patch, 1)
        assert main(["pretrain", *tiny_run.arguments(folder), "--experts", "4"]) == 130
    assert "expert-4" in refusal(capsys, ["joint", *tiny_run.arguments(folder)])


def test_exporting_before_joint_training_is_refused(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    message = refusal(capsys, ["export", *tiny_run.arguments(tmp_path / "run"), "--out", str(out)])
    assert "palisade-train joint" in message
    assert not out.exists()


@pytest.mark.parametrize("command", ["pretrain", "joint", "export"])
@pytest.mark.parametrize("setting", ["architecture.width=8", "pretrain.peak_lr=0.5"])
def test_a_run_folder_is_not_mixed_with_other_settings(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, setting: str
) -> None:
    folder = copy_of(tiny_run, tmp_path / "run", *STAGES)
    out = ["--out", str(tmp_path / "out.safetensors")] if command == "export" else []
    message = refusal(capsys, [command, *tiny_run.arguments(folder), "--set", setting, *out])
    assert "other settings" in message


@pytest.mark.parametrize("command", ["pretrain", "joint", "export"])
def test_a_run_folder_is_not_mixed_with_other_data(
    tiny_run: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    other_colours: dict[str, np.ndarray],
    command: str,
) -> None:
    folder = copy_of(tiny_run, tmp_path / "run", *STAGES)
    np.savez(tmp_path / "other.npz", **other_colours)
    out = ["--out", str(tmp_path / "out.safetensors")] if command == "export" else []
    refusal(capsys, [command, *tiny_run.arguments(folder, data=tmp_path / "other.npz"), *out])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--set", "nonsense=1"], "nonsense=1"),
        (["--set", "joint.epochs=soon"], "joint.epochs=soon"),
        (["--set", "holdout=42"], "hold out 42 of 42"),
        (["--set", "pretrain.batch_size=33"], "do not fill one batch of 33"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_cannot_work_fails_with_one_line(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    assert named in refusal(capsys, ["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1", *change])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["joint"],
        ["compact", "--run", "x"],
        ["joint", "--nonsense"],
        ["evaluate", "--data", "nowhere.npz", "--device", "nonsense"],
        ["evaluate", "--data", "nowhere.npz", "--threads", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: palisade-train" in capsys.readouterr().err


def test_joint_training_goes_on_from_a_checkpoint(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, out = ["--init", str(tiny_run.checkpoint)], tmp_path / "more.safetensors"
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--set", "joint.epochs=1"]
    assert main(["joint", *arguments, *init]) == 0
    assert "other settings" in refusal(capsys, ["export", *arguments, "--out", str(out)])  # it was trained with --init
    assert main(["export", *arguments, *init, "--out", str(out)]) == 0
    before, after = read_header(tiny_run.checkpoint), read_header(out)
    assert after.recipe["went_on_from_sha256"] == before.weights_sha256 != after.weights_sha256
    assert before.recipe["went_on_from_sha256"] is None


def test_a_checkpoint_that_has_seen_held_out_images_is_no_start(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--init", str(tiny_run.checkpoint), "--set", "holdout=12"]
    message = refusal(capsys, ["joint", *arguments])
    assert "the checkpoint to go on from was trained on these data, but held out other images" in message


def test_a_checkpoint_of_another_architecture_is_no_start(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--set", "architecture.width=5"]
    message = refusal(capsys, ["joint", *arguments, "--init", str(tiny_run.checkpoint)])
    assert "width=4" in message
    assert "width=5" in message


def test_a_checkpoint_trained_at_another_temperature_answers_as_its_training_ended(tiny_run: TinyRun, tmp_path: Path) -> None:
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--init", str(tiny_run.checkpoint), "--set", "gate_temperature=0.25"]
    assert main(["joint", *arguments]) == 0
    assert main(["export", *arguments, "--out", str(tmp_path / "out.safetensors")]) == 0
    ended = load_file(tmp_path / "run" / "joint.safetensors")["ema/gate.head.weight"].float()
    stored = load_file(tmp_path / "out.safetensors")["gate.head.weight"].float()
    torch.testing.assert_close(stored, 4 * ended)


KILLED = """
import os, signal, sys
import training.pretrain, training.stage
from training.cli import main
loss, calls = training.pretrain.mixture_cross_entropy, iter(range(1000))

def killed(*arguments):
    if next(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*arguments)

training.stage.SAVE_EVERY, training.stage.SAVE_SECONDS = 2, 0
training.pretrain.mixture_cross_entropy = killed
main(sys.argv[1:])
"""


def test_a_process_killed_in_the_middle_leaves_what_the_next_one_needs(tiny_run: TinyRun, tmp_path: Path) -> None:
    def arguments(folder: Path) -> list[str]:
        return ["pretrain", *tiny_run.arguments(folder), "--set", "pretrain.epochs=4", "--experts", "1"]

    state = tmp_path / "broken" / "expert-1.safetensors"
    command = [sys.executable, "-c", KILLED, *arguments(tmp_path / "broken")]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    taken = RunFolder(tmp_path / "broken").load("expert-1")
    assert taken is not None
    assert taken[1]["step"] == 4, "of eight"
    assert main(arguments(tmp_path / "broken")) == 0
    assert main(arguments(tmp_path / "whole")) == 0
    assert same(state, tmp_path / "whole" / "expert-1.safetensors")


def test_slices_of_a_run_end_with_the_checkpoint_of_an_unbroken_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder, parts, out = copy_of(tiny_run, tmp_path / "run", *STAGES[:8]), tmp_path / "parts", tmp_path / "out.safetensors"
    command = ["slice", *tiny_run.arguments(folder), "--parts", str(parts), "--out", str(out), "--minutes", "0"]
    statuses = []
    while not statuses or statuses[-1] == 75:
        statuses.append(main(command))
        assert len(statuses) < 9
    assert statuses == [75, 75, 0]  # one step each: a step of expert 8, one of joint training, and the rest is its end
    assert read_header(out).weights_sha256 == read_header(tiny_run.checkpoint).weights_sha256
    assert max(path.stat().st_size for path in parts.iterdir()) <= 16 * 2**20
    assert {path.name.split(".")[0] for path in parts.iterdir()} == {*STAGES, "out", "config", "metrics"}
    manifest, joined = parts / "out.safetensors.manifest.json", tmp_path / "joined.safetensors"
    assert main(["join", str(manifest), "--out", str(joined)]) == 0
    assert joined.read_bytes() == out.read_bytes()
    (parts / "out.safetensors.000").write_bytes(b"damaged")
    assert main(["join", str(manifest), "--out", str(joined)]) == 1
    assert joined.read_bytes() == out.read_bytes()


def test_a_run_is_taken_up_from_its_parts_on_another_machine(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, outs = tmp_path / "parts", [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    folder = copy_of(tiny_run, tmp_path / "run", *STAGES[:9])

    def command(run: Path, out: Path, *more: str) -> list[str]:
        return ["slice", *tiny_run.arguments(run), "--parts", str(parts), "--out", str(out), *more]

    assert main(command(folder, outs[0], "--minutes", "0")) == 75  # in the middle of joint training
    assert "the same command goes on" in capsys.readouterr().err
    before = RunFolder(folder).metrics()
    shutil.rmtree(folder)
    assert main(command(tmp_path / "elsewhere", outs[0])) == 0
    after = RunFolder(tmp_path / "elsewhere").metrics()
    assert after[: len(before)] == before
    assert {row["stage"] for row in after[len(before) :]} == {"joint"}  # the experts came whole
    shutil.rmtree(tmp_path / "elsewhere")
    assert main(command(tmp_path / "third", outs[1])) == 0  # and so did the mixture
    assert read_header(outs[0]).weights_sha256 == read_header(outs[1]).weights_sha256


@pytest.mark.parametrize("command", ["pretrain", "joint"])
def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, *tiny_run.arguments(tmp_path / "run"), "--dry-run"])
    assert stop.value.code == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["stage", *STAGES, "all"]
    assert all(int(row[1]) == 2 and float(row[2]) > 0 and float(row[4]) > 0 for row in rows[1:-1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", ["trades", "mart"])
def test_experts_can_be_trained_with_other_losses(tiny_run: TinyRun, tmp_path: Path, loss: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "compact", with_loss(RECIPES["compact"], loss))
        assert main(["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1,5"]) == 0
    assert not same(tmp_path / "expert-1.safetensors", tiny_run.folder / "expert-1.safetensors")
    assert all(row.get("loss", 0) >= 0 for row in RunFolder(tmp_path).metrics())


def with_loss(recipe: Recipe, loss: str) -> Recipe:
    experts = tuple(replace(own, loss=loss) if own.family != "benign" else own for own in recipe.experts)  # type: ignore[arg-type]
    return replace(recipe, experts=experts)


def test_the_papers_procedure_runs_at_toy_size(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Nine experts, one, four and four, with the paper's draws, then joint training through the whole mixture."""
    out = tmp_path / "paper.safetensors"
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--recipe", "paper"]
    assert main(["compact", *arguments, "--out", str(out), "--n", "6"]) == 0
    header = read_header(out)
    assert [expert["family"] for expert in header.recipe["experts"]] == ["benign", *["fgsm"] * 4, *["pgd"] * 4]
    assert header.metrics["n"] == 6


def test_parts_of_other_settings_are_not_taken_up(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, folder = tmp_path / "parts", copy_of(tiny_run, tmp_path / "run", *STAGES[:9])
    more = ["--parts", str(parts), "--out", str(tmp_path / "out.safetensors"), "--minutes", "0"]
    assert main(["slice", *tiny_run.arguments(folder), *more]) == 75
    message = refusal(capsys, ["slice", *tiny_run.arguments(tmp_path / "other"), "--seed", "5", *more])
    assert "choose another --parts" in message
    assert not list((tmp_path / "other").glob("*.safetensors"))


def test_a_mixture_trained_with_top_k_is_deployed_with_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--init", str(tiny_run.checkpoint), "--set", "loss.top_k=2"]
    out = tmp_path / "out.safetensors"
    assert main(["compact", *arguments, "--out", str(out), "--n", "6"]) == 0
    assert read_header(out).top_k == 2
    assert {path.stem for path in (tmp_path / "run").glob("*.safetensors")} == {"joint"}  # no experts for nothing


def test_a_date_will_do_as_a_seed(tiny_run: TinyRun, tmp_path: Path) -> None:
    assert main(["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1", "--seed", "20261122"]) == 0


@pytest.mark.parametrize("setting", ["pretrain.cutmix=1.0", "pretrain.mixup=1.0", "pretrain.label_smoothing=0.1"])
def test_mart_needs_plain_classes(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "compact", with_loss(RECIPES["compact"], "mart"))
        arguments = ["pretrain", *tiny_run.arguments(tmp_path), "--experts", "1", "--set", setting]
        assert "MART needs plain classes" in refusal(capsys, arguments)


def test_a_run_from_before_an_option_goes_on_while_the_option_is_off(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run.folder, tmp_path / "old")
    folder = RunFolder(tmp_path / "old")
    for stage in STAGES:
        tensors, counters = folder.load(stage) or ({}, {})
        settings = counters["settings"]
        for values in (settings, settings.get("schedule"), settings.get("recipe"), *settings.get("recipe", {}).values()):
            for option in ("bag", "mixup", "trim"):
                if isinstance(values, dict):
                    values.pop(option, None)
        folder.save(stage, tensors, counters)
    out = tmp_path / "old.safetensors"
    assert main(["compact", *tiny_run.arguments(tmp_path / "old"), "--out", str(out)]) == 0
    assert read_header(out).weights_sha256 == read_header(tiny_run.checkpoint).weights_sha256
    for setting in ("bag=0.8", "pretrain.trim=0.1", "joint.mixup=1.0"):
        arguments = ["compact", *tiny_run.arguments(tmp_path / "old"), "--out", str(out), "--set", setting]
        assert "was trained with other settings" in refusal(capsys, arguments)


def test_a_single_network_is_trained_exported_and_evaluated_like_a_mixture(tiny_run: TinyRun, tmp_path: Path) -> None:
    out, figures = tmp_path / "single.safetensors", tmp_path / "figures.json"
    arguments = [*tiny_run.arguments(tmp_path / "run"), "--recipe", "single"]
    assert main(["compact", *arguments, "--out", str(out), "--n", "6"]) == 0
    assert read_header(out).architecture.num_experts == 1
    evaluated = ["--data", str(tiny_run.data), "--device", "cpu", "--checkpoint", str(tiny_run.checkpoint), "--n", "6"]
    assert main(["evaluate", *evaluated, "--compare", str(out), "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["accuracy"]
    own = read_header(out).metrics["accuracy"]
    assert rows["checkpoint single"] == own["mixture"] == own["expert 0"]
