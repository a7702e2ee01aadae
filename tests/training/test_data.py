"""Datasets: what is read, and what is refused."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from training.data import Split
from training.loading import load_dataset

if TYPE_CHECKING:
    from tests.conftest import Bomb

Arrays = dict[str, np.ndarray]


def save(folder: Path, arrays: Arrays) -> str:
    path = folder / "bad.npz"
    np.savez(path, **arrays)
    return str(path)


# --- npz


def test_an_npz_file_is_read_as_it_is(colours: Arrays, colour_file: Path) -> None:
    dataset = load_dataset(str(colour_file))
    assert dataset.name == "colours"
    assert dataset.label_names == ("red", "green", "blue")
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split), 3, 8, 8)
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), colours[f"{part}_images"])
        assert split.labels.dtype == torch.int64
        assert np.array_equal(split.labels.numpy(), colours[f"{part}_labels"])


def test_names_default_to_numbers_and_any_integer_type_will_do(colours: Arrays, tmp_path: Path) -> None:
    del colours["label_names"]
    colours["train_labels"] = colours["train_labels"].astype(np.uint8)
    colours["test_labels"] = colours["test_labels"].astype(">i4")
    dataset = load_dataset(save(tmp_path, colours))
    assert dataset.label_names == ("0", "1", "2")
    assert dataset.test.labels.tolist() == [index % 3 for index in range(24)]


def test_names_may_be_bytes_as_other_tools_write_them(colours: Arrays, tmp_path: Path) -> None:
    colours["label_names"] = np.array([name.encode() for name in ("rot", "grün", "blau")])
    assert load_dataset(save(tmp_path, colours)).label_names == ("rot", "grün", "blau")


def test_inexact_test_images_are_left_out(colours: Arrays, tmp_path: Path) -> None:
    colours["test_inexact"] = np.array([0, 5, 23])
    dataset = load_dataset(save(tmp_path, colours))
    kept = [index for index in range(24) if index not in (0, 5, 23)]
    assert np.array_equal(dataset.test.images.permute(0, 2, 3, 1).numpy(), colours["test_images"][kept])
    assert dataset.test.labels.tolist() == [index % 3 for index in kept]
    assert len(dataset.train) == 42


def test_the_digest_follows_every_training_pixel_and_label_and_nothing_else(colours: Arrays, tmp_path: Path) -> None:
    def digest() -> str:
        return load_dataset(save(tmp_path, colours)).digest

    first = digest()
    colours["test_images"][-1, -1, -1, -1] ^= 1
    colours["test_labels"][-1] = (colours["test_labels"][-1] + 1) % 3
    assert digest() == first
    colours["train_images"][-1, -1, -1, -1] ^= 1
    second = digest()
    colours["train_labels"][-1] = (colours["train_labels"][-1] + 1) % 3
    assert len({first, second, digest()}) == 3


def rows(dataset: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in dataset.contiguous()]


def test_the_holdout_is_disjoint_complete_and_always_the_same(colour_file: Path) -> None:
    dataset = load_dataset(str(colour_file))
    train, holdout = dataset.split_holdout(10)
    assert (len(train), len(holdout)) == (32, 10)
    assert set(rows(train.images)).isdisjoint(rows(holdout.images))
    assert sorted(rows(train.images) + rows(holdout.images)) == sorted(rows(dataset.train.images))
    again = load_dataset(str(colour_file)).split_holdout(10)[1]
    assert torch.equal(again.images, holdout.images)
    assert torch.equal(again.labels, holdout.labels)
    by_pixels = dict(zip(rows(dataset.train.images), dataset.train.labels.tolist(), strict=True))
    assert [by_pixels[row] for row in rows(holdout.images)] == holdout.labels.tolist()


@pytest.mark.parametrize("size", [0, -1, 42, 1000])
def test_a_holdout_that_leaves_nothing_is_refused(colour_file: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"hold out {size} of 42"):
        load_dataset(str(colour_file)).split_holdout(size)


BAD: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "missing arrays": (lambda a: (a.pop("test_labels"), a.pop("train_images")), "train_images, test_labels"),
    "floating-point pixels": (lambda a: a.update(train_images=a["train_images"] / 255), "train_images"),
    "wide integers as pixels": (lambda a: a.update(test_images=a["test_images"].astype(np.int32)), "test_images"),
    "channels first": (lambda a: a.update(test_images=a["test_images"].transpose(0, 3, 1, 2)), "test_images"),
    "no colour": (lambda a: a.update(train_images=a["train_images"][..., 0]), "train_images"),
    "four channels": (lambda a: a.update(train_images=np.zeros((42, 8, 8, 4), np.uint8)), "train_images"),
    "other sizes in test": (lambda a: a.update(test_images=np.zeros((24, 9, 8, 3), np.uint8)), "8 x 8 and 9 x 8 pixels"),
    "no pixels": (lambda a: a.update(test_images=np.zeros((24, 0, 8, 3), np.uint8)), "test_images holds no images"),
    "images of different sizes": (
        lambda a: a.update(train_images=np.array([np.zeros((8, 8, 3)), np.zeros((9, 9, 3))], dtype=object)),
        "array train_images, which must be plain numbers or text and all images of one size",
    ),
    "fractions as labels": (lambda a: a.update(train_labels=a["train_labels"] / 1), "train_labels"),
    "words as labels": (lambda a: a.update(test_labels=np.array(["red"] * 24)), "test_labels"),
    "one-hot labels": (lambda a: a.update(train_labels=np.eye(3, dtype=int)[a["train_labels"]]), "train_labels"),
    "too few labels": (lambda a: a.update(train_labels=a["train_labels"][:-1]), "42 train_images but 41 train_labels"),
    "too many labels": (lambda a: a.update(test_images=a["test_images"][:-1]), "23 test_images but 24 test_labels"),
    "too few images for the inexact positions": (
        lambda a: a.update(test_images=a["test_images"][:20], test_inexact=np.array([22])),
        "20 test_images but 24 test_labels",
    ),
    "one label": (lambda a: a.update(test_labels=np.array(1)), "test_labels must be (N,) integers"),
    "a negative label": (lambda a: a["train_labels"].put(3, -1), "train_labels has the negative label -1"),
    "a single class": (lambda a: (a["train_labels"].fill(1), a["test_labels"].fill(1)), "single class"),
    "a test label without a name": (lambda a: a["test_labels"].put(0, 3), "test_labels: label 3 has no name"),
    "a training label without a name": (lambda a: a["train_labels"].put(0, 3), "train_labels: label 3 has no name"),
    "a class only in test": (lambda a: (a.pop("label_names"), a["test_labels"].put(0, 3)), "test_labels has label 3, of which"),
    "a named class only in test": (
        lambda a: (a.update(label_names=np.array(["red", "green", "blue", "grey"])), a["test_labels"].put(0, 3)),
        "test_labels has label 3 (grey), of which train_labels has no image",
    ),
    "a name without images": (
        lambda a: a.update(label_names=np.array(["red", "green", "blue", "grey"])),
        "label_names has grey, of which train_labels has no image",
    ),
    "a gap between the labels": (
        lambda a: (a.pop("label_names"), np.place(a["train_labels"], a["train_labels"] == 1, 10**12)),
        "train_labels go up to 1000000000000 but none is 1",
    ),
    "labels from 1": (
        lambda a: (a.pop("label_names"), a.update({p: a[p] + 1 for p in ("train_labels", "test_labels")})),
        "train_labels go up to 3 but none is 0",
    ),
    "no training images": (
        lambda a: a.update(train_images=a["train_images"][:0], train_labels=a["train_labels"][:0]),
        "train_images holds no images",
    ),
    "no test images": (lambda a: a.update(test_inexact=np.arange(24)), "test_images holds no images"),
    "inexact positions beyond the end": (lambda a: a.update(test_inexact=np.array([24])), "test_inexact"),
    "inexact positions as fractions": (lambda a: a.update(test_inexact=np.array([0.5])), "test_inexact"),
    "one name for all": (lambda a: a.update(label_names=np.array("red")), "label_names"),
    "a name twice": (lambda a: a.update(label_names=np.array(["red", "red", "blue"])), "label_names"),
    "a name that is no text": (lambda a: a.update(label_names=np.array(["red", "green", "\ud800"])), "not Unicode text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_npz_file_is_refused_by_file_and_array(colours: Arrays, tmp_path: Path, case: str) -> None:
    spoil, named = BAD[case]
    spoil(colours)
    source = save(tmp_path, colours)
    with pytest.raises(ValueError, match=r"bad\.npz") as refusal:
        load_dataset(source)
    assert named in str(refusal.value)


@pytest.mark.parametrize("array", ["train_images", "label_names", "test_inexact"])
def test_an_npz_file_with_pickled_objects_is_refused_and_never_run(
    colours: Arrays, tmp_path: Path, bomb: Bomb, array: str
) -> None:
    colours[array] = np.array([bomb], dtype=object)
    source = save(tmp_path, colours)
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load_dataset(source)
    assert not bomb.witness.exists()
    np.load(source, allow_pickle=True)[array]
    assert bomb.witness.exists(), "the payload is a dud, so this test proves nothing"


def single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def damaged_member(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("train_images.npy").header_offset
    content[start + 500] ^= 0xFF
    path.write_bytes(content)


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "a single array": single_array,
    "a damaged member": damaged_member,
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_npz_is_refused_by_name(colours: Arrays, tmp_path: Path, case: str) -> None:
    source = save(tmp_path, colours)
    FILES[case](Path(source))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load_dataset(source)


def test_a_path_that_is_not_there_is_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"no data at nowhere/cifar\.npz.*cifar10"):
        load_dataset("nowhere/cifar.npz")


# --- overlap


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def overlapping(colours: Arrays) -> tuple[str, ...]:
    """Put training images 7 and 30 into the test split (7 twice) and return their hashes in order of the test split."""
    for test, train in ((20, 7), (4, 30), (9, 7)):
        colours["test_images"][test] = colours["train_images"][train]
    return digest(colours["train_images"][30]), digest(colours["train_images"][7])


def test_test_images_that_were_trained_on_are_refused_by_hash_and_position(colours: Arrays, tmp_path: Path) -> None:
    first, second = overlapping(colours)
    with pytest.raises(ValueError, match=r"bad\.npz: 3 of 24 test images are training images too") as refusal:
        load_dataset(save(tmp_path, colours))
    assert f"{first[:16]} (train_images[30] = test_images[4])" in str(refusal.value)
    assert f"{second[:16]} (train_images[7] = test_images[9])" in str(refusal.value)
    assert "--allow-overlap" in str(refusal.value)


def test_an_overlap_that_is_allowed_is_warned_of_in_one_line_and_recorded(
    colours: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = overlapping(colours)
    dataset = load_dataset(save(tmp_path, colours), allow_overlap=True)
    assert dataset.overlap == expected
    assert len(dataset.test) == 24
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1


def test_positions_are_those_in_the_file_also_when_inexact_images_are_left_out(colours: Arrays, tmp_path: Path) -> None:
    overlapping(colours)
    colours["test_inexact"] = np.array([0, 1, 4])
    with pytest.raises(ValueError, match=r"2 of 21 test images .*\(train_images\[7\] = test_images\[9\]\):"):
        load_dataset(save(tmp_path, colours))
    colours["test_inexact"] = np.array([4, 9, 20])
    assert load_dataset(save(tmp_path, colours)).overlap == ()


def test_one_different_pixel_is_another_image_and_repeats_within_a_split_are_no_overlap(
    colours: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colours["test_images"][4] = colours["train_images"][30]
    colours["test_images"][4, 3, 3, 1] ^= 1
    colours["train_images"][1] = colours["train_images"][2]
    colours["test_images"][1] = colours["test_images"][2]
    assert load_dataset(save(tmp_path, colours)).overlap == ()
    assert capsys.readouterr().err == ""


# --- downloads


def published(split: str, colours: Arrays) -> SimpleNamespace:
    labels = colours[f"{split}_labels"].tolist()
    return SimpleNamespace(data=colours[f"{split}_images"], targets=labels, classes=colours["label_names"].tolist())


def test_a_download_is_taken_as_it_was_published(
    colours: Arrays, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision

    expected = overlapping(colours)
    fake = lambda root, train, download: published("train" if train else "test", colours)  # noqa: E731
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    dataset = load_dataset("cifar100", tmp_path)
    assert (dataset.name, dataset.label_names, dataset.overlap) == ("cifar100", ("red", "green", "blue"), expected)
    assert "warning: cifar100: 3 of 24 test images" in capsys.readouterr().err
    assert np.array_equal(dataset.train.images.permute(0, 2, 3, 1).numpy(), colours["train_images"])


def test_svhn_is_turned_to_channels_last(colours: Arrays, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision

    def fake(root: Path, split: str, download: bool) -> SimpleNamespace:
        return SimpleNamespace(
            data=colours[f"{split}_images"].transpose(0, 3, 1, 2), labels=colours[f"{split}_labels"]
        )  # as SVHN stores them

    monkeypatch.setattr(torchvision.datasets, "SVHN", fake)
    dataset = load_dataset("svhn", tmp_path)
    assert dataset.label_names == ("0", "1", "2")
    assert np.array_equal(dataset.test.images.permute(0, 2, 3, 1).numpy(), colours["test_images"])


def test_a_download_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchvision

    def fake(*_: object, **__: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    with pytest.raises(ValueError, match=r"cifar10 cannot be downloaded into .*corrupted"):
        load_dataset("cifar10", tmp_path)


# --- splits


def test_a_split_takes_and_moves_without_changing_pixels_or_layout(colour_file: Path) -> None:
    split = load_dataset(str(colour_file)).train
    moved = split.to("cpu").take(torch.tensor([5, 0, 5]))
    assert torch.equal(moved.images, split.images[[5, 0, 5]])
    assert moved.labels.tolist() == [2, 0, 2]
    assert split.to(torch.device("cpu")).images.is_contiguous(memory_format=torch.channels_last)
    assert split.take(slice(3)).labels.tolist() == [0, 1, 2]


def test_a_split_on_another_device_stays_there(colour_file: Path) -> None:
    split = load_dataset(str(colour_file)).train.to("meta")  # a device that every machine has
    for indices in (torch.tensor([1, 2]), torch.tensor([1, 2], device="meta"), slice(2)):
        part = split.take(indices)
        assert isinstance(part, Split)
        assert (part.images.device.type, part.labels.device.type) == ("meta", "meta")
        assert part.images.shape == (2, 3, 8, 8)
    assert split.images.is_contiguous(memory_format=torch.channels_last)
