"""``palisade-serve inspect``: the model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model import load_checkpoint
from model.checkpoint import read_header, save_checkpoint
from service.cli import main
from tests.service.conftest import LABELS


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["inspect", "--json", *map(str, arguments)]) == 0
    card: dict[str, Any] = json.loads(capsys.readouterr().out)
    return card


def test_the_card_says_what_the_checkpoint_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = inspect(capsys, checkpoint)
    mixture = load_checkpoint(checkpoint)
    assert card["parameters"] == sum(parameter.numel() for parameter in mixture.parameters())
    assert card["class_names"] == list(LABELS)
    assert card["bytes"] == checkpoint.stat().st_size
    assert card["weights_sha256"].startswith(card["version"])
    assert card["verified"] is True
    assert inspect(capsys, checkpoint, "--no-verify") == {**card, "verified": False}


def test_the_embedded_checkpoints_measurements_are_told_with_how_they_were_made(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = read_header("compact").metrics
    assert main(["inspect", "--no-verify"]) == 0
    rows = {line[:14].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert f"{metrics['accuracy']['mixture']['PGD-10']['percent']:.1f} %" in rows["PGD-10"]
    assert "epsilon 8/255" in rows["PGD-10"]
    assert "step_size 2/255" in rows["PGD-10"]
    assert f"n {metrics['n']}" in rows["measured"]
    assert read_header("compact").weights_sha256 in rows["digest"]
    assert "not verified" in rows["digest"]


def test_a_changed_weight_is_noticed_unless_nobody_looks(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert main(["inspect", str(changed)]) == 1
    out, err = capsys.readouterr()
    assert (out, "changed.safetensors" in err) == ("", True)
    assert main(["inspect", "--no-verify", str(changed)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err


def test_a_header_can_neither_control_the_terminal_nor_break_the_card(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = replace(
        read_header(checkpoint),
        class_names=("\x1b]0;owned\x07", *LABELS[1:]),
        recipe={"name": "a\nb", "seed": None},
        metrics={"accuracy": {"mixture": {"clean": "good", "PGD": {"percent": "high"}}}, "attacks": ["none"], "n": 7},
    )
    path = tmp_path / "odd.safetensors"
    save_checkpoint(path, load_checkpoint(checkpoint), header)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert not any(ord(character) < 32 for character in out.replace("\n", ""))
    assert '"good"' in out
    assert inspect(capsys, path)["metrics"] == header.metrics
