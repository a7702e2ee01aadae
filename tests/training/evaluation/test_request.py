"""What an evaluation may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.evaluation.autoattack import ATTACKS
from training.evaluation.request import Request


def test_paths_that_can_be_written_are_taken_and_nothing_is_made(tmp_path: Path) -> None:
    Request(json=tmp_path / "a.json", plot=tmp_path / "a.png", folder=tmp_path / "new")
    Request(folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json": "missing/a.json"}, r"--json .*: there is no folder .*missing; make it first"),
        ({"plot": "missing/a.png"}, r"--plot .*: there is no folder .*missing; make it first"),
        ({"folder": "missing/deep"}, r"--out .*: there is no folder .*missing; make it first"),
        ({"json": "."}, r"--json .*: this is a folder; give a file"),
        ({"folder": "file"}, r"--out .*: this is a file; give a folder"),
    ],
)
def test_paths_that_cannot_be_written_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        Request(**{name: tmp_path / path for name, path in options.items()})


def test_the_full_level_needs_a_folder_and_only_it_takes_attacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--out DIR"):
        Request(level="full")
    for options in ({"level": "standard"}, {"folder": tmp_path}):
        with pytest.raises(ValueError, match="--attacks belongs to --level full"):
            Request(attacks=("square",), **dict[str, Any](options))
    assert Request(level="full", folder=tmp_path).ensemble == ATTACKS
    assert Request(level="full", folder=tmp_path, attacks=("square",)).ensemble == ("square",)
