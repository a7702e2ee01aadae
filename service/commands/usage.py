"""How the commands of ``palisade-serve`` describe themselves and say what went wrong."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

STATUS = "Exit status: 0 done, 1 failed, 2 wrong usage or settings."
WIDEST = 100


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    description: str,
    examples: Sequence[str],
    status: str = STATUS,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add a sub-parser whose help ends with examples and the exit status.

    Args:
        commands: Where to add it.
        name: The command.
        summary: Half a line for the list of commands.
        description: What it does; wrapped.
        examples: Command lines, shown as they are.
        status: What the exit status means; wrapped.
        parents: Parsers whose options it has too.
    """
    width = min(WIDEST, get_terminal_size().columns) - 2
    shown = "\n".join(f"  {example}" for example in examples)
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, width),
        epilog=f"examples:\n{shown}\n\n{textwrap.fill(status, width)}",
        parents=list(parents),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def fail(message: str, status: int) -> int:
    """Say on standard error what went wrong; return ``status``."""
    print(f"palisade-serve: {message}", file=sys.stderr)
    return status


def printable(text: str) -> str:
    """Return text in which nothing controls a terminal; file names may hold anything."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
