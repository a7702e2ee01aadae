"""``palisade-serve tune`` from options to a folder that the fast path loads."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import read_header
from model.execution import TOLERANCE
from model.fast_path import load_fast_path
from service.cli import main
from service.stopwatch import ExecutionFailedError, Stopwatch
from service.tuning import probe

QUICK = ("--seconds", "0.01", "--batch-sizes", "1,2")


@pytest.fixture(autouse=True)
def _on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALISADE_DEVICE", "cpu")
    monkeypatch.setenv("PALISADE_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where choices go."""
    monkeypatch.setenv("PALISADE_TUNING_DIR", str(tmp_path / "tuned"))
    return tmp_path / "tuned"


@dataclass(frozen=True)
class Answers:
    """What the reference says to some images ``(N, 3, H, W)`` uint8."""

    images: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Answers:
    import torch

    from model.checkpoint import load_checkpoint

    images = probe(read_header(checkpoint).architecture, 40)
    with torch.no_grad():
        return Answers(images, load_checkpoint(checkpoint)(torch.from_numpy(images).float() / 255).exp().numpy())


@pytest.fixture(scope="module")
def replay(checkpoint: Path, reference: Answers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replay whose labels are the reference's own, and whose attacks do nothing."""
    path = tmp_path_factory.mktemp("replay") / "replay.npz"
    np.savez(
        path,
        clean=reference.images,
        attacked=reference.images.astype(np.float32) / 255,
        labels=reference.probabilities.argmax(axis=1),
        provenance=np.array(json.dumps({"checkpoint_sha256": read_header(checkpoint).weights_sha256})),
    )
    return path


@dataclass(frozen=True)
class Done:
    """A run of the command that kept int8: its folder and what it printed."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def quantised(checkpoint: Path, replay: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("quantised") / "tuned"
    arguments = [
        "tune",
        "--checkpoint",
        str(checkpoint),
        "--replay",
        str(replay),
        *QUICK,
        "--only",
        "openvino-int8-x3",
        "--json",
    ]
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in (("TUNING_DIR", str(folder)), ("DEVICE", "cpu"), ("THREADS", "1")):
            patch.setenv(f"PALISADE_{name}", value)
        patch.setattr("service.tuning.MOST_POINTS_LOST", 50.0)  # 30 images can't tell 0.3 points
        assert main(arguments) == 0
    return Done(folder, out.getvalue(), err.getvalue())


def test_what_agrees_is_measured_and_the_choice_is_what_the_service_loads(
    checkpoint: Path, folder: Path, reference: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--only", "openvino-float32-x9,loop-float32,openvino-float32-x12")
    assert main(["tune", "--checkpoint", str(checkpoint), *QUICK, *only]) == 0
    out = capsys.readouterr().out
    assert "left out: openvino-float32-x12: ValueError: stack must be from 1 to 9" in out
    table = [line.split() for line in out.splitlines() if line.startswith(("openvino-float32-x9 ", "loop-float32 "))]
    assert len(table) == 2
    assert all(float(rate) > 0 for row in table for rate in row[1:3])
    (kept,) = folder.iterdir()
    assert str(kept) in out
    values = json.loads(kept.read_text())
    assert values["measured"]["images_per_s"].keys() == {"openvino-float32-x9", "loop-float32"}
    assert values["measured"]["images_per_s"]["loop-float32"].keys() == {"1", "2"}
    assert {part["execution"] for part in values["plans"]["float32"]} <= {"openvino-float32-x9", "loop-float32"}
    path = load_fast_path(checkpoint, "cpu", threads=1, tuned=folder)
    assert path.description.startswith(f"{path.plan}; tuned on {values['date']} for ")
    assert path.plan.to_json() == values["plans"]["float32"]
    assert np.abs(path.predict(reference.images).probabilities - reference.probabilities).max() <= TOLERANCE["float32"]


def test_one_voter_can_not_have_an_execution_left_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from model.architecture import Architecture
    from model.checkpoint import Header, save_checkpoint
    from model.mixture import Mixture

    torch.manual_seed(0)
    mixture = Mixture(Architecture(width=2, num_classes=3, height=8, input_width=8, aggregation="vote"))
    with torch.no_grad():
        mixture.experts[3].head.bias += 4096.0  # which changes nothing but that bfloat16 has no room for the rest
        mixture.experts[3].head.bias[2] += 8.0
    path = tmp_path / "vote.safetensors"
    save_checkpoint(path, mixture, Header(mixture.architecture, ("ant", "bee", "cat"), "", data={"partitions": 9}))
    assert main(["tune", "--checkpoint", str(path), *QUICK, "--only", "loop-bfloat16,loop-float32"]) == 1
    told = capsys.readouterr()
    assert "palisade-serve: loop-bfloat16: its answers are too far from the reference's" in told.err.splitlines()[-1]
    assert "where experts vote nothing is left out for that" in told.err.splitlines()[-1]
    assert "left out:" not in told.out
    assert not list(folder.iterdir())


def test_int8_that_keeps_the_accuracy_is_kept_and_served(checkpoint: Path, quantised: Done, reference: Answers) -> None:
    values, folder = json.loads(quantised.out), quantised.folder
    judged = values["measured"]["accuracy"]["openvino-int8-x3"]
    assert judged["n"] == 30
    assert judged["accepted"] is True
    assert judged["percent"]["clean"]["float32"] == judged["percent"]["attacked"]["float32"] == 100
    assert "n = 30: accepted" in quantised.err
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".json", ".xml"]
    path = load_fast_path(checkpoint, "cpu", "int8", threads=1, tuned=folder)
    assert (path.precision, str(path.plan)) == ("int8", "openvino-int8-x3")
    served = path.predict(reference.images[-30:]).probabilities
    assert np.abs(served - reference.probabilities[-30:]).max() <= TOLERANCE["int8"]
    right = 100 * (served.argmax(axis=1) == reference.probabilities[-30:].argmax(axis=1)).mean()
    assert right == pytest.approx(judged["percent"]["clean"]["int8"], abs=0.01)
    assert load_fast_path(checkpoint, "cpu", threads=1, tuned=folder).precision == "int8"
    assert load_fast_path(checkpoint, "cpu", "float32", threads=1, tuned=folder).description.endswith("chosen by default")


def test_int8_that_loses_accuracy_is_left_out(
    checkpoint: Path,
    folder: Path,
    replay: Path,
    quantised: Done,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy(name: str, checkpoint: str, device: str, file: Path, calibration: np.ndarray) -> None:
        """Quantising once is enough."""
        for path in quantised.folder.glob("*.int8.*"):
            shutil.copy(path, file.parent)

    monkeypatch.setattr(Stopwatch, "build", copy)
    monkeypatch.setattr("service.tuning.MOST_POINTS_LOST", -101.0)
    arguments = ["tune", "--checkpoint", str(checkpoint), "--replay", str(replay), *QUICK]
    assert main([*arguments, "--only", "openvino-int8-x3,openvino-float32-x9"]) == 0
    out = capsys.readouterr().out
    assert "not accepted" in out
    assert "left out: openvino-int8-x3: too much accuracy is lost" in out
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    with pytest.raises(ValueError, match="hold no accepted int8 model"):
        load_fast_path(checkpoint, "cpu", "int8", threads=1, tuned=folder)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--seconds", "0"], "give seconds, more than 0"),
        (["--seconds", "soon"], "give seconds"),
        (["--batch-sizes", "1,x"], "1,x: give numbers of images"),
        (["--batch-sizes", "0"], "0: give numbers of images"),
        (["--only", "loop-float16"], "'loop-float16' is no execution"),
        (["--only", "openvino-int8-x3"], "--only: int8 needs --replay"),
    ],
)
def test_wrong_usage_ends_with_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    try:
        status = main(["tune", *options])
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2
    assert complaint in capsys.readouterr().err


def test_what_fails_is_one_line_and_status_1(
    folder: Path, tmp_path: Path, replay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    for options, setting, complaint in (
        (["--checkpoint", "nowhere.safetensors"], {}, "nowhere.safetensors: no such checkpoint"),
        (["--replay", str(replay)], {}, "attacks the checkpoint"),
        ([], {"PALISADE_TOP_K": "12"}, "top_k=12: the checkpoint has 9 experts"),
        ([], {"PALISADE_DEVICE": "tpu"}, "device=tpu"),
        ([], {"PALISADE_TUNING_DIR": str(tmp_path / "shared")}, "writable by others"),
    ):
        with pytest.MonkeyPatch.context() as environment:
            for name, value in setting.items():
                environment.setenv(name, value)
            assert main(["tune", *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("palisade-serve: ")
        assert complaint in line


def test_an_execution_that_cannot_be_made_says_why_and_leaves_nothing_running(checkpoint: Path) -> None:
    with pytest.raises(ExecutionFailedError, match=r"loop-float32: CheckpointError: .*no such checkpoint"):
        Stopwatch("loop-float32", "nowhere.safetensors", "cpu")
    with Stopwatch("openvino-float32-x1", str(checkpoint), "cpu", threads=1) as watch:
        watch._process.kill()
        with pytest.raises(ExecutionFailedError, match="openvino-float32-x1: its process ended: status -9"):
            watch.rate(1, 0.01)


def test_tuning_without_torch_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("service.tuner.has_torch", lambda: False)
    assert main(["tune"]) == 1
    assert "torch is not installed, as in the image for CPUs" in capsys.readouterr().err
