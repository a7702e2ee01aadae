"""Replays: which images are in them, and whether the attacks are attacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_checkpoint, read_header
from tests.training.conftest import TinyRun
from training.cli import main
from training.loading import load_dataset
from training.replay import held_out

Arrays = dict[str, np.ndarray]


def replay(run: TinyRun, out: Path, *options: str) -> int:
    arguments = ["--checkpoint", str(run.checkpoint), "--data", str(run.data), "--device", "cpu", "--out", str(out)]
    return main(["replay", *arguments, *options])


@pytest.fixture(scope="module")
def written(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    out = tmp_path_factory.mktemp("replay") / "replay.npz"
    assert replay(tiny_run, out, "--steps", "3") == 0
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def test_all_images_are_training_images_that_training_held_out(written: Arrays, tiny_run: TinyRun) -> None:
    dataset = load_dataset(str(tiny_run.data))
    trained, kept = dataset.split_holdout(10)
    assert written["clean"].dtype == np.uint8
    assert written["labels"].dtype == np.int64
    pairs = {(image.tobytes(), int(label)) for image, label in zip(written["clean"], written["labels"], strict=True)}
    assert pairs == {(np.ascontiguousarray(i).tobytes(), int(y)) for i, y in zip(kept.images.numpy(), kept.labels, strict=True)}
    assert len(pairs) == 10
    for split in (trained, dataset.test):
        assert not pairs & {
            (np.ascontiguousarray(i).tobytes(), int(y)) for i, y in zip(split.images.numpy(), split.labels, strict=True)
        }


def test_only_a_vote_was_trained_on_partitions_whatever_a_header_says(tiny_run: TinyRun) -> None:
    header, dataset = read_header(tiny_run.checkpoint), load_dataset(str(tiny_run.data))
    claimed = replace(header, data=header.data | {"partitions": 7})
    assert held_out(claimed, dataset, "it").digests() == dataset.split_holdout(10)[1].digests()


def test_attacks_stay_in_the_ball_and_raise_the_reference_loss(written: Arrays, tiny_run: TinyRun) -> None:
    clean, attacked = written["clean"].astype(np.float32) / 255, written["attacked"]
    assert attacked.dtype == np.float32
    assert attacked.shape == clean.shape == (10, 3, 8, 8)
    assert np.abs(attacked - clean).max() == pytest.approx(8 / 255, abs=1e-6)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert np.abs(attacked * 255 - np.rint(attacked * 255)).max() > 0.1  # not rounded
    reference, labels = load_checkpoint(tiny_run.checkpoint), torch.from_numpy(written["labels"])
    with torch.no_grad():
        loss = [torch.nn.functional.nll_loss(reference(torch.from_numpy(x)), labels).item() for x in (clean, attacked)]
    assert loss[1] > loss[0]


def test_the_file_says_what_it_is_and_what_the_reference_gets_right(written: Arrays, tiny_run: TinyRun) -> None:
    provenance = json.loads(str(written["provenance"]))
    assert provenance["checkpoint_sha256"] == read_header(tiny_run.checkpoint).weights_sha256
    assert provenance["n"] == 10
    assert provenance["seed"] == 0
    assert provenance["attack"]["steps"] == 3
    assert provenance["attack"]["epsilon"] == pytest.approx(8 / 255)
    reference = load_checkpoint(tiny_run.checkpoint)
    inputs = {"clean": torch.from_numpy(written["clean"]).float() / 255, "attacked": torch.from_numpy(written["attacked"])}
    with torch.no_grad():
        right = {name: int((reference(x).argmax(dim=1).numpy() == written["labels"]).sum()) for name, x in inputs.items()}
    assert provenance["right"] == right


def test_fewer_images_are_a_subset_that_the_seed_decides(written: Arrays, tiny_run: TinyRun, tmp_path: Path) -> None:
    parts = {}
    for name, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        assert replay(tiny_run, tmp_path / name, "--n", "4", "--steps", "1", "--seed", seed) == 0
        with np.load(tmp_path / name, allow_pickle=False) as file:
            parts[name] = (file["clean"], file["attacked"])
    everything = {image.tobytes() for image in written["clean"]}
    assert all(image.tobytes() in everything for image in parts["one"][0])
    assert all(np.array_equal(a, b) for a, b in zip(parts["one"], parts["same"], strict=True))
    assert not np.array_equal(parts["one"][1], parts["other"][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "same"]


def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    tiny_run: TinyRun, tmp_path: Path, other_colours: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, **other_colours)
    out = tmp_path / "replay.npz"
    for options, complaint in (
        (["--n", "11"], "--n 11: training held out 10 images"),
        (["--n", "-1"], "--n -1"),
        (["--steps", "0"], "steps >= 1"),
        (["--data", str(other)], "these are not the training data"),
        (["--out", str(tmp_path / "nowhere" / "x.npz")], "folder that exists"),
    ):
        assert replay(tiny_run, out, *options) == 1
        assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["other.npz"]
