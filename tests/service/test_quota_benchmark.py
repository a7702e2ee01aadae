"""The limiter's benchmark runs, at toy size, and says what it measured."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import limiter
from tests.service.redis_server import needs_redis


@needs_redis
def test_the_limiters_benchmark_compares_memory_and_redis_with_the_aims(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limiter, "WARM_UP", 50)
    monkeypatch.setattr(sys, "argv", ["limiter", "--rounds", "2", "--charges", "30", "--rate", "1000"])
    limiter.main()
    *_, verdict, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert list(result["loads"]) == [
        "memory, one after another",
        "redis, one after another",
        "redis, 1000 a second",
        "redis with the watch, one after another",
        "redis with the watch, 1000 a second",
    ]
    for row in result["loads"].values():
        for percentile in row.values():
            assert 0 < percentile["min"] <= percentile["median"] <= percentile["max"]
    worst = {
        store: max(row["p99_ms"]["median"] for name, row in result["loads"].items() if store in name)
        for store in result["check"]
    }
    for store, aim in (("memory", 0.2), ("redis", 1.0)):
        assert result["check"][store] == {"p99_ms": worst[store], "aim_ms": aim, "met": worst[store] < aim}
        assert f"{store}: p99 {worst[store]:.3f} ms" in verdict
    assert {"redis-server", "redis-py", "uvloop", "python"} == result["versions"].keys()
