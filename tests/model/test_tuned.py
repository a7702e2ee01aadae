"""Tuned choices: when a file is used, and when it is not."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model import tuned
from model.plan import Plan
from model.tuned import Identity, Tuning, artefact, default_folder, find, sha256, write

HERE = Identity.here("ab" * 32, "cpu")
PLANS = {"float32": Plan(((1, "loop-float32"),)), "bfloat16": Plan(((4, "loop-bfloat16"), (8, "grouped-bfloat16")))}
TUNING = Tuning(PLANS, "bfloat16", "2026-11-22", "Example 9000, 2 cores")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tuned choices and one file that goes with them."""
    path = tmp_path / "tuned"
    tuned.make_folder(path)
    model = path / f"{HERE.stem}.x3.int8.xml"
    model.write_text("<model/>")
    write(path, HERE, replace(TUNING, files={model.name: sha256(model)}))
    return path


def choices(folder: Path) -> Path:
    return folder / f"{HERE.stem}.json"


def test_what_was_written_is_found(folder: Path) -> None:
    found = find(folder, HERE)
    assert found
    assert found.plans == PLANS
    assert (found.precision, found.date, found.machine) == ("bfloat16", "2026-11-22", "Example 9000, 2 cores")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".xml"]


def test_the_name_of_a_file_says_for_which_checkpoint_processor_and_device_it_is() -> None:
    other = replace(HERE, processor="other-1")
    assert HERE.stem.startswith("abababababab-")
    assert replace(other, device="cuda:1").stem == "abababababab-other-1-cuda1"
    assert len({HERE.stem, other.stem, replace(HERE, device="cuda").stem, replace(HERE, checkpoint="cd" * 32).stem}) == 4
    names = {name: artefact(other, name) for name in ("openvino-int8-x3", "aotinductor-bfloat16", "openvino-float32-x3")}
    assert names == {
        "openvino-int8-x3": "abababababab-other-1-cpu.x3.int8.xml",
        "aotinductor-bfloat16": "abababababab-other-1-cpu.bfloat16.pt2",
        "openvino-float32-x3": None,
    }


def test_nothing_is_found_for_another_checkpoint_and_nothing_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert find(folder, replace(HERE, checkpoint="cd" * 32)) is None
    assert find(folder / "nowhere", HERE) is None
    assert caplog.messages == []


def test_choices_for_another_processor_are_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert find(folder, replace(HERE, processor="other-1")) is None
    assert "tuned for other processors only" in caplog.text
    assert choices(folder).name in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        replace(HERE, checkpoint="ab" * 6 + "cd" * 26),
        replace(HERE, threads=3),
        replace(HERE, top_k=2),
        replace(HERE, versions={**HERE.versions, "openvino": "1.0"}),
        replace(HERE, versions={**HERE.versions, "torch": None}),
    ],
    ids=["checkpoint", "threads", "top_k", "OpenVINO", "torch"],
)
def test_choices_made_under_other_conditions_are_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture, other: Identity
) -> None:
    caplog.set_level(logging.INFO)
    assert find(folder, other) is None
    assert "run palisade-serve tune again" in caplog.text


def edit(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        choices(folder).write_text(json.dumps({**json.loads(choices(folder).read_text()), **values}))

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda folder: choices(folder).write_bytes(choices(folder).read_bytes()[:-40]),
    "not an object": lambda folder: choices(folder).write_text("[]"),
    "nested too deeply": lambda folder: choices(folder).write_text("[" * 100_000),
    "another format": edit(format_version=2),
    "no plans": edit(plans={}),
    "plans of nothing": edit(plans=7),
    "an unknown execution": edit(plans={"float32": [{"up_to": 1, "execution": "magic-float32"}]}, precision="float32"),
    "a plan of another precision": edit(plans={"bfloat16": [{"up_to": 1, "execution": "loop-float32"}]}),
    "a file elsewhere": edit(files={"../x.xml": "0" * 64}),
    "a missing file": lambda folder: next(folder.glob("*.xml")).unlink(),
    "an altered file": lambda folder: next(folder.glob("*.xml")).write_text("<other/>"),
    "a folder that others may write to": lambda folder: folder.chmod(0o777),
    "a folder that a group may write to": lambda folder: folder.chmod(0o775),
    "a file that others may write to": lambda folder: choices(folder).chmod(0o666),
    "a model that others may write to": lambda folder: next(folder.glob("*.xml")).chmod(0o666),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_unsafe_choices_are_not_used_and_a_warning_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    DAMAGES[damage](folder)
    assert find(folder, HERE) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the default plan is" in record.message


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_choices_that_belong_to_another_user_are_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(folder, 12345, -1)
    assert find(folder, HERE) is None
    assert "belongs to user 12345" in caplog.text


def test_a_folder_that_would_not_be_used_is_not_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"writable by others than its owner.*chmod go-w"):
        tuned.make_folder(tmp_path)


def test_the_default_folder_is_where_caches_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert default_folder() == Path("/var/caches/palisade")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path("/home/somebody/.cache/palisade")
