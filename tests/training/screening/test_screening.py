"""A screening from data to quarantine: what is caught, what is left alone, and that a killed one goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.training.screening.conftest import QUICK, SAMPLES
from training.cli import main

if TYPE_CHECKING:
    from tests.training.screening.conftest import Screened


def test_flipped_labels_are_caught_and_their_right_label_proposed(screened: Screened) -> None:
    samples = {sample["position"]: sample for sample in screened.read()["samples"]}
    caught = [samples[row] for row in screened.flipped.tolist() if row in samples]
    assert len(caught) >= 0.5 * len(screened.flipped)  # few: screeners of 300 samples are weak
    was = {"red": "blue", "green": "red", "blue": "green"}  # before each was made the next colour
    relabelled = [sample for sample in caught if sample["proposed"] != "drop"]
    assert len(relabelled) >= 0.3 * len(caught)
    right = [sample for sample in relabelled if sample["proposed"] == f"relabel to {was[sample['label']]}"]
    assert len(right) >= 0.75 * len(relabelled)


def test_clean_samples_are_quarantined_no_more_than_was_allowed(screened: Screened) -> None:
    tampered = {*screened.flipped.tolist(), *screened.patched.tolist(), *screened.doubled}
    wrongly = screened.positions() - tampered
    assert len(wrongly) <= 0.05 * (SAMPLES - len(tampered)) + 3


def test_the_repeated_patch_is_caught_and_said_to_be_dropped(screened: Screened) -> None:
    record = screened.read()
    (patch,) = record["patches"]
    assert (patch["label"], patch["samples"], patch["samples_of_other_labels"]) == ("blue", 24, 0)
    assert patch["row"] <= 5 < patch["row"] + patch["height"]
    caught = [sample for sample in record["samples"] if sample["position"] in screened.patched.tolist()]
    assert len(caught) == 24
    assert {sample["proposed"] for sample in caught} == {"drop"}
    assert all("as 23 other samples of blue" in " ".join(sample["reasons"]) for sample in caught)


def test_duplicates_with_conflicting_labels_are_named(screened: Screened) -> None:
    samples = {sample["position"]: sample for sample in screened.read()["samples"]}
    first, second = (samples[row] for row in screened.doubled)
    assert first["sha256"] == second["sha256"]
    assert "shows the same as 1 other sample(s), some of which are labelled green" in first["reasons"]
    assert "shows the same as 1 other sample(s), some of which are labelled red" in second["reasons"]


def test_every_sample_has_all_scores_and_reasons_for_those_above_their_threshold(screened: Screened) -> None:
    detectors = {"folds", "parts", "confident", "spectral", "clusters", "duplicates", "patches"}
    record = screened.read()
    assert set(record["flagged"]) == detectors
    assert all(set(sample["scores"]) == detectors and sample["reasons"] for sample in record["samples"])
    assert all(sample["decision"] == "quarantine" for sample in record["samples"])
    assert sum(len(sample["reasons"]) for sample in record["samples"]) == sum(record["flagged"].values())


def test_a_screening_that_was_stopped_goes_on_and_ends_as_an_unbroken_one(
    screened: Screened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "screening"
    shutil.copytree(screened.folder / "screeners", folder / "screeners")
    for name in ("round-1-fold-1", "round-1-fold-0"):
        (folder / "screeners" / f"{name}.safetensors").unlink()
    command = ["data", "screen", "--data", str(screened.data), "--out", str(folder), *QUICK]
    assert main([*command, "--minutes", "0"]) == 75
    assert "the same command goes on" in capsys.readouterr().err
    assert not (folder / "quarantine.json").exists()
    assert main(command) == 0
    assert (folder / "quarantine.json").read_bytes() == screened.quarantine.read_bytes()


def test_screeners_of_other_data_are_not_taken_up(
    screened: Screened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(screened.folder / "screeners", tmp_path / "screeners")
    with np.load(screened.data) as file:
        arrays = dict(file)
    arrays["train_labels"][0] = (arrays["train_labels"][0] + 1) % 3
    np.savez(tmp_path / "other.npz", **arrays)
    assert main(["data", "screen", "--data", str(tmp_path / "other.npz"), "--out", str(tmp_path), *QUICK]) == 1
    assert "was trained with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--false-positives", "0.5"], "false_positives is a share of the clean samples: from 0 to 0.5, not 0.5"),
        (["--folds", "1"], "at least 2 parts, 2 folds and 1 round, not 9, 1 and 2"),
        (["--epochs", "0"], "epochs > 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    screened: Screened, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = ["data", "screen", "--data", str(screened.data), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*command, *options]) == 1
    assert message in capsys.readouterr().err


def test_too_few_samples_to_screen_are_refused(colour_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "screen", "--data", str(colour_file), "--out", str(tmp_path), *QUICK]) == 1
    assert "42 training samples are too few to screen" in capsys.readouterr().err
