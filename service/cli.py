"""``palisade-serve``: the command line of the service."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from service.commands import admin, bench, check, inspect, keys, predict, run, tune

COMMANDS = (run, predict, keys, admin, check, bench, inspect, tune)
INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="palisade-serve",
        description="Serve a robust mixture of experts over HTTP.",
        epilog="`palisade-serve COMMAND --help` explains a command, with examples; docs/command-line.md has them all.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run_command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
