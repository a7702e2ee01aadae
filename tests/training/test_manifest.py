"""Manifests: every change to the data since is refused and named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from model.checkpoint import read_header
from training.cli import main
from training.loading import load_dataset
from training.manifest import checked, write_manifest

if TYPE_CHECKING:
    from tests.training.conftest import TinyRun

Arrays = dict[str, np.ndarray]


@pytest.fixture
def manifest(colour_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "colours.jsonl"
    write_manifest(load_dataset(str(colour_file)), path)
    return path


def save(folder: Path, arrays: Arrays) -> str:
    path = folder / "changed.npz"
    np.savez(path, **arrays)
    return str(path)


def refusal(folder: Path, arrays: Arrays, manifest: Path) -> str:
    with pytest.raises(ValueError, match="is not what the manifest") as error:
        checked(load_dataset(save(folder, arrays)), manifest)
    return str(error.value)


def test_the_manifest_has_the_digest_of_every_image_and_its_label(colours: Arrays, manifest: Path) -> None:
    head, *rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert (head["name"], head["train_images"], head["test_images"]) == ("colours", 42, 24)
    assert head["label_names"] == ["red", "green", "blue"]
    assert [row["place"] for row in rows[41:43]] == ["train_images[41]", "test_images[0]"]
    for row, image, label in zip(rows[42:], colours["test_images"], colours["test_labels"], strict=True):
        assert row["part"] == "test"
        assert row["sha256"] == hashlib.sha256(image.tobytes()).hexdigest()
        assert row["label"] == ("red", "green", "blue")[label]


def test_unchanged_data_carry_the_manifests_digest(colour_file: Path, manifest: Path) -> None:
    dataset = checked(load_dataset(str(colour_file)), manifest)
    assert dataset.provenance == {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}


def test_changed_pixels_and_labels_are_named_with_their_places(colours: Arrays, tmp_path: Path, manifest: Path) -> None:
    colours["train_images"][7, 0, 0, 0] ^= 1
    colours["train_labels"][5] = 0
    colours["train_images"][9, 0, 0, 0] ^= 1
    colours["train_labels"][9] = 2
    colours["test_labels"][0] = 1
    message = refusal(tmp_path, colours, manifest)
    assert "train_images[7]: pixels changed (green)" in message
    assert "train_images[5]: label changed from blue to red" in message
    assert "train_images[9]: pixels changed, label changed from red to blue" in message
    assert "test_images[0]: label changed from red to green" in message
    assert "2 relabelled, 1 with other pixels, 1 replaced" in message


def test_an_inserted_image_is_one_difference_though_all_that_follow_moved(
    colours: Arrays, tmp_path: Path, manifest: Path
) -> None:
    colours["train_images"] = np.insert(colours["train_images"], 3, 77, axis=0)
    colours["train_labels"] = np.insert(colours["train_labels"], 3, 1)
    message = refusal(tmp_path, colours, manifest)
    assert "(1 added): train_images[3]: added (green)." in message


def test_a_missing_image_is_named_by_where_it_was(colours: Arrays, tmp_path: Path, manifest: Path) -> None:
    for name in ("train_images", "train_labels"):
        colours[name] = np.delete(colours[name], 4, axis=0)
    assert "(1 missing): train_images[4]: missing (green)." in refusal(tmp_path, colours, manifest)


def test_a_second_copy_of_an_image_is_an_added_one(colours: Arrays, tmp_path: Path, manifest: Path) -> None:
    colours["train_images"] = np.concatenate([colours["train_images"], colours["train_images"][:1]])
    colours["train_labels"] = np.append(colours["train_labels"], 0)
    assert "(1 added): train_images[42]: added (red)." in refusal(tmp_path, colours, manifest)


def test_another_order_is_refused_since_training_follows_it(colours: Arrays, tmp_path: Path, manifest: Path) -> None:
    for name in ("train_images", "train_labels"):
        colours[name][[3, 8]] = colours[name][[8, 3]]
    message = refusal(tmp_path, colours, manifest)
    assert "(2 in another order): train_images[3]: not where it was; train_images[8]: not where it was." in message


def test_many_differences_are_counted_and_the_first_named(colours: Arrays, tmp_path: Path, manifest: Path) -> None:
    colours["train_images"] ^= 1
    message = refusal(tmp_path, colours, manifest)
    assert "(42 with other pixels)" in message
    assert message.count("pixels changed") == 5
    assert "; ..." in message


def test_other_classes_are_refused(colours: Arrays, tmp_path: Path, manifest: Path) -> None:
    colours["label_names"] = np.array(["red", "green", "violet"])
    with pytest.raises(ValueError, match=r"has the classes red, green, violet; the manifest .* has red, green, blue"):
        checked(load_dataset(save(tmp_path, colours)), manifest)


def test_a_folders_files_are_named_and_may_be_renamed_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    manifest, photos = tmp_path / "photos.jsonl", tmp_path / "photos"
    write_manifest(load_dataset(str(photos), size=8), manifest)
    assert json.loads(manifest.read_text().splitlines()[1])["place"] == "train/cat/0.png"
    (photos / "train/cat/1.png").rename(photos / "train/cat/9.png")
    checked(load_dataset(str(photos), size=8), manifest)
    (photos / "train/cat/9.png").rename(photos / "train/dog/9.png")
    with pytest.raises(ValueError, match=r"train/dog/9\.png: label changed from cat to dog"):
        checked(load_dataset(str(photos), size=8), manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "line 1"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "lists 23 test images, its head says 24"),
        (lambda text: text.replace('"part": "test"', '"part": "other"', 1), "line 44: part"),
        (lambda text: text.replace('"palisade_manifest": 1', '"palisade_manifest": 2'), "line 1: palisade_manifest"),
    ],
    ids=["empty", "cut short", "bad row", "newer"],
)
def test_what_is_not_a_whole_manifest_is_refused(colour_file: Path, manifest: Path, change: object, message: str) -> None:
    manifest.write_text(change(manifest.read_text()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        checked(load_dataset(str(colour_file)), manifest)


def test_training_refuses_changed_data_and_otherwise_names_the_manifest_in_the_checkpoint(
    tiny_run: TinyRun, colours: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "out.safetensors"
    assert main(["data", "manifest", "--data", str(tiny_run.data), "--out", str(manifest)]) == 0
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert digest in capsys.readouterr().out
    given = ["--manifest", str(manifest)]
    assert main(["export", *tiny_run.arguments(tiny_run.folder), "--out", str(out), *given]) == 0
    assert read_header(out).data["manifest_sha256"] == digest
    colours["train_labels"][5] = 0
    changed = Path(save(tmp_path, colours))
    assert main(["pretrain", *tiny_run.arguments(tmp_path / "run", changed), *given]) == 1
    assert "train_images[5]: label changed from blue to red" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
