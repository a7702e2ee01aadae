"""The whole command line: its page names what exists, its help is quick, and it ends as shells expect."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from service.cli import build_parser, main
from tests.service.conftest import PATIENCE_S, ROOT

PAGE = (ROOT / "docs" / "command-line.md").read_text()
HEAVY = ("torch", "openvino", "numpy", "pydantic", "httpx", "rich", "PIL", "fastapi", "redis")


def walk(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command and action with its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield below.prog, below
                yield from walk(below)


COMMANDS = dict(walk(build_parser()))
SECTIONS = dict(re.findall(r"^###? `(palisade-serve [a-z ]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    named = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)]
    return {action.option_strings[-1] if action.option_strings else str(action.metavar) for action in named}


def test_the_page_names_every_command_and_no_other() -> None:
    assert SECTIONS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_page_names_every_option_of_a_command_and_no_other(command: str) -> None:
    rows = re.findall(r"^\| `([^` ]+)[^`]*` \|", SECTIONS[command], re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == options_of(COMMANDS[command])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.count(" ") == 1])
def test_the_page_and_the_help_tell_the_same_exit_status_and_the_help_has_examples(command: str) -> None:
    epilog = " ".join((COMMANDS[command].epilog or "").split())
    status = epilog[epilog.index("Exit status: ") :]
    assert status in " ".join(SECTIONS[command].split())
    assert "examples: palisade-serve" in epilog or "examples: PALISADE_" in epilog


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_examples_are_command_lines_that_parse(command: str) -> None:
    epilog = COMMANDS[command].epilog or ""
    examples = re.findall(r"palisade-serve ([^|&>\n]+)", epilog.partition("\n\n")[0].replace('"the mobile app"', "app"))
    assert examples
    for example in examples:
        build_parser().parse_args(example.split())


def test_help_loads_nothing_heavy_and_neither_does_the_way_to_a_request() -> None:
    program = f"""
import sys
from service.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print([name for name in {HEAVY!r} if name in sys.modules])
import service.app, service.coordinator, service.engine, service.frontend, service.http_server
print([name for name in ("torch", "openvino", "httpx", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def test_nonsense_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["frobnicate"], ["predict"], ["bench"], ["predict", "--top", "0", "a.png"], ["inspect", "a", "b"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "usage: palisade-serve" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m service.cli inspect --json --no-verify | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "1")


def test_ctrl_c_ends_a_command_without_a_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.checkpoint.read_header", interrupted)
    assert main(["inspect", "--no-verify"]) == 130
    assert capsys.readouterr().err == ""
