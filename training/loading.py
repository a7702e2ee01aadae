"""Loading of datasets, checked: from an ``.npz`` file, from torchvision, or from an image folder."""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data import PARTS, Dataset, Split
from training.image_folder import read_image_folder

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
OPTIONAL_ARRAYS = ("test_inexact", "label_names")
DOWNLOADS = ("cifar10", "cifar100", "svhn")


@dataclass(frozen=True)
class _Raw:
    """Arrays as they were read, to be checked.

    Attributes:
        name: What the data are called.
        where: What errors call them.
        arrays: ``<part>_images`` ``(N, H, W, 3)`` and ``<part>_labels`` ``(N,)`` for each of ``PARTS``.
        label_names: One name per class; empty for numbers.
        places: For a part: where each of its images comes from, as errors name it; by default its position in the array.
    """

    name: str
    where: str
    arrays: dict[str, Any]
    label_names: tuple[str, ...] = ()
    places: dict[str, Sequence[object]] = field(default_factory=dict)

    def place(self, part: str, position: int) -> str:
        """Name an image as a person would look for it."""
        place = self.places[part][position] if part in self.places else position
        return place if isinstance(place, str) else f"{part}_images[{place}]"


def load_dataset(source: str, root: Path = Path("data"), size: int = 32, *, allow_overlap: bool = False) -> Dataset:
    """Load a dataset.

    Args:
        source: A path to an ``.npz`` file with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (NHWC
            uint8 and integers; ``label_names`` is optional, and test images at the positions in ``test_inexact`` are left
            out); or ``cifar10``, ``cifar100`` or ``svhn``, which torchvision downloads; or a folder with
            ``train/<class>/*`` and ``test/<class>/*`` images.
        root: Where downloads are kept.
        size: Side in pixels to which a folder's images are resized.
        allow_overlap: Take data whose test split has images, after resizing, that are pixel for pixel in the training split:
            a warning goes to standard error and the images are listed in ``overlap``. A download's splits are as they were
            published, so its overlap is always reported like this.

    Raises:
        ValueError: The data cannot be used; the message names the file or array and what is wrong with it.
    """
    if source in DOWNLOADS:
        return _dataset(_from_torchvision(source, root), allow_overlap=True)
    path = Path(source)
    if path.is_dir():
        return _dataset(_from_folder(path, size), allow_overlap)
    if path.is_file():
        return _dataset(_from_npz(path), allow_overlap)
    raise ValueError(f"no data at {source}: give an .npz file, an image folder, or one of {', '.join(DOWNLOADS)}")


def _from_npz(path: Path) -> _Raw:
    arrays = _read_npz(path)
    for part in PARTS:
        _check(part, arrays[f"{part}_images"], arrays[f"{part}_labels"], str(path))
    kept = np.arange(len(arrays["test_labels"]))
    inexact = arrays.pop("test_inexact", None)
    if inexact is not None:
        if inexact.dtype.kind not in "iu" or not ((inexact >= 0) & (inexact < len(kept))).all():
            raise ValueError(f"{path}: test_inexact must hold positions among the {len(kept)} test images")
        kept = np.delete(kept, inexact)
        for name in ("test_images", "test_labels"):
            arrays[name] = arrays[name][kept]
    names = arrays.pop("label_names", np.array([], str))
    if names.ndim != 1:
        raise ValueError(f"{path}: label_names must be (C,) names, not {names.shape}")
    texts = (name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names.tolist())
    return _Raw(path.stem, str(path), arrays, tuple(texts), {"test": kept.tolist()})


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    name, arrays = "", {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            for name in (*ARRAYS, *OPTIONAL_ARRAYS):
                if name in file:
                    arrays[name] = file[name]
    except (EOFError, OSError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        where = f": array {name}, which must be plain numbers or text and all images of one size" if name else ""
        raise ValueError(f"{path} is not a readable .npz file{where} ({error})") from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks the arrays {', '.join(missing)}; it has {', '.join(arrays) or 'none of them'}")
    return arrays


def _from_torchvision(name: str, root: Path) -> _Raw:
    from torchvision import datasets

    arrays: dict[str, Any] = {}
    names: tuple[str, ...] = ()
    try:
        for part in PARTS:
            if name == "svhn":
                split = datasets.SVHN(root, split=part, download=True)
                arrays[f"{part}_images"], arrays[f"{part}_labels"] = split.data.transpose(0, 2, 3, 1), split.labels
                continue
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            split = kind(root, train=part == "train", download=True)
            arrays[f"{part}_images"], arrays[f"{part}_labels"] = split.data, np.asarray(split.targets)
            names = tuple(split.classes)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be downloaded into {root} ({error}): give an .npz file or an image folder") from error
    return _Raw(name, name, arrays, names)


def _from_folder(folder: Path, size: int) -> _Raw:
    content = read_image_folder(folder, size)
    arrays = {f"{part}_images": images for part, images in content.images.items()}
    arrays |= {f"{part}_labels": labels for part, labels in content.labels.items()}
    return _Raw(folder.absolute().name, str(folder), arrays, content.classes, dict(content.files))


def _dataset(raw: _Raw, allow_overlap: bool) -> Dataset:
    splits, hashes = {}, {}
    for part in PARTS:
        images, labels = np.ascontiguousarray(raw.arrays[f"{part}_images"]), raw.arrays[f"{part}_labels"]
        _check(part, images, labels, raw.where)
        splits[part] = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))
        hashes[part] = splits[part].digests()
    sizes = [" x ".join(str(side) for side in splits[part].images.shape[2:]) for part in PARTS]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{raw.where}: train_images and test_images differ in size: {sizes[0]} and {sizes[1]} pixels")
    names = _class_names(raw)
    overlap = _overlap(raw, hashes, allow_overlap)
    train, test = splits["train"], splits["test"]
    places = {part: [raw.place(part, row).removeprefix(f"{raw.where}/") for row in range(len(splits[part]))] for part in PARTS}
    return Dataset(raw.name, train, test, names, train.digest(), test.digest(), overlap, places)


def _check(part: str, images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{where}: {part}_images must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: {part}_labels must be (N,) integers, not {labels.shape} {labels.dtype}")
    if len(images) != len(labels):
        raise ValueError(f"{where}: {len(images)} {part}_images but {len(labels)} {part}_labels")
    if images.size == 0:
        raise ValueError(f"{where}: {part}_images holds no images, its shape is {images.shape}")
    if labels.min() < 0:
        raise ValueError(f"{where}: {part}_labels has the negative label {labels.min()}: number the classes from 0")


def _class_names(raw: _Raw) -> tuple[str, ...]:
    """Return a name for every class; raise ``ValueError`` unless names and training images belong to the same classes."""
    names, where = raw.label_names, raw.where
    labels = {part: np.unique(raw.arrays[f"{part}_labels"]).tolist() for part in PARTS}
    trained = set(labels["train"])
    if len(trained) < 2:
        raise ValueError(f"{where}: train_labels hold a single class; a classifier needs at least two")
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: label_names must be different names, not {', '.join(names)}")
    if any("\ud800" <= character <= "\udfff" for character in "".join(names)):
        raise ValueError(f"{where}: the name of a class is not Unicode text: {names!a:.200}")
    if not names and max(trained) >= len(trained):
        gap = min(set(range(len(trained))) - trained)
        raise ValueError(f"{where}: train_labels go up to {max(trained)} but none is {gap}: number the classes without gaps")
    for part in PARTS:
        for label in labels[part]:
            if names and label >= len(names):
                raise ValueError(f"{where}: {part}_labels: label {label} has no name; label_names has {len(names)}, from 0")
            if label not in trained:
                name = f" ({names[label]})" if names else ""
                raise ValueError(f"{where}: test_labels has label {label}{name}, of which train_labels has no image")
    unseen = [name for label, name in enumerate(names) if label not in trained]
    if unseen:
        raise ValueError(f"{where}: label_names has {', '.join(unseen)}, of which train_labels has no image")
    return names or tuple(str(label) for label in labels["train"])


def _overlap(raw: _Raw, hashes: dict[str, list[str]], allow: bool) -> tuple[str, ...]:
    """Return the hashes of the images that are in both splits; raise ``ValueError`` or warn when there are any."""
    train, test = hashes["train"], hashes["test"]
    trained = set(train)
    common = [image for image in test if image in trained]
    if not common:
        return ()
    overlap = tuple(dict.fromkeys(common))
    examples = [
        f"{image[:16]} ({raw.place('train', train.index(image))} = {raw.place('test', test.index(image))})"
        for image in overlap[:3]
    ]
    more = ", ..." if len(overlap) > len(examples) else ""
    problem = (
        f"{raw.where}: {len(common)} of {len(test)} test images are training images too, "
        f"by SHA-256 of their pixels {', '.join(examples)}{more}"
    )
    if not allow:
        raise ValueError(f"{problem}: remove them from one split, or allow them with --allow-overlap")
    print(f"warning: {problem}: accuracy on them proves nothing", file=sys.stderr)
    return overlap
