"""Datasets: uint8 images and integer labels from an ``.npz`` file, from torchvision, or from an image folder."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
OPTIONAL_ARRAYS = ("test_inexact", "label_names")
DOWNLOADS = ("cifar10", "cifar100", "svhn")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: ``(N, 3, H, W)`` uint8, channels-last in memory.
        labels: ``(N,)`` int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor | slice) -> Split:
        """Return the samples at ``indices``."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the classes' names.

    Attributes:
        name: What the data were called when they were loaded.
        train: The training split.
        test: The test split.
        label_names: One name per class.
        digest: SHA-256 over the training split's pixels and labels.
        test_digest: The same of the test split.
    """

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    digest: str
    test_digest: str

    def split_holdout(self, size: int) -> tuple[Split, Split]:
        """Return the training images without, and only, ``size`` held-out ones, always the same for the same data."""
        if not 0 < size < len(self.train):
            raise ValueError(f"cannot hold out {size} of {len(self.train)} training images: lower the recipe's holdout")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(20))
        return self.train.take(order[size:].sort().values), self.train.take(order[:size].sort().values)


def load_dataset(source: str, root: Path = Path("data"), size: int = 32) -> Dataset:
    """Load a dataset.

    Args:
        source: A path to an ``.npz`` file with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (NHWC
            uint8 and integers; ``label_names`` is optional, and test images at the positions in ``test_inexact`` are left
            out); or ``cifar10``, ``cifar100`` or ``svhn``, which torchvision downloads; or a folder with
            ``train/<class>/*`` and ``test/<class>/*`` images.
        root: Where downloads are kept.
        size: Side in pixels to which a folder's images are resized.

    Raises:
        ValueError: The data cannot be used; the message names the file or array and what is wrong with it.
    """
    if source in DOWNLOADS:
        return _from_torchvision(source, root)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, size)
    if path.is_file():
        return _from_npz(path)
    raise ValueError(f"no data at {source}: give an .npz file, an image folder, or one of {', '.join(DOWNLOADS)}")


def _from_npz(path: Path) -> Dataset:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*ARRAYS, *OPTIONAL_ARRAYS) if name in file}
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file of plain arrays: {error}") from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks the arrays {', '.join(missing)}; it has {', '.join(arrays)}")
    inexact, names = arrays.pop("test_inexact", None), arrays.pop("label_names", np.array([], str))
    if inexact is not None:
        if inexact.dtype.kind not in "iu" or not ((inexact >= 0) & (inexact < len(arrays["test_labels"]))).all():
            raise ValueError(f"{path}: test_inexact must hold positions among the {len(arrays['test_labels'])} test images")
        for name in ("test_images", "test_labels"):
            arrays[name] = np.delete(arrays[name], inexact, axis=0)
    if names.ndim != 1:
        raise ValueError(f"{path}: label_names must be (C,) names, not {names.shape}")
    return _dataset(path.stem, arrays, tuple(str(name) for name in names), str(path))


def _from_torchvision(name: str, root: Path) -> Dataset:
    from torchvision import datasets

    if name == "svhn":
        splits = {part: datasets.SVHN(root, split=part, download=True) for part in ("train", "test")}
        arrays: dict[str, Any] = {}
        for part, split in splits.items():
            arrays[f"{part}_images"] = split.data.transpose(0, 2, 3, 1)
            arrays[f"{part}_labels"] = split.labels
        return _dataset(name, arrays, tuple("0123456789"), name)
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    train, test = kind(root, train=True, download=True), kind(root, train=False, download=True)
    arrays = {
        "train_images": train.data,
        "train_labels": np.asarray(train.targets),
        "test_images": test.data,
        "test_labels": np.asarray(test.targets),
    }
    return _dataset(name, arrays, tuple(train.classes), name)


def _from_folder(folder: Path, size: int) -> Dataset:
    classes = sorted(entry.name for entry in (folder / "train").glob("*") if entry.is_dir())
    if len(classes) < 2:
        raise ValueError(f"{folder}/train must hold one folder per class, at least two; found {classes}")
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        unknown = sorted({e.name for e in (folder / part).glob("*") if e.is_dir()} - set(classes))
        if unknown:
            raise ValueError(f"{folder}/{part} has classes that {folder}/train lacks: {', '.join(unknown)}")
        images, labels = [], []
        for label, name in enumerate(classes):
            for file in sorted((folder / part / name).glob("*")):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    images.append(_read_image(file, size))
                    labels.append(label)
        if not images:
            raise ValueError(f"{folder}/{part} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = np.stack(images), np.asarray(labels)
    return _dataset(folder.name, arrays, tuple(classes), str(folder))


def _read_image(file: Path, size: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} is not a readable image: {error}") from error


def _dataset(name: str, arrays: dict[str, Any], names: tuple[str, ...], where: str) -> Dataset:
    splits, digests = {}, {}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        _check(part, images, labels, where)
        digest = hashlib.sha256(np.ascontiguousarray(images).data)
        digest.update(labels.astype("<i8").tobytes())
        digests[part] = digest.hexdigest()
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        splits[part] = Split(pixels, torch.from_numpy(labels.astype(np.int64)))
    if splits["train"].images.shape[1:] != splits["test"].images.shape[1:]:
        raise ValueError(f"{where}: train and test images differ in size")
    classes = int(max(splits["train"].labels.max(), splits["test"].labels.max())) + 1
    names = names or tuple(str(i) for i in range(classes))
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: label_names must be different names, not {', '.join(names)}")
    if classes > len(names):
        raise ValueError(f"{where}: label {classes - 1} has no name; label_names has {len(names)}")
    if len(names) < 2 or len(splits["train"].labels.unique()) < 2:
        raise ValueError(f"{where}: train_labels hold a single class; a classifier needs at least two")
    return Dataset(name, splits["train"], splits["test"], names, digests["train"], digests["test"])


def _check(part: str, images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{where}: {part}_images must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: {part}_labels must be (N,) integers, not {labels.shape} {labels.dtype}")
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(f"{where}: {len(images)} {part}_images but {len(labels)} {part}_labels")
    if labels.min() < 0:
        raise ValueError(f"{where}: {part}_labels has the negative label {labels.min()}")
