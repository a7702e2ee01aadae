"""``palisade-serve tune``: find the fastest way to run a checkpoint on this machine, and keep the choice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from service.commands.usage import add_command, fail


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers; ``run_command`` takes the parsed options and returns the status."""
    command = add_command(
        commands,
        "tune",
        "measure every way to run a checkpoint on this machine and keep the fastest",
        "Measure every way to run a checkpoint on this machine, compare its answers with the float32 reference's, and keep the "
        "fastest plan that agrees in $PALISADE_TUNING_DIR (default: ~/.cache/palisade), where the service finds it. "
        "PALISADE_DEVICE, PALISADE_THREADS and PALISADE_TOP_K count as they do for the service. Takes minutes; run nothing "
        "beside it.",
        [
            "palisade-serve tune",
            "palisade-train replay --data cifar10 --out replay.npz && palisade-serve tune --replay replay.npz",
            "palisade-serve tune --only openvino-float32-x3,loop-float32 --batch-sizes 1,64 --json",
        ],
    )
    command.add_argument("--checkpoint", help="path, or 'compact' (default: $PALISADE_CHECKPOINT, else compact)")
    command.add_argument(
        "--replay", type=Path, metavar="FILE", help="of palisade-train replay: also quantise to int8, calibrate and judge by it"
    )
    command.add_argument("--seconds", type=_seconds, default=0.5, help="length of a measurement (default: %(default)s)")
    command.add_argument(
        "--batch-sizes", type=_sizes, default=[1, 2, 4, 8, 16, 32, 64], metavar="LIST", help="default: 1,2,4,8,16,32,64"
    )
    command.add_argument(
        "--only",
        type=_names,
        default=[],
        metavar="LIST",
        help="measure these alone, as openvino-float32-x3,loop-float32 (default: all that can run here)",
    )
    command.add_argument("--json", action="store_true", help="print what is kept as JSON")
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from model.checkpoint import CheckpointError
    from model.plan import ExecutionName
    from service.settings import read_settings
    from service.stopwatch import ExecutionFailedError
    from service.tuner import Tuner

    settings = read_settings()
    if settings is None:
        return 2
    if options.replay is None and any(ExecutionName.parse(name).precision == "int8" for name in options.only):
        return fail("--only: int8 needs --replay FILE, to be calibrated and judged by", 2)
    try:
        path = Tuner(options, settings).tune()
    except (CheckpointError, ExecutionFailedError, OSError, ValueError) as error:
        return fail(str(error), 1)
    if options.json:
        print(json.dumps(json.loads(path.read_text())))
    else:
        print(f"kept in {path}")
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 60:
        raise argparse.ArgumentTypeError(f"{text}: give seconds, more than 0 and at most 60")
    return seconds


def _sizes(text: str) -> list[int]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(sizes) < 1 or max(sizes) > 4096:
        raise argparse.ArgumentTypeError(f"{text}: give numbers of images from 1 to 4096, as 1,8,64")
    return sorted(set(sizes))


def _names(text: str) -> list[str]:
    from model.plan import ExecutionName

    try:
        return [str(ExecutionName.parse(name)) for name in dict.fromkeys(text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
