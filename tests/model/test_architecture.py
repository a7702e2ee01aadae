"""The numbers that fix every tensor's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.architecture import PRESETS, Architecture


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    text = json.dumps(PRESETS[name].to_json())
    assert Architecture.from_json(json.loads(text)) == PRESETS[name]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("width", 4.0),
        ("width", True),
        ("width", "4"),
        ("width", 10**12),
        ("num_classes", 1),
        ("num_experts", 0),
        ("gate_width", -1),
        ("activation", "gelu"),
        ("activation", None),
        ("aggregation", "mean"),
        ("aggregation", None),
        ("height", 7),
        ("input_width", None),
        ("mean", (0.5, 0.5)),
        ("mean", 0.5),
        ("mean", (0.5, 0.5, "0.5")),
        ("mean", (0.5, 0.5, float("nan"))),
        ("mean", (0.5, 0.5, 10**400)),
        ("std", (1.0, 1.0, 0.0)),
        ("std", (1.0, 1.0, float("nan"))),
        ("std", (1.0, 1.0, float("inf"))),
    ],
)
def test_a_senseless_number_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Architecture(**{"width": 4, field: value})


def test_a_gate_is_written_as_before_there_was_another_way() -> None:
    assert "aggregation" not in PRESETS["full"].to_json()
    voting = Architecture(width=4, aggregation="vote")
    assert voting.to_json()["aggregation"] == "vote"
    assert Architecture.from_json(json.loads(json.dumps(voting.to_json()))) == voting
