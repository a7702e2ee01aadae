"""The evaluation of a checkpoint: what is measured, that it reproduces, and its statistics."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_checkpoint, read_header, save_checkpoint
from model.mixture import Mixture
from training.cli import main
from training.evaluation.certified import SURROGATE
from training.loading import load_dataset

if TYPE_CHECKING:
    from tests.training.conftest import TinyRun

NETWORKS = {"mixture", "uniform average", *(f"expert {index}" for index in range(9))}
ATTACKS = {"clean", "FGSM", "PGD-10"}


def command(run: TinyRun, checkpoint: Path | None = None, data: Path | None = None) -> list[str]:
    return ["evaluate", "--device", "cpu", "--data", str(data or run.data), "--checkpoint", str(checkpoint or run.checkpoint)]


@pytest.fixture(scope="module")
def evaluated(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the figures and the plot of 20 images."""
    folder = tmp_path_factory.mktemp("evaluated")
    written = ["--json", str(folder / "figures.json"), "--plot", str(folder / "figures.png")]
    assert main([*command(tiny_run), "--n", "20", *written]) == 0
    return folder


def figures(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return values


def test_the_table_has_the_mixture_and_all_it_must_beat(evaluated: Path) -> None:
    results = figures(evaluated)
    assert results["accuracy"].keys() == NETWORKS
    assert results["attacks"].keys() == ATTACKS
    for row in results["accuracy"].values():
        assert row.keys() == ATTACKS
        for cell in row.values():
            assert 0 <= cell["low"] <= cell["percent"] <= cell["high"] <= 100
            assert cell["low"] < cell["high"]
            assert cell["percent"] % 5 == 0  # of 20 images


def test_the_figures_say_how_they_were_measured(tiny_run: TinyRun, evaluated: Path) -> None:
    results, header = figures(evaluated), read_header(tiny_run.checkpoint)
    assert results["checkpoint_sha256"] == header.weights_sha256
    assert results["data"] == {"name": "colours", "test_sha256": load_dataset(str(tiny_run.data)).test_digest}
    assert (results["n"], results["seed"], results["precision"], results["top_k"]) == (20, 0, "float32", None)
    assert (results["level"], results["class_names"]) == ("quick", ["red", "green", "blue"])
    assert results["attacks"]["FGSM"]["epsilon"] == 8 / 255
    assert results["attacks"]["PGD-10"]["steps"] == 10
    assert results["attacks"]["PGD-10"]["restarts"] == 1
    assert results["versions"]["torch"] == torch.__version__
    assert results["best_single_expert"]["name"] in NETWORKS - {"mixture", "uniform average"}
    assert [(test["against"], test["attack"]) for test in results["paired_tests"]] == [
        (against, attack)
        for against in ("uniform average", results["best_single_expert"]["name"])
        for attack in ("clean", "PGD-10")
    ]


def test_other_checkpoints_are_measured_on_the_same_images(
    tiny_run: TinyRun, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    mixture, header = load_checkpoint(tiny_run.checkpoint), read_header(tiny_run.checkpoint)
    save_checkpoint(same, mixture, header, torch.float32)
    for parameter in mixture.parameters():
        parameter.data.neg_()
    digest = save_checkpoint(other, mixture, header).weights_sha256
    compared = ["--compare", str(same), "--compare", str(other)]
    assert main([*command(tiny_run), "--n", "20", "--json", str(tmp_path / "figures.json"), *compared]) == 0
    printed = capsys.readouterr().out
    assert "| checkpoint other |" in printed
    assert f"checkpoint other: SHA-256 of the weights {digest}." in printed
    results, rows = figures(tmp_path), figures(tmp_path)["accuracy"]
    assert rows["mixture"] == figures(evaluated)["accuracy"]["mixture"] == rows["checkpoint same"]
    assert rows["checkpoint other"] != rows["mixture"]
    assert results["compared"]["checkpoint other"] == {"sha256": digest, "votes": False}
    twice = [*command(tiny_run), *("--compare", str(same)) * 2]
    assert "another file is called same" in refusal(capsys, twice)
    tests = {(test["against"], test["attack"]): test for test in results["paired_tests"]}
    assert tests["checkpoint same", "PGD-10"]["only_mixture"] == tests["checkpoint same", "PGD-10"]["only_other"] == 0
    assert tests["checkpoint other", "clean"]["difference_points"] != 0


def test_a_compared_vote_is_said_to_be_attacked_through_a_surrogate(
    tiny_vote: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain.safetensors"
    architecture = replace(read_header(tiny_vote.checkpoint).architecture, aggregation="gate")
    save_checkpoint(
        plain, Mixture(architecture), replace(read_header(tiny_vote.checkpoint), architecture=architecture, data={})
    )
    assert main([*command(tiny_vote, plain), "--n", "4", "--compare", str(tiny_vote.checkpoint)]) == 0
    assert SURROGATE.rstrip(".") in capsys.readouterr().out


def test_the_differences_are_those_of_the_table(evaluated: Path) -> None:
    results = figures(evaluated)
    for test in results["paired_tests"]:
        cells = [results["accuracy"][network][test["attack"]]["percent"] for network in ("mixture", test["against"])]
        assert test["difference_points"] == pytest.approx(cells[0] - cells[1])
        assert test["only_mixture"] - test["only_other"] == round(20 * (cells[0] - cells[1]) / 100)


def test_the_plot_is_drawn(evaluated: Path) -> None:
    assert (evaluated / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_gives_the_same_figures_and_prints_them(
    tiny_run: TinyRun, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(99)  # nothing may depend on the global state
    assert main([*command(tiny_run), "--n", "20", "--json", str(tmp_path / "figures.json")]) == 0
    assert figures(tmp_path) == figures(evaluated)
    assert not {"sanity", "curves", "autoattack", "corruptions"} & figures(evaluated).keys()  # nobody asked for them
    cell = figures(evaluated)["accuracy"]["mixture"]["PGD-10"]
    printed = capsys.readouterr().out
    assert f"{cell['percent']:.1f} ({cell['low']:.1f}-{cell['high']:.1f})" in printed
    assert "n = 20 colours test images, seed 0" in printed


def test_stamping_changes_the_header_and_not_the_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    path = tmp_path / "exact.safetensors"
    save_checkpoint(path, load_checkpoint(tiny_run.checkpoint), read_header(tiny_run.checkpoint), torch.float32)
    before, weights = read_header(path), load_file(path)
    assert main([*command(tiny_run, path), "--n", "4", "--seed", "3", "--stamp"]) == 0
    after = read_header(path)
    assert (after.metrics["n"], after.metrics["seed"]) == (4, 3)
    assert after.metrics["checkpoint_sha256"] == before.weights_sha256 == after.weights_sha256
    assert all(value.dtype == weights[name].dtype for name, value in load_file(path).items())


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("palisade-train: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label_names": np.array(["red", "green", "violet"])}, "violet"),
        ({"label_names": np.array(["red", "green", "blue", "grey"])}, "grey"),
        (
            {"train_images": np.zeros((42, 16, 16, 3), np.uint8), "test_images": np.ones((24, 16, 16, 3), np.uint8)},
            r"(16, 16)",
        ),
    ],
    ids=["a class renamed", "a class more", "larger images"],
)
def test_data_that_do_not_fit_the_checkpoint_are_refused(
    tiny_run: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    colours: dict[str, np.ndarray],
    change: dict[str, np.ndarray],
    named: str,
) -> None:
    path = tmp_path / "colours.npz"
    np.savez(path, **{**colours, **change})
    assert named in refusal(capsys, command(tiny_run, data=path))


@pytest.mark.parametrize("n", ["25", "-1"])
def test_more_images_than_there_are_is_refused(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str], n: str) -> None:
    assert "24 test images" in refusal(capsys, [*command(tiny_run), f"--n={n}"])


def test_a_checkpoint_that_is_missing_or_damaged_is_refused(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.safetensors"
    assert "no such checkpoint" in refusal(capsys, command(tiny_run, path))
    shutil.copy(tiny_run.checkpoint, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(capsys, command(tiny_run, path))


def test_other_training_images_choose_no_single_expert(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], colours: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "colours.npz"
    np.savez(path, **{**colours, "train_images": np.zeros((42, 8, 8, 3), np.uint8)})
    out = tmp_path / "figures.json"
    assert main([*command(tiny_run, data=path), "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["best_single_expert"] is None
    assert {test["against"] for test in results["paired_tests"]} == {"uniform average"}
    assert "not the checkpoint's training data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "missing/a.json"], "--json missing/a.json: there is no folder missing"),
        (["--plot", "missing/a.png"], "--plot missing/a.png: there is no folder missing"),
        (["--out", "missing/out"], "--out missing/out: there is no folder missing"),
        (["--level", "full"], "--out DIR"),
        (["--attacks", "apgd-ce"], "--attacks belongs to --level full"),
        (["--level", "full", "--attacks", "pgd", "--out", "."], "no attack 'pgd'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_data_are_even_read(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, ["evaluate", "--data", "no-such-data.npz", "--device", "cpu", *arguments])


def test_attacks_that_need_more_classes_are_refused_before_any_work(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "--attacks apgd-ce,fab-t,square" in refusal(capsys, [*command(tiny_run), "--level", "full", "--out", str(out)])
    assert not out.exists()
