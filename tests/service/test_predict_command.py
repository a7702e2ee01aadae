"""``palisade-serve predict``: files and folders, here and at a service."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.ports import held_port
from service.cli import main
from tests.service.conftest import LABELS, PATIENCE_S, ROOT, RunningServer
from tests.service.pictures import encode, noise, pixels
from tests.service.scripted import Answer, Sent, scripted

COUNT = 45  # more than the shared server takes in one request
OFFLINE = ("--device", "cpu", "--precision", "float32")


@pytest.fixture(autouse=True)
def _on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALISADE_THREADS", "1")
    monkeypatch.delenv("PALISADE_API_KEY", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders, one that is damaged, and what is no picture by its name."""
    root = tmp_path_factory.mktemp("photos")
    (root / "deep" / "deeper").mkdir(parents=True)
    for number in range(COUNT):
        (root / ("deep" if number % 3 else "deep/deeper") / f"{number:02d}.PNG").write_bytes(encode(noise(number)))
    (root / "deep" / "20b.jpg").write_bytes(encode(noise(3), "JPEG")[:200])
    (root / "odd.webp").write_bytes(encode(noise(7, 200, 90), "WEBP", lossless=True))
    (root / "notes.txt").write_text("no picture")
    return root


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[Any], str]:
    """Return the exit status, the JSON lines and standard error."""
    status = main(["predict", "--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def test_a_folder_is_classified_as_the_model_itself_does(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from model import load_checkpoint

    status, lines, err = predict(capsys, *OFFLINE, "--checkpoint", checkpoint, folder)
    assert status == 1
    paths = [line["path"] for line in lines]
    assert paths == sorted(paths)
    assert len(paths) == COUNT + 2
    (bad,) = [line for line in lines if "error" in line]
    assert bad["path"].endswith("20b.jpg")
    assert f"1 of {COUNT + 2} images" in err
    numbered = {int(Path(line["path"]).stem): line for line in lines if line["path"].endswith(".PNG")}
    stacked = np.stack([pixels(noise(number)) for number in range(COUNT)])  # (N, 3, 32, 32)
    with torch.no_grad():
        expected = load_checkpoint(checkpoint)(torch.from_numpy(stacked) / 255).exp().numpy()
    for number, row in enumerate(expected):
        line = numbered[number]
        assert line["label"] == LABELS[row.argmax()]
        assert list(line["scores"].values()) == sorted(line["scores"].values(), reverse=True)
        assert [line["scores"][label] for label in LABELS] == pytest.approx(row.tolist(), abs=1e-4)
        assert line["confidence"] == line["scores"][line["label"]]


def test_a_service_answers_as_the_command_itself_does(
    checkpoint: Path, folder: Path, server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = server.metric("palisade_predictions_total")
    status, remote, err = predict(capsys, "--url", server.url, folder)
    assert (status, f"1 of {COUNT + 2} images" in err) == (1, True)
    assert (
        server.metric("palisade_predictions_total") - before == COUNT + 1
    )  # one bad image spoils no other, none is asked twice
    _, offline, _ = predict(capsys, *OFFLINE, "--checkpoint", checkpoint, folder)
    for here, there in zip(offline, remote, strict=True):
        assert here["path"] == there["path"]
        assert here.get("error") == there.get("error")
        assert here.get("label") == there.get("label")
        for label, score in here.get("scores", {}).items():
            assert there["scores"][label] == pytest.approx(score, abs=0.0051)  # rounded to two decimals


def test_text_has_as_many_scores_as_are_asked_for_and_errors_go_to_standard_error(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "\x1b[31mgood.png", tmp_path / "missing.png"
    good.write_bytes(encode(noise(1)))
    assert main(["predict", *OFFLINE, "--checkpoint", str(checkpoint), "--top", "3", str(good), str(bad), str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == second  # once by name, once in its folder
    scores = [part.rsplit(" ", 1) for part in first.rpartition(": ")[2].split(", ")]
    assert len(scores) == 3
    assert {label for label, _ in scores} <= set(LABELS)
    assert [float(score) for _, score in scores] == sorted((float(score) for _, score in scores), reverse=True)
    assert "\x1b" not in out, "a file's name controls the terminal"
    assert f"{bad}: No such file" in err


def test_what_cannot_be_read_is_told_and_nothing_is_waited_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(bytes(2000))
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    monkeypatch.setenv("PALISADE_MAX_IMAGE_BYTES", "1000")
    status, lines, _ = predict(capsys, *OFFLINE, "--checkpoint", checkpoint, tmp_path)
    assert status == 1
    errors = {Path(line["path"]).name: line["error"] for line in lines}
    assert errors.keys() == {"pipe.png", "large.png", "round.png"}
    assert "2000 bytes; at most 1000" in errors["large.png"]
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty")]) == 1
    assert "no images in" in capsys.readouterr().err


def test_the_limits_of_a_service_are_kept_and_its_pauses_honoured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(encode(noise(number)))
    refusals = [(429, {"Retry-After": "0"}, {"detail": "the quota is used up"})] * 2
    sizes = []

    def answer(sent: Sent) -> Answer:
        if sent.path == "/v1/model":
            return 200, {}, {"quota": [{"window": "minute", "limit": 2}, {"window": "day", "limit": 100}]}
        if sent.method == "GET":
            return 200, {}, {"max_batch_size": 40}
        images = sent.body.count(b'name="file"')
        if len(sizes) == 1 and refusals:
            return refusals.pop()
        sizes.append(images)
        return 200, {}, {"predictions": [{"label": "cat", "index": 3}] * images}  # label only

    monkeypatch.setenv("PALISADE_API_KEY", "palisade_from_the_environment")
    with scripted(answer) as (url, seen):
        status, lines, err = predict(capsys, "--url", url, tmp_path)
        assert (status, sizes) == (0, [2, 2, 1])
        assert err.count("429: the quota is used up; waiting 0 s") == 2
        assert [line.keys() for line in lines] == [{"path", "label"}] * 5
        assert {sent.headers["authorization"] for sent in seen} == {"Bearer palisade_from_the_environment"}
        key = tmp_path / "key"
        key.write_text("palisade_from_a_file\n")
        assert main(["predict", "--url", url, "--key-file", str(key), str(tmp_path / "0.png")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / '0.png'}: cat\n"
        assert seen[-1].headers["authorization"] == "Bearer palisade_from_a_file"


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (429, {"Retry-After": "3600"}, "longer than --max-wait 120"),
        (401, {}, "answered 401: no"),
        (302, {"Location": "/"}, "302"),
    ],
)
def test_a_service_that_will_not_answer_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, headers: dict[str, str], said: str
) -> None:
    (tmp_path / "0.png").write_bytes(encode(noise(0)))
    model = {"quota": [], "detail": "no"}
    with scripted(lambda sent: (200, {}, model) if sent.method == "GET" else (status, headers, {"detail": "no"})) as (
        url,
        seen,
    ):
        assert main(["predict", "--url", url, str(tmp_path)]) == 1
        assert len(seen) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), said in err, "1 of 1 images are left" in err) == ("", 1, True, True), err
    with held_port() as port:  # nobody listens there
        assert main(["predict", "--url", f"http://127.0.0.1:{port}", str(tmp_path)]) == 1
    assert "cannot be asked" in capsys.readouterr().err


def test_wrong_usage_is_told_without_repeating_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("palisade_secret words\nand more")
    url = ["--url", "http://127.0.0.1:1"]
    wrong = [
        [*url, "--device", "cpu"],
        ["--key-file", str(key)],
        [*url, "--key-file", str(key)],
        [*url, "--key-file", str(tmp_path / "none")],
        ["--url", "127.0.0.1:8000"],
        ["--url", "http://user:secret@127.0.0.1:8000"],
    ]
    for arguments in wrong:
        assert main(["predict", *arguments, "docs/samples"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), "secret words" in err) == ("", 1, False)
    assert main(["predict", "--checkpoint", str(key), "docs/samples"]) == 1
    assert "key" in capsys.readouterr().err


def test_a_terminal_shows_a_bar_and_a_pipe_gets_the_lines_alone(checkpoint: Path, folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "service.cli", "predict", "--json", *OFFLINE, "--checkpoint", str(checkpoint), str(folder)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        assert process.stdout
        lines = process.stdout.read().splitlines()
        shown = io.BytesIO()
        try:
            while chunk := os.read(ours, 65_536):
                shown.write(chunk)
        except OSError:  # how a terminal tells that nobody writes to it any more
            pass
        os.close(ours)
        assert process.wait(PATIENCE_S) == 1
    assert [json.loads(line)["path"] for line in lines] == sorted(json.loads(line)["path"] for line in lines)
    assert len(lines) == COUNT + 2
    assert f"{COUNT + 2}/{COUNT + 2}".encode() in shown.getvalue()


def test_an_animated_or_transparent_picture_is_treated_as_the_service_does(
    checkpoint: Path, tmp_path: Path, server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    glass = noise(5, 50, 40).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize((50, 40)))
    (tmp_path / "glass.png").write_bytes(encode(glass))
    frames = [noise(1), noise(2)]
    (tmp_path / "moving.webp").write_bytes(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    _, here, _ = predict(capsys, *OFFLINE, "--checkpoint", checkpoint, tmp_path)
    _, there, _ = predict(capsys, "--url", server.url, tmp_path)
    assert here[1]["error"] == there[1]["error"]
    assert here[0]["scores"] == pytest.approx(there[0]["scores"], abs=0.0051)
