"""Plans: which execution runs a batch of which size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from model.architecture import PRESETS, Architecture
from model.plan import ExecutionName, Plan, default_plan

TWO = Plan(((4, "openvino-bfloat16-x9"), (64, "openvino-bfloat16-x3")))


def test_a_batch_is_run_by_the_first_part_that_covers_it_and_the_last_covers_everything() -> None:
    assert [TWO.pick(batch) for batch in (1, 4)] == ["openvino-bfloat16-x9"] * 2
    assert [TWO.pick(batch) for batch in (5, 64, 65, 4096)] == ["openvino-bfloat16-x3"] * 4


def test_a_plan_reads_as_a_sentence_names_each_execution_once_and_has_one_precision() -> None:
    assert str(TWO) == "openvino-bfloat16-x9 up to 4, openvino-bfloat16-x3 beyond"
    assert str(Plan(((8, "loop-float32"),))) == "loop-float32"
    again = Plan(((1, "loop-float32"), (2, "grouped-float32"), (4, "loop-float32")))
    assert again.executions == ("loop-float32", "grouped-float32")
    assert (TWO.precision, again.precision) == ("bfloat16", "float32")


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(json.loads(json.dumps(TWO.to_json()))) == TWO


def test_neighbours_that_run_the_same_execution_become_one() -> None:
    names = ["loop-float32", "loop-float32", "grouped-float32", "loop-float32", "loop-float32"]
    merged = Plan.of(list(zip((1, 2, 4, 8, 16), names, strict=True)))
    assert merged.parts == ((2, "loop-float32"), (4, "grouped-float32"), (16, "loop-float32"))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (None, "must be a list of objects with the fields up_to and execution, not None"),
        ([["1", "loop-float32"]], "must be a list of objects"),
        ([{"up_to": 1}], "must be a list of objects"),
        ([], "at least one execution"),
        ([{"up_to": 0, "execution": "loop-float32"}], r"from 1 that ascend, not \[0\]"),
        ([{"up_to": True, "execution": "loop-float32"}], "whole numbers"),
        ([{"up_to": size, "execution": "loop-float32"} for size in (4, 4)], r"ascend, not \[4, 4\]"),
        ([{"up_to": 1, "execution": "magic-float32"}], "'magic-float32' is no execution"),
        ([{"up_to": 1, "execution": 7}], "7 is no execution"),
        ([{"up_to": 1, "execution": "loop-float32"}, {"up_to": 2, "execution": "loop-bfloat16"}], "of bfloat16 and float32"),
    ],
)
def test_what_is_no_plan_is_refused_with_a_reason(values: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Plan.from_json(values)


@pytest.mark.parametrize(
    "name", ["loop-float32", "grouped-bfloat16", "graphs-bfloat16", "openvino-int8-x3", "openvino-float32-x12"]
)
def test_a_name_says_what_it_is_made_of_and_back(name: str) -> None:
    assert str(ExecutionName.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["loop", "loop-int8", "loop-float32-x3", "openvino-float32", "openvino-float32-x0", "../x", None]
)
def test_what_names_no_execution_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="is no execution"):
        ExecutionName.parse(name)


@pytest.mark.parametrize(
    ("native", "openvino", "device", "precision", "top_k", "plan"),
    [
        (True, True, "cpu", "auto", None, "openvino-bfloat16-x9 up to 4, openvino-bfloat16-x3 beyond"),
        (False, True, "cpu", "auto", None, "openvino-float32-x9 up to 4, openvino-float32-x3 beyond"),
        (True, True, "cpu", "float32", 9, "openvino-float32-x9 up to 4, openvino-float32-x3 beyond"),
        (True, True, "cpu", "auto", 2, "openvino-bfloat16-x1"),
        (False, True, "cpu", "bfloat16", None, "loop-bfloat16"),
        (True, False, "cpu", "auto", None, "loop-bfloat16"),
        (False, False, "cpu", "auto", 3, "loop-float32"),
        (True, True, "cuda", "auto", None, "graphs-bfloat16"),
        (False, True, "cuda:1", "auto", None, "graphs-float32"),
        (True, True, "cuda", "auto", 2, "loop-bfloat16"),
    ],
)
def test_the_default_suits_device_precision_and_top_k(
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    openvino: bool,
    device: str,
    precision: str,
    top_k: int | None,
    plan: str,
) -> None:
    monkeypatch.setattr("model.plan.native_bfloat16", lambda device: native)
    monkeypatch.setattr("model.plan.has_openvino", lambda: openvino)
    assert str(default_plan(PRESETS["compact"], device, precision, top_k)) == plan


@pytest.mark.parametrize(
    ("architecture", "plan"),
    [
        (PRESETS["full"], "openvino-float32-x3"),  # 400 MB: one copy
        (replace(PRESETS["compact"], num_experts=5), "openvino-float32-x5 up to 4, openvino-float32-x3 beyond"),
        (replace(PRESETS["compact"], num_experts=16), "openvino-float32-x9 up to 4, openvino-float32-x3 beyond"),
        (replace(PRESETS["compact"], num_experts=3), "openvino-float32-x3"),
        (replace(PRESETS["compact"], num_experts=2), "openvino-float32-x2"),
    ],
)
def test_the_default_suits_the_size_of_the_mixture(
    monkeypatch: pytest.MonkeyPatch, architecture: Architecture, plan: str
) -> None:
    monkeypatch.setattr("model.plan.has_openvino", lambda: True)
    assert str(default_plan(architecture, "cpu", "float32")) == plan


def test_int8_is_never_a_default() -> None:
    with pytest.raises(ValueError, match="precision=int8"):
        default_plan(PRESETS["compact"], "cpu", "int8")
