"""Partition mode, from data to checkpoint: above all that an expert is a function of its own partition alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.architecture import Architecture
from model.certificate import read_votes, tolerated_partitions
from model.checkpoint import load_checkpoint, read_header
from tests.conftest import colour_arrays
from tests.training.conftest import SMALL_PARTS
from training.cli import main
from training.data import Dataset, Split
from training.loading import load_dataset
from training.partition import partition_of, partitions
from training.partition_command import register
from training.partition_run import PartitionRun
from training.pipeline import Run
from training.recipe import RECIPES, ExpertRecipe, Recipe, Schedule
from training.run_folder import RunFolder
from training.worker import Stop, StopRequested, Worker

if TYPE_CHECKING:
    from tests.training.conftest import TinyRun

EXPERTS = 3
WORKER = Worker(torch.device("cpu"))
SCHEDULE = Schedule(epochs=2, batch_size=4, cutmix=1.0, augmentation="idbh", label_smoothing=0.1)
RECIPE = Recipe(
    "tiny",
    Architecture(width=4, num_classes=3, num_experts=EXPERTS, gate_width=4, height=8, input_width=8),
    (
        ExpertRecipe("benign"),
        ExpertRecipe("fgsm", epsilons=(4 / 255, 8 / 255)),
        ExpertRecipe("pgd", epsilons=(8 / 255,), steps=(1, 2), loss="trades"),
    ),
    pretrain=SCHEDULE,
    benign=SCHEDULE,
    joint=SCHEDULE,
    holdout=6,
    validation_images=2,
)
"""One expert of each family, with everything random that training has."""

AT = 11
"""The sample that is changed."""


def dataset_of(images: np.ndarray, labels: np.ndarray) -> Dataset:
    arrays = colour_arrays()
    train = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))
    test = Split(torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["test_labels"]))
    return Dataset("colours", train, test, ("red", "green", "blue"), "", "")


def clean() -> tuple[np.ndarray, np.ndarray]:
    arrays = colour_arrays()
    return arrays["train_images"], arrays["train_labels"]


def trained(dataset: Dataset, folder: Path) -> Path:
    """Train and export; return the checkpoint."""
    run = PartitionRun(RECIPE, dataset, folder / "run", 0, WORKER)
    run.train()
    run.export(folder / "vote.safetensors")
    return folder / "vote.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(dataset_of(*clean()), tmp_path_factory.mktemp("original"))


def experts_that_differ(one: Path, other: Path) -> set[int]:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    return {int(name.split(".")[1]) for name, value in left.items() if not torch.equal(value, right[name])}


def home(image: np.ndarray) -> int:
    return partition_of(dataset_of(image[None], np.zeros(1, np.int64)).train.digests()[0], EXPERTS)


def removed(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, set[int]]:
    return np.delete(images, AT, 0), np.delete(labels, AT), {home(images[AT])}


def relabelled(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, set[int]]:
    changed = labels.copy()
    changed[AT] = (changed[AT] + 1) % 3
    return images, changed, {home(images[AT])}


def inserted(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Insert enough for one more step of its expert, first, so that all that comes after it moves."""
    new = 255 - images[:12]
    new = new[[home(image) == home(new[0]) for image in new]]
    return np.concatenate([new, images]), np.concatenate([labels[: len(new)], labels]), {home(new[0])}


def repainted(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, set[int]]:
    changed = images.copy()
    changed[AT] = 255 - changed[AT]
    return changed, labels, {home(images[AT]), home(changed[AT])}


def reordered(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, set[int]]:
    return images[::-1].copy(), labels[::-1].copy(), set()


@pytest.mark.parametrize("change", [removed, relabelled, inserted, repainted, reordered])
def test_a_change_leaves_all_other_experts_bit_for_bit_equal_and_certified_answers_as_they_are(
    original: Path, tmp_path: Path, change: Callable[..., tuple[np.ndarray, np.ndarray, set[int]]]
) -> None:
    images, labels, touched = change(*clean())
    changed = trained(dataset_of(images, labels), tmp_path)
    assert experts_that_differ(original, changed) == touched
    tests = torch.from_numpy(colour_arrays(test=120)["test_images"]).permute(0, 3, 1, 2).float() / 255
    before, after = (load_checkpoint(path)(tests).exp().numpy() for path in (original, changed))
    certified = tolerated_partitions(read_votes(before, EXPERTS)) >= max(1, len(touched))
    assert np.array_equal(before.argmax(axis=1)[certified], after.argmax(axis=1)[certified])


def test_the_steps_and_the_held_out_images_of_an_expert_are_those_of_its_partition(tmp_path: Path) -> None:
    images, labels, touched = inserted(*clean())
    before, after = (
        [(len(data), len(stage.task.holdout)) for stage, data in PartitionRun(RECIPE, data, tmp_path, 0, WORKER).stages()]
        for data in (dataset_of(*clean()), dataset_of(images, labels))
    )
    assert {index for index in range(EXPERTS) if before[index] != after[index]} == touched
    assert {held for _, held in [*before, *after]} == {2}


def test_only_the_touched_expert_has_to_be_trained_again(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original.parent / "run", tmp_path / "run")
    images, labels, touched = relabelled(*clean())
    run = PartitionRun(RECIPE, dataset_of(images, labels), tmp_path / "run", 0, WORKER)
    (index,) = touched
    with pytest.raises(ValueError, match=f"expert-{index} was trained with other settings"):
        run.train()
    (tmp_path / "run" / f"expert-{index}.safetensors").unlink()
    rows = len(RunFolder(tmp_path / "run").metrics())
    run.train()
    assert {row["stage"] for row in RunFolder(tmp_path / "run").metrics()[rows:]} == {f"expert-{index}"}
    run.export(tmp_path / "vote.safetensors")
    assert experts_that_differ(original, tmp_path / "vote.safetensors") == touched


def test_a_stopped_run_goes_on_to_the_same_weights(original: Path, tmp_path: Path) -> None:
    stopped = PartitionRun(RECIPE, dataset_of(*clean()), tmp_path / "run", 0, replace(WORKER, stop=Stop(minutes=0)))
    with pytest.raises(StopRequested):
        stopped.train()
    with pytest.raises(ValueError, match="expert-0 is at step 1 of"):
        stopped.export(tmp_path / "vote.safetensors")
    assert experts_that_differ(original, trained(dataset_of(*clean()), tmp_path)) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 2}, "holdout=2: each of 3 partitions holds out its share; give 3 or more"),
        ({"bag": 0.5}, "bag=0.5: every expert has its own partition already"),
        (
            {"pretrain": replace(SCHEDULE, batch_size=32)},
            r"partition 1 of 3: \d+ images, 2 of them held out, do not fill one batch of 32",
        ),
    ],
)
def test_data_that_can_not_be_divided_so_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartitionRun(replace(RECIPE, **changes), dataset_of(*clean()), tmp_path, 0, WORKER)


def test_a_class_that_one_training_image_could_have_made_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    dataset = replace(dataset_of(*clean()), label_names=("red", "green", "blue", "violet"))
    with pytest.raises(ValueError, match="class violet has no test image"):
        PartitionRun(RECIPE, dataset, tmp_path / "run", 0, WORKER)
    assert not list(tmp_path.iterdir())


def test_joint_training_refuses_a_vote(tmp_path: Path) -> None:
    recipe = replace(RECIPES["compact"], architecture=replace(RECIPES["compact"].architecture, aggregation="vote"))
    with pytest.raises(ValueError, match="a vote has no gate to train jointly; use palisade-train partition"):
        Run(recipe, dataset_of(*clean()), tmp_path, 0, WORKER)


def test_the_command_writes_a_checkpoint_that_says_what_each_expert_saw(tiny_vote: TinyRun) -> None:
    header, dataset = read_header(tiny_vote.checkpoint), load_dataset(str(tiny_vote.data))
    parts = partitions(dataset, 9)
    assert header.architecture.aggregation == "vote"
    assert header.recipe["mode"] == "partition"
    assert header.recipe["architecture"]["aggregation"] == "vote"
    assert header.data["training_sha256"] == dataset.digest
    assert header.data["held_out_training_images"] == 9
    assert header.data["partitions"] == 9
    assert header.data["partition_images"] == [len(part.train) for part in parts]
    assert header.data["partition_sha256"] == [part.digest for part in parts]
    assert sum(header.data["partition_images"]) == 108
    config = json.loads((tiny_vote.folder / "config.json").read_text())
    assert config["settings"]["data"] == header.data
    assert {path.name for path in tiny_vote.folder.glob("*.safetensors")} == {f"expert-{k}.safetensors" for k in range(9)}
    assert (tiny_vote.folder / "loss.png").exists()


def test_a_vote_names_the_manifest_of_its_data(tiny_vote: TinyRun, tmp_path: Path) -> None:
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "vote.safetensors"
    assert main(["data", "manifest", "--data", str(tiny_vote.data), "--out", str(manifest)]) == 0
    arguments = [*tiny_vote.arguments(tmp_path / "run"), *SMALL_PARTS, "--manifest", str(manifest), "--out", str(out)]
    assert main(["partition", *arguments]) == 0
    assert read_header(out).data["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()


def test_running_the_command_again_trains_nothing_and_writes_the_same(
    tiny_vote: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "run", tmp_path / "again.safetensors"
    shutil.copytree(tiny_vote.folder, folder)
    rows = len(RunFolder(folder).metrics())
    assert main(["partition", *tiny_vote.arguments(folder), *SMALL_PARTS, "--out", str(out)]) == 0
    header = read_header(out)
    assert header.weights_sha256 == read_header(tiny_vote.checkpoint).weights_sha256
    assert len(RunFolder(folder).metrics()) == rows
    assert f"version {header.weights_sha256[:12]}, 9 voting experts on " in capsys.readouterr().out


def test_a_dry_run_prints_every_experts_steps_and_leaves_nothing(
    tiny_vote: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "run", tmp_path / "none.safetensors"
    assert main(["partition", *tiny_vote.arguments(folder), *SMALL_PARTS, "--out", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for index, images in enumerate(read_header(tiny_vote.checkpoint).data["partition_images"]):
        assert f"| expert-{index} | {(images - 1) // 4} |" in shown
    assert not out.exists()
    assert not folder.exists()


def test_screened_data_are_refused() -> None:
    def prepare(options: argparse.Namespace) -> NoReturn:
        raise AssertionError("the data were read")

    train = argparse.ArgumentParser(add_help=False)
    train.add_argument("--quarantine")
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(), train, prepare)
    options = parser.parse_args(["partition", "--quarantine", "found.json", "--out", "vote.safetensors"])
    with pytest.raises(ValueError, match=r"--quarantine: .* nothing would be certified"):
        options.run_command(options)
