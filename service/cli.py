"""``palisade-serve``: the command line of the service."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from service.commands import keys, run, tune

COMMANDS = (run, keys, tune)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 failed, 2 wrong usage or settings."""
    parser = argparse.ArgumentParser(prog="palisade-serve", description="Serve a robust mixture of experts over HTTP.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.register(commands)
    options = parser.parse_args(arguments)
    status: int = options.run_command(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
