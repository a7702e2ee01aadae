"""Somebody's own pictures: from a folder to answers over HTTP, with the commands that the documentation gives."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from model.checkpoint import load_checkpoint, read_header
from service.engine import Engine
from service.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import ROOT, SharedEngine, serve_in_process
from tests.training.conftest import SETTINGS
from training.cli import main
from training.image_folder import read_image

CLASSES = {"blue square": (30, 60, 230), "grün": (20, 200, 40), "red disc": (230, 30, 30)}
"""Coloured shapes; neither the names nor their number, nor the pictures' sizes, are those of any public data."""

SIZE = 16
TINY = [part for setting in SETTINGS for part in ("--set", setting)]


def picture(name: str, generator: np.random.Generator) -> Image.Image:
    """Return a shape in its class's colour on noise, of any size, as photos come."""
    width, height = (int(side) for side in generator.integers(20, 60, 2))
    image = Image.fromarray(generator.integers(60, 160, (height, width, 3), dtype=np.uint8))
    box = [width // 5, height // 5, width - width // 5, height - height // 5]
    draw = ImageDraw.Draw(image)
    (draw.rectangle if "square" in name else draw.ellipse)(box, fill=CLASSES[name])
    return image


def make_photos(folder: Path, train: int, test: int) -> Path:
    generator = np.random.default_rng(3)
    for part, count in (("train", train), ("test", test)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                suffix = ("png", "jpg")[index % 2]
                picture(name, generator).save(folder / part / name / f"{index}.{suffix}")
    return folder


def documented_commands() -> list[str]:
    """Return the lines that the section tells a newcomer to type."""
    section = (ROOT / "docs" / "training.md").read_text().split("\n## Your own data\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```\n(.*?palisade-train .*?)^```", section, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\\n\s*", "", block).splitlines()


def test_the_walk_through_leads_from_a_folder_of_pictures_to_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", train=16, test=6)
    commands = documented_commands()
    assert commands[-1] == "PALISADE_CHECKPOINT=mine.safetensors palisade-serve run"
    typed = [shlex.split(command)[1:] for command in commands if command.startswith("palisade-train ")]
    assert [words[0] for words in typed] == ["compact", "evaluate"]
    for words in typed:
        tiny = TINY if words[0] == "compact" else []
        assert main([*words, "--image-size", str(SIZE), "--n", "6", "--device", "cpu", *tiny]) == 0

    checkpoint = tmp_path / "mine.safetensors"
    header = read_header(checkpoint)
    assert header.class_names == tuple(CLASSES)
    assert (header.architecture.num_classes, header.architecture.height, header.architecture.input_width) == (3, SIZE, SIZE)
    assert header.data["name"] == "photos"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["n"], figures["checkpoint_sha256"]) == (6, header.weights_sha256)
    assert list((tmp_path / "runs" / "photos" / "events").glob("events.out.tfevents.*"))

    for name in Settings.model_fields:
        monkeypatch.delenv(f"PALISADE_{name.upper()}", raising=False)
    monkeypatch.setenv("PALISADE_CHECKPOINT", "mine.safetensors")
    files = [tmp_path / "photos" / "test" / name / file for name in CLASSES for file in ("0.png", "1.jpg")]
    for file, prediction in zip(files, asyncio.run(served(files)), strict=True):
        check_prediction(prediction, checkpoint, file)


async def served(files: list[Path]) -> list[dict[str, Any]]:
    """POST files as they are to the service and return its predictions."""
    engine = Engine(Settings(device="cpu", precision="float32", threads=1), Metrics())
    predictions = []
    async with serve_in_process(SharedEngine(engine)) as service, service.client() as client:
        for file in files:
            kind = {".png": "image/png", ".jpg": "image/jpeg"}[file.suffix]
            reply = await client.post("/v1/classify", content=file.read_bytes(), headers={"content-type": kind})
            assert reply.status_code == 200, reply.text
            predictions += reply.json()["predictions"]
    engine.close()
    return predictions


def check_prediction(prediction: dict[str, Any], checkpoint: Path, file: Path) -> None:
    """Compare an answer with what the checkpoint says of the file as training reads it."""
    pixels = torch.tensor(read_image(file, SIZE)).permute(2, 0, 1).unsqueeze(0).float() / 255  # (1, 3, 16, 16)
    expected = dict(zip(CLASSES, load_checkpoint(checkpoint)(pixels)[0].exp().tolist(), strict=True))
    assert prediction["scores"] == pytest.approx(expected, abs=0.006)  # two decimals
    assert prediction["label"] in CLASSES
    assert expected[prediction["label"]] == pytest.approx(max(expected.values()), abs=1e-3)


# --- what a newcomer gets wrong


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", train=2, test=1)


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must fail with status 1 and one line, and return that line."""
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("palisade-train: ")
    assert message.count("\n") == 1
    return message


def spoil_image(photos: Path) -> None:
    (photos / "train" / "grün" / "1.jpg").write_bytes(b"\xff\xd8\xff but no JPEG")


def empty_class(photos: Path) -> None:
    (photos / "train" / "no class yet").mkdir()


def only_raw_photos(photos: Path) -> None:
    for file in (photos / "train" / "red disc").iterdir():
        file.rename(file.with_suffix(".cr2"))


def one_class(photos: Path) -> None:
    for name in ("grün", "red disc"):
        shutil.rmtree(photos / "train" / name)


def same_photo_twice(photos: Path) -> None:
    shutil.copy(photos / "train" / "grün" / "0.png", photos / "test" / "grün" / "7.png")


MISTAKES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a broken image": (spoil_image, ["photos/train/grün/1.jpg is not a readable image"]),
    "an empty class": (empty_class, ["photos/train/no class yet holds no images (it is empty)"]),
    "files of another kind": (only_raw_photos, ["photos/train/red disc holds no images", "0.cr2, 1.cr2 skipped"]),
    "a single class": (one_class, ["photos/train must hold one folder of images per class", "blue square"]),
    "one photo in both": (same_photo_twice, ["photos/train/grün/0.png = ", "photos/test/grün/7.png", "--allow-overlap"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_folder_is_one_line_that_names_it(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, named = MISTAKES[case]
    spoil(photos)
    run = tmp_path / "run"
    for command in (["pretrain", "--run", str(run), *TINY], ["evaluate"]):
        message = refusal(capsys, [*command, "--data", str(photos), "--image-size", str(SIZE), "--device", "cpu"])
        assert all(part in message for part in named)
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--image-size", "0", *TINY], "--image-size 0"),
        (["--image-size", "16"], "cannot hold out 1000 of 6 training images: give for example --set holdout=1"),
        (["--image-size", "16", "--set", "holdout=1"], "5 training images do not fill one batch of 128"),
    ],
    ids=["no size", "too few for the holdout", "too few for a batch"],
)
def test_settings_that_a_small_folder_cannot_fill_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    command = ["pretrain", "--data", str(photos), "--run", str(tmp_path / "run"), "--device", "cpu", *arguments]
    assert named in refusal(capsys, command)


def test_a_checkpoint_of_other_classes_is_refused_with_both(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, ["evaluate", "--data", str(photos), "--checkpoint", "compact", "--device", "cpu"])
    assert "airplane" in message
    assert "grün" in message


def test_labels_that_do_not_fit_the_arrays_are_named_by_file_and_array(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], colours: dict[str, np.ndarray]
) -> None:
    colours["test_labels"][5] = 7
    np.savez(tmp_path / "mine.npz", **colours)
    message = refusal(capsys, ["evaluate", "--data", str(tmp_path / "mine.npz"), "--device", "cpu"])
    assert "mine.npz: test_labels: label 7 has no name" in message
