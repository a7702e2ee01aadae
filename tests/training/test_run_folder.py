"""The run folder: what is logged and saved can be read again, whatever was cut short."""

from __future__ import annotations

import json
import math
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


def events(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return every scalar's steps and values, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder.path / "events"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_numbers_are_shown_by_tensorboard_under_their_stage_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log("joint", 0, loss=0.5, gate=[0.25, 0.75], lr=0.125)
    folder.log("joint", 20, loss=math.nan, gate=[0.5, 0.5], lr=0.25)
    folder.log("joint", 20, event="rollback", robust=0.0625)
    folder.log("expert-3", 0, loss=2.0, count=3)
    seen = events(folder)  # before close(): this is what a kill leaves
    assert [step for step, _ in seen["joint/loss"]] == [0, 20]
    assert math.isnan(seen.pop("joint/loss")[1][1])
    assert seen == {
        "joint/gate/0": [(0, 0.25), (20, 0.5)],
        "joint/gate/1": [(0, 0.75), (20, 0.5)],
        "joint/lr": [(0, 0.125), (20, 0.25)],
        "joint/robust": [(20, 0.0625)],
        "expert-3/loss": [(0, 2.0)],
        "expert-3/count": [(0, 3.0)],
    }
    folder.close()
    assert events(folder).keys() == {*seen, "joint/loss"}


def test_a_resumed_run_adds_to_the_events_and_repeats_steps_without_losing_any(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    for step in (0, 20, 40):
        first.log("expert-0", step, loss=1.0)
    first.log("joint", 0, loss=4.0)
    second = RunFolder(tmp_path)  # the first was killed: nobody closed it
    for step in (20, 40, 60):
        second.log("expert-0", step, loss=1.0)
    second.close()
    second.close()
    second.log("expert-0", 80, loss=1.0)
    second.close()
    seen = events(second)
    assert {step for step, _ in seen["expert-0/loss"]} == {0, 20, 40, 60, 80}
    assert {value for _, value in seen["expert-0/loss"]} == {1.0}
    assert seen["joint/loss"] == [(0, 4.0)]
    assert steps(first) == [0, 20, 40, 0, 20, 40, 60, 80]
    first.close()


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
