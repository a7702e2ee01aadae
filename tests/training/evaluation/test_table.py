"""The Markdown table."""

from __future__ import annotations

from typing import Any

import pytest

from training.evaluation.table import table

CELL = {"percent": 50.04, "low": 40.0, "high": 60.0}


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "level": "standard",
        "attacks": {"clean": {}, "PGD-10": {}, "PGD-20": {}},
        "accuracy": {
            "mixture": {"clean": CELL, "PGD-10": CELL, "PGD-20": CELL},
            "expert 0": {"clean": CELL, "PGD-10": CELL},
            "top 1": {"clean": CELL, "PGD-20": CELL},
        },
        "best_single_expert": {"name": "expert 0"},
        "paired_tests": [],
        "n": 100,
        "seed": 0,
        "precision": "float32",
        "data": {"name": "toys"},
        "sanity": [
            finding("square", passed=False),
            finding("gradients", passed=True),
            finding("top_k", passed=False, informational=True),
        ],
    }


def finding(check: str, passed: bool, informational: bool = False) -> dict[str, Any]:
    return {
        "check": check,
        "passed": passed,
        "informational": informational,
        "figures": {"broken": 3},
        "raised_if": f"{check} is raised",
        "meaning": f"{check} means",
    }


def test_cells_that_were_not_measured_stay_empty_in_their_column(results: dict[str, Any]) -> None:
    lines = table(results).splitlines()
    assert "| network | clean | PGD-10 | PGD-20 |" in lines
    assert "| expert 0 (best on held-out) | 50.0 (40.0-60.0) | 50.0 (40.0-60.0) |  |" in lines
    assert "| top 1 | 50.0 (40.0-60.0) |  | 50.0 (40.0-60.0) |" in lines


def test_a_suspicion_comes_first_and_names_only_checks_that_count(results: dict[str, Any]) -> None:
    lines = table(results).splitlines()
    assert lines[0] == "MASKED GRADIENTS SUSPECTED: square"
    assert "| square | **FAILED** | broken: 3 | square is raised | square means |" in lines
    assert "| gradients | passed | broken: 3 | gradients is raised | gradients means |" in lines
    assert "| top_k | raised, for information | broken: 3 | top_k is raised | top_k means |" in lines
    results["sanity"] = results["sanity"][1:]
    assert "MASKED" not in table(results)


def test_a_part_of_autoattack_is_not_called_autoattack(results: dict[str, Any]) -> None:
    row = {"name": "APGD-CE", "robust_after": 44, **CELL}
    results["autoattack"] = {"name": "APGD-CE + APGD-T", "attacks": [row], "n": 100}
    assert "APGD-CE + APGD-T on the mixture" in table(results)
    assert "| APGD-CE | 44 | 50.0 (40.0-60.0) |" in table(results)
    assert "AutoAttack" not in table(results)
