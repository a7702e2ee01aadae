"""The limiter's settings, which hold passwords."""

from __future__ import annotations

import sys

import pytest
from pydantic import ValidationError

from service.metrics import Metrics
from service.quota_tiers import TierQuotas
from service.settings import Settings, read_settings

PASSWORD = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        "memory://",
        "redis://cache",
        "redis://cache:6380/2",
        "redis://:pass%2Fword@10.0.0.1:6379/0",
        "rediss://user:word@[2001:db8::1]:6379/0?ssl_ca_certs=/etc/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem",
    ],
)
def test_a_store_is_taken(url: str) -> None:
    assert Settings(limiter_store=url).limiter_store.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        f"http://:{PASSWORD}@cache",
        f"redis://:{PASSWORD}@",
        f"redis://:{PASSWORD}/x@cache:6379",  # a slash that is not escaped
        f"redis://:{PASSWORD}@cache:port",
        f"redis://:{PASSWORD}@cache:0",
        f"redis://:{PASSWORD}@cache/first",
        f"redis://:{PASSWORD}@cache/0#there",
        f"redis://:{PASSWORD}@cache/0?ssl_ca_certs=/ca.pem",  # without TLS
        f"rediss://:{PASSWORD}@cache/0?ssl_cert_reqs=none",
        f"rediss://:{PASSWORD}@cache/0?ssl_ca_certs",
    ],
)
def test_another_store_is_refused_without_showing_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(limiter_store=url)
    assert PASSWORD not in str(refusal.value)
    monkeypatch.setenv("PALISADE_LIMITER_STORE", url)
    assert read_settings() is None
    said = capsys.readouterr().err
    assert "PALISADE_LIMITER_STORE" in said
    assert "redis://[user:password@]host" in said
    assert PASSWORD not in said


def test_settings_that_are_shown_hide_secrets() -> None:
    settings = Settings(limiter_store=f"redis://:{PASSWORD}@cache", limiter_secret=PASSWORD)
    assert PASSWORD not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_a_store_without_its_client_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("service.quota_store", "service.quota_redis", "service.quota_outage"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(RuntimeError, match=r"PALISADE_LIMITER_STORE needs the extra `redis`"):
        TierQuotas(Settings(limiter_store=f"redis://:{PASSWORD}@cache"), Metrics())
    TierQuotas(Settings(), Metrics())  # memory needs none
