"""Datasets: what is read, and what is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import Dataset, load_dataset

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
    "other sizes in test": (lambda a: a.update(test_images=np.zeros((24, 9, 9, 3), np.uint8)), "differ in size"),
    "fractions as labels": (lambda a: a.update(train_labels=a["train_labels"] / 1), "train_labels"),
    "words as labels": (lambda a: a.update(test_labels=np.array(["red"] * 24)), "test_labels"),
    "one-hot labels": (lambda a: a.update(train_labels=np.eye(3, dtype=int)[a["train_labels"]]), "train_labels"),
    "too few labels": (lambda a: a.update(train_labels=a["train_labels"][:-1]), "42 train_images but 41 train_labels"),
    "too many labels": (lambda a: a.update(test_images=a["test_images"][:-1]), "23 test_images but 24 test_labels"),
    "a negative label": (lambda a: a["train_labels"].put(3, -1), "negative label -1"),
    "a single class": (lambda a: (a["train_labels"].fill(1), a["test_labels"].fill(1)), "single class"),
    "a label without a name": (lambda a: a["test_labels"].put(0, 3), "label 3 has no name"),
    "no training images": (lambda a: a.update(train_images=a["train_images"][:0], train_labels=a["train_labels"][:0]), "0 "),
    "no test images": (lambda a: a.update(test_inexact=np.arange(24)), "0 test_images"),
    "inexact positions beyond the end": (lambda a: a.update(test_inexact=np.array([24])), "test_inexact"),
    "inexact positions as fractions": (lambda a: a.update(test_inexact=np.array([0.5])), "test_inexact"),
    "one name for all": (lambda a: a.update(label_names=np.array("red")), "label_names"),
    "a name twice": (lambda a: a.update(label_names=np.array(["red", "red", "blue"])), "label_names"),
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


# --- image folders

SHADES = {"dark": (10, 20, 30), "light": (200, 210, 220)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shades"
    for part, count in (("train", 3), ("test", 2)):
        for name, colour in SHADES.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (10, 14), colour).save(root / part / name / f"{index}.png")
    return root


def load_folder(folder: Path) -> Dataset:
    return load_dataset(str(folder), size=8)


def test_an_image_folder_is_resized_and_labelled_by_its_sub_folders(folder: Path) -> None:
    (folder / "train" / "dark" / "notes.txt").write_text("not an image")
    Image.new("L", (8, 8), 200).save(folder / "test" / "light" / "grey.JPEG")
    dataset = load_folder(folder)
    assert dataset.label_names == ("dark", "light")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.train.images.shape == (6, 3, 8, 8)
    for image, label in zip(dataset.train.images, dataset.train.labels, strict=True):
        expected = torch.tensor(list(SHADES.values())[label], dtype=torch.uint8).view(3, 1, 1)
        assert torch.equal(image, expected.expand(3, 8, 8))


def broken(folder: Path) -> None:
    (folder / "train" / "light" / "9.png").write_bytes(b"no image")


def half(folder: Path) -> None:
    Image.effect_noise((60, 60), 90).save(folder / "train" / "light" / "9.png")
    content = (folder / "train" / "light" / "9.png").read_bytes()
    (folder / "train" / "light" / "9.png").write_bytes(content[: len(content) // 2])


def garbled(folder: Path) -> None:
    Image.effect_noise((60, 60), 90).save(folder / "train" / "light" / "9.png")
    content = bytearray((folder / "train" / "light" / "9.png").read_bytes())
    content[33:60] = b"\xff" * 27  # where the first data chunk's length and type stand
    (folder / "train" / "light" / "9.png").write_bytes(content)


def only_in_test(folder: Path) -> None:
    (folder / "test" / "grey").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "test" / "grey" / "0.png")


def one_class(folder: Path) -> None:
    (folder / "train" / "light").rename(folder / "elsewhere")


def no_test(folder: Path) -> None:
    (folder / "test").rename(folder / "elsewhere")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file that is no image": (broken, r"light/9\.png is not a readable image"),
    "half an image": (half, r"light/9\.png is not a readable image"),
    "a garbled image": (garbled, r"light/9\.png is not a readable image"),
    "a class only in test": (only_in_test, r"shades/test has classes that .*shades/train lacks: grey"),
    "a single class": (one_class, r"shades/train must hold one folder per class"),
    "no test images": (no_test, r"shades/test holds no images"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_image_folder_is_refused_by_path(folder: Path, case: str) -> None:
    spoil, message = FOLDERS[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_folder(folder)
