"""``palisade-serve keys`` as an operator types it."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.commands import keys as command
from service.commands.keys import parse_expiry
from service.keys import KeyStore, create_key, read_keys

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


class Shell:
    """Runs the command and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], path: Path) -> None:
        self._capsys = capsys
        self.path = path

    def run(self, *arguments: str) -> int:
        parser = argparse.ArgumentParser(prog="palisade-serve")
        command.register(parser.add_subparsers(required=True))
        try:
            options = parser.parse_args(["keys", *arguments])
            status: int = options.run_command(options)
        except SystemExit as stop:  # argparse's way of refusing
            status = int(stop.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return status

    def make(self, *options: str) -> dict[str, Any]:
        """Make a key and return what ``--json`` says of it."""
        assert self.run("create", "--name", "lab", "--tier", "standard", "--json", *options) == 0
        made: dict[str, Any] = json.loads(self.out)
        return made

    def the_error(self) -> str:
        """The only line that was printed."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("palisade-serve: ")
        return line


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("PALISADE_KEYS_FILE", str(tmp_path / "keys.json"))
    return Shell(capsys, tmp_path / "keys.json")


def test_a_new_key_is_all_there_is_on_standard_output_and_it_works(shell: Shell) -> None:
    assert shell.run("create", "--name", "lab", "--tier", "trusted") == 0
    text = shell.out.removesuffix("\n")
    key = KeyStore(shell.path, time.time).find(text)
    assert key is not None
    assert (key.name, key.tier, key.revoked) == ("lab", "trusted", None)
    assert key.id in shell.err
    assert "Authorization: Bearer" in shell.err
    assert text not in shell.err


def test_a_key_lives_a_year_unless_something_else_is_asked_for(shell: Shell) -> None:
    made = shell.make()
    lifetime = datetime.fromisoformat(made["expires"]) - datetime.fromisoformat(made["created"])
    assert lifetime == timedelta(days=365)
    assert shell.make("--expires", "never")["expires"] is None


def test_json_has_the_key_and_what_is_public_of_it(shell: Shell) -> None:
    made = shell.make("--expires", "9999-12-31")
    text = made.pop("key")
    assert KeyStore(shell.path, time.time).find(text) is not None
    assert made == {
        "id": text.split("_")[1],
        "name": "lab",
        "tier": "standard",
        "created": made["created"],
        "expires": "9999-12-31T00:00:00Z",
        "revoked": None,
        "state": "active",
    }
    assert shell.err == ""


def test_the_list_shows_every_key_and_its_state_and_nothing_secret(shell: Shell) -> None:
    active, revoked = shell.make("--expires", "never"), shell.make()
    past, _ = create_key(shell.path, "old one", "trusted", NOW, NOW - timedelta(days=1))
    shell.run("revoke", revoked["id"])
    assert shell.run("list") == 0
    heading, *rows = shell.out.splitlines()
    assert heading.split() == ["id", "name", "tier", "created", "expires", "state"]
    assert [row.split()[0] for row in rows] == [active["id"], revoked["id"], past.id]
    assert [row.split()[-1] for row in rows] == ["active", "revoked", "expired"]
    assert "never" in rows[0]
    assert "2026-05-01T12:00:00Z" in rows[2]
    assert len({row.index("standard") for row in (*rows[:2],)} | {rows[2].index("trusted"), heading.index("tier")}) == 1
    table = shell.out
    assert shell.run("list", "--json") == 0
    listed = json.loads(shell.out)
    assert [key["state"] for key in listed] == ["active", "revoked", "expired"]
    for key in read_keys(shell.path):
        assert key.sha256 not in table + shell.out
    for text in (active["key"], revoked["key"]):
        assert text not in table + shell.out


def test_an_empty_list_is_a_list(shell: Shell) -> None:
    shell.path.write_text('{"format": 1, "keys": []}')
    assert shell.run("list", "--json") == 0
    assert json.loads(shell.out) == []
    assert shell.run("list") == 0
    assert shell.out.startswith("id ")


def test_a_key_is_revoked_by_its_id_or_by_itself_and_doing_it_again_is_no_error(shell: Shell) -> None:
    made = shell.make()
    for argument in (made["id"], made["key"]):
        assert shell.run("revoke", argument) == 0
        assert made["id"] in shell.out
        assert made["key"] not in shell.out + shell.err
    assert shell.run("revoke", made["id"], "--json") == 0
    assert json.loads(shell.out)["state"] == "revoked"
    found = KeyStore(shell.path, time.time).find(made["key"])
    assert found is not None
    assert found.revoked is not None


def test_a_file_that_is_named_wins_over_the_environment(shell: Shell, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    made = shell.make("--file", str(other))
    assert [key.id for key in read_keys(other)] == [made["id"]]
    assert not shell.path.exists()
    assert shell.run("list", "--json", "--file", str(other)) == 0
    assert json.loads(shell.out)[0]["id"] == made["id"]


@pytest.mark.parametrize("arguments", [("create", "--name", "x", "--tier", "standard"), ("list",), ("revoke", "abcdefghij")])
def test_without_a_file_the_error_says_how_to_name_one(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PALISADE_KEYS_FILE", "")
    assert shell.run(*arguments) == 2
    assert "--file" in shell.the_error()
    assert "PALISADE_KEYS_FILE" in shell.the_error()


def test_a_file_that_is_not_there_or_bad_is_one_line_that_names_it(shell: Shell) -> None:
    for arguments in (("list",), ("revoke", "abcdefghij")):
        assert shell.run(*arguments) == 1
        assert str(shell.path) in shell.the_error()
    shell.path.write_text('{"format": 9, "keys": []}')
    for arguments in (("list",), ("revoke", "abcdefghij"), ("create", "--name", "x", "--tier", "standard")):
        assert shell.run(*arguments) == 1
        assert f"{shell.path}: format: " in shell.the_error()
    assert shell.path.read_text() == '{"format": 9, "keys": []}'


def test_an_id_that_is_not_there_is_an_error_that_names_it(shell: Shell) -> None:
    shell.make()
    assert shell.run("revoke", "abcdefghij") == 1
    assert "abcdefghij" in shell.the_error()


def test_a_key_with_a_slip_in_it_is_not_repeated(shell: Shell) -> None:
    made = shell.make()
    assert shell.run("revoke", made["key"][:-1]) == 2
    assert made["key"][20:-1] not in shell.the_error()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--expires", "soon"), ("--expires", "0d"), ("--expires", "2020-01-01"), ("--name", ""), ("--name", "a\nb")],
)
def test_a_bad_option_is_one_line_that_names_it_and_makes_nothing(shell: Shell, option: str, value: str) -> None:
    assert shell.run("create", "--tier", "standard", "--name", "lab", option, value) == 2
    assert option in shell.the_error()
    assert not shell.path.exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("create",), ("create", "--name", "lab"), ("create", "--name", "lab", "--tier", "anonymous"), ("revoke",), ("burn",)],
)
def test_wrong_usage_has_status_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    assert shell.run(*arguments) == 2
    assert shell.out == ""
    assert "palisade-serve keys" in shell.err


def test_help_says_what_the_default_expiry_is(shell: Shell) -> None:
    assert shell.run("create", "--help") == 0
    assert "365d" in shell.out


@pytest.mark.parametrize(
    ("text", "expires"),
    [
        ("never", None),
        ("1d", datetime(2026, 5, 2, 12, 0, 0, tzinfo=UTC)),
        ("90d", datetime(2026, 7, 30, 12, 0, 0, tzinfo=UTC)),
        ("2026-05-02", datetime(2026, 5, 2, tzinfo=UTC)),
        ("2028-02-29", datetime(2028, 2, 29, tzinfo=UTC)),
    ],
)
def test_an_expiry_is_days_or_a_date_or_never(text: str, expires: datetime | None) -> None:
    assert parse_expiry(text, NOW) == expires


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1.5d", "90 d", "3w", "٣d", "2027-02-29", "2027-1-1", "01.02.2027"])
def test_a_text_that_is_no_expiry_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"90d.*2027-01-31.*never"):
        parse_expiry(text, NOW)


@pytest.mark.parametrize("text", ["0d", "2026-05-01", "1970-01-01"])
def test_an_expiry_that_has_passed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="passed"):
        parse_expiry(text, NOW)


def test_days_beyond_the_calendar_are_refused() -> None:
    with pytest.raises(ValueError, match="not an expiry"):
        parse_expiry("99999d", datetime(9998, 1, 1, tzinfo=UTC))
