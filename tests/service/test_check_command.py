"""``palisade-serve check``: what would run, and everything that is wrong at once."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import read_header
from service.cli import main
from tests.service.redis_server import PASSWORD, needs_redis, redis_server


@pytest.fixture
def settings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Sets the environment; so far it is good."""
    good = {"CHECKPOINT": str(checkpoint), "DEVICE": "cpu", "PRECISION": "float32", "THREADS": "1"}
    for name, value in good.items():
        monkeypatch.setenv(f"PALISADE_{name}", value)
    return monkeypatch


def check(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    status = main(["check", "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


def test_what_would_run_is_shown_and_no_port_is_opened(
    checkpoint: Path, tmp_path: Path, settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    assert main(["keys", "create", "--file", str(keys), "--name", "a", "--tier", "standard"]) == 0
    capsys.readouterr()
    settings.setenv("PALISADE_KEYS_FILE", str(keys))
    settings.setenv("PALISADE_TIER_STANDARD_LIMITS", "7/hour")
    settings.setenv("PALISADE_COLOUR", "blue")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        settings.setenv("PALISADE_PORT", str(busy.getsockname()[1]))
        status, found, _ = check(capsys)
        assert found["ports"]["http"] == f"127.0.0.1:{busy.getsockname()[1]}"
    assert (status, found["ok"], found["problems"]) == (0, True, [])
    assert found["checkpoint"]["version"] == read_header(checkpoint).weights_sha256[:12]
    assert (found["engine"]["device"], found["engine"]["precision"]) == ("cpu", "float32")
    assert found["keys"] == {"file": str(keys), "active": 1}
    assert found["tiers"]["standard"]["limits"] == ["7/hour"]
    assert "PALISADE_COLOUR" in found["warnings"][0]
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    assert "7/hour" in out
    assert "1 active" in out
    assert "PALISADE_COLOUR" in err


def test_every_problem_is_told_and_no_password(
    tmp_path: Path, settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    settings.setenv("PALISADE_CHECKPOINT", str(damaged))
    settings.setenv("PALISADE_KEYS_FILE", str(tmp_path / "none.json"))
    settings.setenv("PALISADE_LIMITER_STORE", "redis://:hunter2@127.0.0.1:1/0")
    settings.setenv("PALISADE_METRICS_PORT", "8000")
    status, found, err = check(capsys)
    assert (status, found["ok"]) == (1, False)
    for said in ("damaged.safetensors", "none.json", "127.0.0.1:1", "both 8000"):
        assert sum(said in problem for problem in found["problems"]) == 1, (said, found["problems"])
    assert "hunter2" not in json.dumps(found) + err
    assert main(["check"]) == 1
    out, err = capsys.readouterr()
    assert "tier anonymous" in out
    assert err.count("palisade-serve: ") == 4


def test_admin_doors_that_run_would_not_open_are_told_and_both_are_shown(
    tmp_path: Path, settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.setenv("PALISADE_CHECKPOINT", str(tmp_path / "none"))  # nothing is loaded: quick
    settings.setenv("PALISADE_ADMIN_PORT", "8003")
    settings.setenv("PALISADE_ADMIN_KEY_FILE", str(tmp_path / "no.key"))
    settings.setenv("PALISADE_ADMIN_SOCKET", str(tmp_path / "missing" / "admin.sock"))
    status, found, _ = check(capsys)
    assert status == 1
    assert found["ports"]["admin"] == [str(tmp_path / "missing" / "admin.sock"), "127.0.0.1:8003"]
    for said in ("no.key: the admin key cannot be read", "admin.sock cannot be opened: No such file"):
        assert sum(said in problem for problem in found["problems"]) == 1, (said, found["problems"])
    (tmp_path / "no.key").write_text("0123456789abcdef" * 2)
    (tmp_path / "missing").mkdir()
    (problem,) = check(capsys)[1]["problems"]
    assert "no such checkpoint file" in problem
    (tmp_path / "missing" / "admin.sock").write_text("precious")
    assert "no socket" in check(capsys)[1]["problems"][0]
    settings.delenv("PALISADE_ADMIN_PORT")
    settings.delenv("PALISADE_ADMIN_SOCKET")
    assert check(capsys)[1]["ports"]["admin"] == []


@needs_redis
def test_a_store_that_is_up_is_no_problem(
    tmp_path: Path, settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.setenv("PALISADE_LIMITER_TIMEOUT_MS", "10000")
    with redis_server(tmp_path) as redis:
        settings.setenv("PALISADE_LIMITER_STORE", redis.url)
        status, found, err = check(capsys)
    assert (status, found["store"]) == (0, f"127.0.0.1:{redis.port}")
    assert PASSWORD not in json.dumps(found) + err


def test_wrong_settings_are_told_as_run_tells_them(settings: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings.setenv("PALISADE_PORT", "abc")
    settings.setenv("PALISADE_TIER_TRUSTED_DECIMALS", "9")
    status, found, err = check(capsys)
    assert (status, found["ok"], len(found["problems"]), err) == (2, False, 2, "")
    assert "PALISADE_PORT='abc'" in found["problems"][0]
    assert main(["check"]) == 2
    assert "PALISADE_TIER_TRUSTED_DECIMALS" in capsys.readouterr().err
