"""Image folders: what is read, how pictures are prepared, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from service.decode import Decoder
from tests.service.pictures import animation, encode, noise, raw_png
from training.data import Dataset
from training.image_folder import read_image
from training.loading import load_dataset

SHADES = {"dark": (10, 20, 30), "light": (200, 210, 220)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of plain pictures; those of test are a little brighter, since none may be in train."""
    root = tmp_path / "shades"
    for part, count, brighter in (("train", 3, 0), ("test", 2, 1)):
        for name, colour in SHADES.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                shade = tuple(value + brighter for value in colour)
                Image.new("RGB", (10, 14), shade).save(root / part / name / f"{index}.png")
    return root


def load_folder(folder: Path) -> Dataset:
    return load_dataset(str(folder), size=8)


def test_an_image_folder_is_resized_and_labelled_by_its_sub_folders(folder: Path) -> None:
    (folder / "train" / "dark" / "notes.txt").write_text("not an image")
    Image.new("L", (8, 8), 200).save(folder / "test" / "light" / "grey.JPEG")
    dataset = load_folder(folder)
    assert (dataset.name, dataset.label_names) == ("shades", ("dark", "light"))
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.train.images.shape == (6, 3, 8, 8)
    for image, label in zip(dataset.train.images, dataset.train.labels, strict=True):
        expected = torch.tensor(list(SHADES.values())[label], dtype=torch.uint8).view(3, 1, 1)
        assert torch.equal(image, expected.expand(3, 8, 8))


def test_what_operating_systems_leave_behind_is_no_class_and_no_image(folder: Path) -> None:
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dark" / "._0.png").write_bytes(b"resource fork")
    (folder / "train" / "dark" / "more.png").mkdir()
    (folder / "train" / "README.md").write_text("hello")
    assert load_folder(folder).train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_test_split_may_lack_a_class(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "dark")
    assert load_folder(folder).test.labels.tolist() == [1, 1]


# --- pictures


def gradient(width: int, height: int) -> Image.Image:
    """A picture that is redder to the right and greener downwards, so that turning or cropping it shows."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: its left side is the top
    return encode(gradient(40, 20), "JPEG", exif=exif, quality=95)


def transparent(mode: str) -> bytes:
    picture = noise(3).convert(mode)
    picture.putalpha(Image.linear_gradient("L").resize((32, 32)))
    return encode(picture)


def palette(**options: int) -> bytes:
    picture = Image.new("P", (32, 32), 0)
    picture.paste(1, (0, 16, 32, 32))
    picture.putpalette([200, 0, 0, 0, 150, 0])
    return encode(picture, **options)


def wide_grey(value: int) -> bytes:
    return raw_png(32, 32, 16, 0, (b"\0" + value.to_bytes(2, "big") * 32) * 32)


PICTURES: dict[str, bytes] = {
    "a wide one": encode(gradient(90, 20)),
    "a high one": encode(gradient(7, 70), "WEBP", lossless=True),
    "a small one": encode(gradient(3, 2)),
    "the right size": encode(gradient(16, 16)),
    "grey": encode(noise(1).convert("L")),
    "grey with alpha": transparent("L"),
    "colour with alpha": transparent("RGB"),
    "a palette": palette(),
    "a transparent palette": palette(transparency=0),
    "black and white": encode(noise(2).convert("1")),
    "16-bit grey": wide_grey(0x80FF),
    "16-bit colour": raw_png(32, 32, 16, 2, (b"\0" + bytes.fromhex("80004000ff00") * 32) * 32),
    "cmyk": encode(noise(4).convert("CMYK"), "JPEG"),
    "turned by its EXIF": turned(),
    "nonsense EXIF": encode(noise(5), "JPEG", exif=b"Exif\0\0garbage"),
}


@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.parametrize("size", [8, 16, 40])
def test_a_picture_is_prepared_as_the_service_does(tmp_path: Path, case: str, size: int) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURES[case])  # whatever it is: names lie
    served = Decoder(height=size, width=size, max_bytes=10**6, max_pixels=10**6).decode(PICTURES[case])
    assert np.array_equal(read_image(tmp_path / "picture.png", size), served.transpose(1, 2, 0))


def corners(tmp_path: Path, data: bytes) -> tuple[list[int], list[int]]:
    """Return a picture's colours, made 16 x 16, at the top left and at the bottom right."""
    (tmp_path / "picture.png").write_bytes(data)
    image = read_image(tmp_path / "picture.png", 16)
    return image[0, 0].tolist(), image[-1, -1].tolist()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    assert corners(tmp_path, wide_grey(0x80FF)) == ([0x80] * 3, [0x80] * 3)
    assert corners(tmp_path, wide_grey(0x00FF)) == ([0] * 3, [0] * 3)


def test_the_transparent_part_of_a_palette_is_white(tmp_path: Path) -> None:
    assert corners(tmp_path, palette()) == ([200, 0, 0], [0, 150, 0])
    assert corners(tmp_path, palette(transparency=0)) == ([255, 255, 255], [0, 150, 0])


def test_a_photo_is_turned_as_its_exif_says_and_squeezed_whole(tmp_path: Path) -> None:
    top_left, bottom_right = corners(tmp_path, turned())
    assert top_left == pytest.approx([0, 255, 90], abs=30)  # what lies at the bottom left of the file
    assert bottom_right == pytest.approx([255, 0, 90], abs=30)
    top_left, bottom_right = corners(tmp_path, encode(gradient(90, 20)))
    assert top_left == pytest.approx([0, 0, 90], abs=30)
    assert bottom_right == pytest.approx([255, 255, 90], abs=30)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    red, blue = [255, 0, 0], [0, 0, 255]
    assert red == corners(tmp_path, animation("PNG"))[0] != blue


# --- overlap


def test_a_picture_in_train_and_test_is_refused_by_its_file_names(folder: Path) -> None:
    shutil.copy(folder / "train" / "light" / "0.png", folder / "test" / "light" / "again.png")
    # the same for the network: it differs in size and format, and is the same picture once it is resized
    Image.new("RGB", (30, 9), SHADES["dark"]).save(folder / "test" / "light" / "larger.webp", lossless=True)
    with pytest.raises(ValueError, match="2 of 6 test images are training images too") as refusal:
        load_folder(folder)
    assert "train/light/0.png = " in str(refusal.value)
    assert "test/light/again.png" in str(refusal.value)
    assert "train/dark/0.png = " in str(refusal.value)
    assert "test/light/larger.webp" in str(refusal.value)


# --- what is refused


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


def another_format(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "train" / "light" / "9.png", "GIF")


def only_in_test(folder: Path) -> None:
    (folder / "test" / "grey").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "test" / "grey" / "0.png")


def emptied(part: str, *left: str) -> Callable[[Path], None]:
    """Return what leaves only these files, none of them an image, in the class ``light``."""

    def spoil(folder: Path) -> None:
        for file in (folder / part / "light").iterdir():
            file.unlink()
        for name in left:
            (folder / part / "light" / name).write_text("no image")

    return spoil


def latin(folder: Path) -> None:
    (folder / "train" / "light" / "0.png").rename(os.fsdecode(os.fsencode(folder / "train" / "light") + b"/caf\xe9.png"))


def no_classes(folder: Path) -> None:
    for name in SHADES:
        for file in (folder / "train" / name).iterdir():
            file.rename(folder / "train" / f"{name}-{file.name}")
        (folder / "train" / name).rmdir()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file that is no image": (broken, r"light/9\.png is not a readable image .*: replace or remove it"),
    "half an image": (half, r"light/9\.png is not a readable image"),
    "a garbled image": (garbled, r"light/9\.png is not a readable image"),
    "a GIF called PNG": (another_format, r"light/9\.png is not a readable image"),
    "a class only in test": (only_in_test, r"shades/test has classes that .*shades/train lacks: grey"),
    "a file whose name is not UTF-8": (latin, r"light/caf\\xe9\.png': the file's name is not UTF-8: rename it"),
    "a single class": (
        lambda folder: (folder / "train" / "light").rename(folder / "elsewhere"),
        r"shades/train must hold one folder of images per class, at least two; found dark",
    ),
    "no class folders": (no_classes, r"shades/train must hold one folder .*; found none"),
    "no train": (lambda folder: (folder / "train").rename(folder / "elsewhere"), r"shades/train must hold .*; found none"),
    "no test": (lambda folder: (folder / "test").rename(folder / "elsewhere"), r"shades/test holds no images"),
    "an empty class": (emptied("train"), r"train/light holds no images \(it is empty\)"),
    "an empty class in test": (emptied("test"), r"test/light holds no images \(it is empty\)"),
    "only files of other kinds": (
        emptied("train", "a.gif", "b.txt", "c.heic", "d.heic", "e.heic"),
        r"train/light holds no images \(a\.gif, b\.txt, c\.heic and 2 more skipped, since only \.bmp, .* are read\)",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_image_folder_is_refused_by_path(folder: Path, case: str) -> None:
    spoil, message = FOLDERS[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


@pytest.mark.parametrize("size", [-1, 0, 7, 1025])
def test_a_size_that_no_network_takes_is_refused(folder: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"--image-size {size}: .* from 8 to 1024"):
        load_dataset(str(folder), size=size)
