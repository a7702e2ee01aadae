"""Quarantine: training leaves out what the file names, all of it and nothing else, and only for the data it was made for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from model.checkpoint import read_header
from training.cli import main
from training.loading import load_dataset
from training.screening.quarantine import without_quarantined

if TYPE_CHECKING:
    from tests.training.conftest import TinyRun
    from tests.training.screening.conftest import Screened


def edited(screened: Screened, folder: Path, old: str, new: str) -> Path:
    text = screened.quarantine.read_text()
    assert old in text
    path = folder / "edited.json"
    path.write_text(text.replace(old, new, 1))
    return path


def test_what_is_left_is_everything_but_the_named_samples(screened: Screened) -> None:
    whole = load_dataset(str(screened.data))
    left = without_quarantined(whole, screened.quarantine)
    kept = sorted(set(range(len(whole.train))) - screened.positions())
    assert left.train.digests() == [whole.train.digests()[row] for row in kept]
    assert left.train.labels.tolist() == whole.train.labels[kept].tolist()
    assert [left.place("train", row) for row in range(len(kept))] == [f"train_images[{row}]" for row in kept]
    assert left.test.digests() == whole.test.digests()


def test_data_without_some_samples_have_the_digest_of_data_that_never_had_them(screened: Screened, tmp_path: Path) -> None:
    left = without_quarantined(load_dataset(str(screened.data)), screened.quarantine)
    with np.load(screened.data) as file:
        arrays = dict(file)
    for name in ("train_images", "train_labels"):
        arrays[name] = np.delete(arrays[name], sorted(screened.positions()), axis=0)
    np.savez(tmp_path / "never.npz", **arrays)
    assert left.digest == load_dataset(str(tmp_path / "never.npz")).digest


def test_a_sample_that_a_person_decided_to_keep_is_trained_on(screened: Screened, tmp_path: Path) -> None:
    path = edited(screened, tmp_path, '"decision": "quarantine"', '"decision": "keep"')
    whole = load_dataset(str(screened.data))
    first = screened.read()["samples"][0]["sha256"]
    assert first not in without_quarantined(whole, screened.quarantine).train.digests()
    assert first in without_quarantined(whole, path).train.digests()


def test_a_file_made_for_other_data_is_refused(screened: Screened, colour_file: Path) -> None:
    with pytest.raises(ValueError, match=r"made for other training data \(tampered, SHA-256 [0-9a-f]{12}\) than colours"):
        without_quarantined(load_dataset(str(colour_file)), screened.quarantine)


def test_a_file_whose_samples_were_edited_is_refused(screened: Screened, tmp_path: Path) -> None:
    first = screened.read()["samples"][0]["sha256"]
    path = edited(screened, tmp_path, first, hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ValueError, match="is not the one that the file describes"):
        without_quarantined(load_dataset(str(screened.data)), path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"decision": "quarantine"', '"decision": "perhaps"', "samples.0.decision"),
        ('"palisade_quarantine": 1', '"palisade_quarantine": 2', "palisade_quarantine"),
        ("{", "", "not a quarantine file"),
    ],
)
def test_what_is_not_a_quarantine_file_is_refused(screened: Screened, tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        without_quarantined(load_dataset(str(screened.data)), edited(screened, tmp_path, old, new))


def test_quarantining_a_whole_class_is_refused(screened: Screened, tmp_path: Path) -> None:
    whole, record = load_dataset(str(screened.data)), screened.read()
    sample, digests = record["samples"][0], whole.train.digests()
    record["samples"] = [
        {**sample, "position": row, "sha256": digests[row], "label": "red"}
        for row in np.flatnonzero(whole.train.labels.numpy() == 0).tolist()
    ]
    path = tmp_path / "all.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="class red would have no training image left"):
        without_quarantined(whole, path)


def test_a_checkpoint_names_the_quarantine_and_the_whole_and_is_used_with_it(
    tiny_run: TinyRun, screened: Screened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out.safetensors", load_dataset(str(screened.data))
    train = [*tiny_run.arguments(tmp_path / "run", screened.data), "--init", str(tiny_run.checkpoint)]
    train += ["--set", "joint.batch_size=64"]
    given = ["--quarantine", str(screened.quarantine)]
    assert main(["joint", *train, *given]) == 0
    assert main(["export", *train, "--out", str(out)]) == 1  # it was trained without some
    assert "other settings" in capsys.readouterr().err
    assert main(["export", *train, *given, "--out", str(out)]) == 0
    said = read_header(out).data
    assert said["training_sha256"] == whole.digest
    assert said["quarantine_sha256"] == hashlib.sha256(screened.quarantine.read_bytes()).hexdigest()
    assert said["quarantined"] == len(screened.positions())

    for other in ([], ["--set", "holdout=12", *given]):  # it may have seen what these would be judged on
        again = ["joint", *train, *other, "--run", str(tmp_path / "other"), "--init", str(out)]
        assert main(again) == 1
        assert "held out other images" in capsys.readouterr().err
    unscreened = tmp_path / "unscreened.safetensors"
    assert main(["joint", *train, "--run", str(tmp_path / "whole")]) == 0
    assert main(["export", *train, "--run", str(tmp_path / "whole"), "--out", str(unscreened)]) == 0
    for who in ("--init", "--teacher"):
        assert main(["joint", *train, *given, "--run", str(tmp_path / "other"), who, str(unscreened)]) == 1
        assert "held out other images" in capsys.readouterr().err

    replay = ["replay", "--data", str(screened.data), "--device", "cpu", "--checkpoint", str(out), "--steps", "1"]
    replay += ["--out", str(tmp_path / "replay.npz")]
    assert main(replay) == 1  # else "held-out" images would be some that were trained on
    assert "its quarantine file" in capsys.readouterr().err
    assert main([*replay, *given]) == 0
    left = without_quarantined(whole, screened.quarantine)
    with np.load(tmp_path / "replay.npz") as file:
        assert np.array_equal(file["clean"], left.split_holdout(10)[1].images.numpy())
