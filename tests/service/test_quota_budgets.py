"""What the threat model says of budgets is what the limiter and arithmetic say."""

from __future__ import annotations

import asyncio
import math

import pytest

from benchmarks.budgets import row, table
from service.quota import parse_windows
from tests.service.conftest import ROOT

DAY_S = 86400


@pytest.mark.parametrize("answers", [59, 61, 500, 501, 2000, 10_000])
@pytest.mark.parametrize(("minute", "day"), [(60, 500), (600, 5000), (7, 90)])
def test_a_theft_costs_what_arithmetic_says(answers: int, minute: int, day: int) -> None:
    cost = asyncio.run(row(parse_windows(f"{minute}/minute;{day}/day"), answers))
    days = math.ceil(answers / day) - 1
    assert cost["one_identity_s"] == days * DAY_S + 60 * (math.ceil((answers - days * day) / minute) - 1)
    assert cost["identities_day"] == math.ceil(answers / day)
    assert cost["identities_hour"] == math.ceil(answers / min(day, 60 * minute))


def test_a_quota_for_life_makes_a_larger_theft_impossible_for_one_identity() -> None:
    windows = parse_windows("60/minute;500/day;1200/lifetime")
    assert asyncio.run(row(windows, 1200))["one_identity_s"] == 2 * DAY_S + 3 * 60
    larger = asyncio.run(row(windows, 1201))
    assert larger["one_identity_s"] is None
    assert larger["identities_day"] == 3


def test_the_threat_models_table_is_the_one_that_the_command_prints() -> None:
    lines, _ = table([2000, 10_000, 50_000])
    assert "\n".join(lines) in (ROOT / "docs/threat-model.md").read_text(), "run python -m benchmarks.budgets"
