"""The run folder: what is logged and saved can be read again, whatever was cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.run_folder import RunFolder


def steps(folder: RunFolder) -> list[int]:
    return [row["step"] for row in folder.metrics()]


def test_what_is_logged_can_be_read_again_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    assert folder.metrics() == []
    folder.log("joint", 3, loss=0.5, gate=[0.25, 0.75])
    folder.log("joint", 4, event="rollback")
    first, second = RunFolder(folder.path).metrics()
    assert (first["stage"], first["step"], first["loss"], first["gate"]) == ("joint", 3, 0.5, [0.25, 0.75])
    assert second["event"] == "rollback"


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(3):
        folder.log("joint", step, loss=1.0)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert steps(folder) == [0, 1]


def test_what_is_logged_after_a_line_cut_short_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(3):
        folder.log("joint", step, loss=1.0)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    folder.log("joint", 2, loss=1.0)
    folder.log("joint", 3, loss=1.0)
    assert steps(folder) == [0, 1, 2, 3]


def test_a_saved_state_can_be_loaded_and_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load("joint") is None
    for step in (1, 2):
        tensors = {"module/weight": torch.full((2, 3), float(step)), "module/count": torch.tensor(step)}
        folder.save("joint", tensors, {"step": step, "settings": {"peak": 0.1}})
        loaded = folder.load("joint")
        assert loaded is not None
        assert loaded[1] == {"step": step, "settings": {"peak": 0.1}}
        assert loaded[0].keys() == tensors.keys()
        assert all(torch.equal(loaded[0][name], value) for name, value in tensors.items())
    assert folder.load("expert-0") is None


def test_a_save_that_was_killed_halfway_leaves_the_state_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save("joint", {"a": torch.ones(1)}, {"step": 1})
    (tmp_path / "joint.partial").write_bytes(b"half a file")
    loaded = folder.load("joint")
    assert loaded is not None
    assert loaded[1]["step"] == 1


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"x" * 500])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "joint.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"joint\.safetensors is not a saved training state"):
        RunFolder(tmp_path).load("joint")


def test_the_configuration_says_what_ran_on_which_code(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config({"seed": 4})
    RunFolder(tmp_path).write_config({"seed": 5})
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["settings"] == {"seed": 5}
    assert record["git_revision"]
    assert record["torch"] == torch.__version__
