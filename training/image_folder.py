"""Image folders: files under ``train/<class>/`` and ``test/<class>/``, read as squares of one size."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SMALLEST, LARGEST = 8, 1024
"""Sides in pixels that an architecture takes."""


@dataclass(frozen=True)
class ImageFolder:
    """What an image folder holds.

    Attributes:
        classes: Names of the folders of ``train``, sorted; a class's number is its position.
        images: For ``train`` and ``test``: ``(N, size, size, 3)`` uint8.
        labels: The same: ``(N,)`` int64.
        files: The same: the images' paths.
    """

    classes: tuple[str, ...]
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    files: dict[str, list[str]]


def read_image_folder(folder: Path, size: int) -> ImageFolder:
    """Read the images of ``folder/train/<class>/`` and ``folder/test/<class>/``, in order of class and file name.

    Files of other kinds, folders within a class's folder and everything whose name starts with a dot are skipped.

    Args:
        folder: The folder.
        size: Side in pixels to which the images are resized.

    Raises:
        ValueError: A folder or file cannot be used; the message names it.
    """
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"--image-size {size}: images can be from {SMALLEST} to {LARGEST} pixels wide and high")
    classes = tuple(_class_folders(folder / "train"))
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise ValueError(f"{folder}/train must hold one folder of images per class, at least two; found {found}")
    content = ImageFolder(classes, {}, {}, {})
    for part in ("train", "test"):
        unknown = [name for name in _class_folders(folder / part) if name not in classes]
        if unknown:
            raise ValueError(f"{folder}/{part} has classes that {folder}/train lacks: {', '.join(unknown)}")
        files = [(file, label) for label, name in enumerate(classes) for file in _image_files(folder / part / name)]
        if not files:
            raise ValueError(f"{folder}/{part} holds no images: make folders in it as in {folder}/train")
        images = np.empty((len(files), size, size, 3), np.uint8)
        bar = tqdm(files, desc=f"read {part}", unit="image", leave=False, disable=None, dynamic_ncols=True)
        for position, (file, _) in enumerate(bar):
            images[position] = read_image(file, size)
        content.images[part] = images
        content.labels[part] = np.asarray([label for _, label in files], np.int64)
        content.files[part] = [str(file) for file, _ in files]
    return content


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("*") if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> Iterator[Path]:
    """Yield a class's images; the test split may lack a class, but a folder without images is a mistake."""
    if not folder.is_dir():
        return
    files = sorted(entry for entry in folder.glob("*") if entry.is_file() and not entry.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        skipped = ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        reason = f"{skipped} skipped, since only {', '.join(sorted(SUFFIXES))} are read" if files else "it is empty"
        raise ValueError(f"{folder} holds no images ({reason}): add some, or remove the folder")
    for file in images:
        try:
            str(file).encode()
        except UnicodeEncodeError:  # manifests, quarantine files and headers name it, and are UTF-8
            raise ValueError(f"{os.fsencode(file)!r}: the file's name is not UTF-8: rename it") from None
        yield file


def read_image(file: Path, size: int) -> np.ndarray:
    """Return an image as ``(size, size, 3)`` uint8 RGB, prepared as the service prepares what it is sent.

    EXIF orientation is applied, transparency (also a palette's) is laid over white, grey becomes three equal channels, 16 bits
    are scaled to 8, an animation gives its first frame, and the whole image is resized (bicubic, antialiased) without keeping
    its aspect ratio.

    Args:
        file: A PNG, JPEG, WebP or BMP file, whatever it is called.
        size: Side in pixels.

    Raises:
        ValueError: The file cannot be read as an image; the message names it.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            rgb = _to_rgb(_upright(image))
    except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
        raise ValueError(f"{file} is not a readable image ({error}): replace or remove it") from error
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))


# The service may not import this package, nor the other way round, so these two are in service/decode.py as well; a test holds
# them together.


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; one whose EXIF makes no sense stays as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
        wide, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((wide.astype(np.uint32) >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
