"""Settings from the environment."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.quota import Window
from service.settings import Settings


def test_without_any_variable_the_defaults_are_the_documented_ones() -> None:
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 8002)
    assert settings.limits == "on"
    assert settings.tier_anonymous_limits == (Window("minute", 60, 60), Window("day", 500, 86400))
    assert settings.tier_anonymous_decimals == 2


def test_variables_override_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALISADE_PORT", "9001")
    monkeypatch.setenv("PALISADE_TIER_ANONYMOUS_LIMITS", "5/second")
    monkeypatch.setenv("PALISADE_TIER_ANONYMOUS_LABEL_ONLY", "true")
    settings = Settings()
    assert settings.port == 9001
    assert settings.tier_anonymous_limits == (Window("second", 5, 1),)
    assert settings.tier_anonymous_label_only


def test_an_empty_list_of_windows_means_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALISADE_TIER_ANONYMOUS_LIMITS", "")
    assert Settings().tier_anonymous_limits == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "abc"),
        ("port", "65536"),
        ("precision", "float8"),
        ("max_batch_size", "0"),
        ("max_queue_delay_ms", "-1"),
        ("request_deadline_ms", "0"),
        ("max_body_bytes", "1e9"),
        ("limits", "maybe"),
        ("tier_anonymous_limits", "60/week"),
        ("tier_anonymous_decimals", "7"),
        ("tier_anonymous_decimals", "-1"),
        ("log_level", "loud"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_and_its_setting_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PALISADE_{name.upper()}", value)
    with pytest.raises(ValidationError) as refusal:
        Settings()
    assert [error["loc"] for error in refusal.value.errors()] == [(name,)]


def test_settings_do_not_change_once_read() -> None:
    with pytest.raises(ValidationError):
        Settings().tier_anonymous_decimals = 6  # type: ignore[misc]


def test_every_setting_explains_itself() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
