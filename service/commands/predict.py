"""``palisade-serve predict``: classify image files, here or at a running service."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.client.key import API_KEY
from service.commands.usage import add_command, fail, printable

if TYPE_CHECKING:
    from service.client.outcome import Outcome

OFFLINE_ONLY = ("checkpoint", "device", "precision")
MAX_WAIT_S = 120.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers; ``run_command`` takes the parsed options and returns the status."""
    command = add_command(
        commands,
        "predict",
        "classify image files and folders, here or at a running service",
        "Classify image files, and in folders whatever below them is called .png, .jpg, .jpeg or .webp, in order of name. "
        "Without --url this happens in this process, decoding as the service does; the answers are then exact, that is "
        "UNPROTECTED by any policy: who can read them can copy the model. With --url a running service is asked, whose quota "
        "and policy hold. The other PALISADE_* settings, as PALISADE_MAX_IMAGE_BYTES, count as they do for the service.",
        [
            "palisade-serve predict docs/samples",
            "palisade-serve predict --top 3 cat.png dog.jpg",
            "palisade-serve predict --json photos | jq -r 'select(.confidence < 0.5) | .path'",
            "palisade-serve predict --url http://127.0.0.1:8000 --key-file mine.key photos",
        ],
        "Exit status: 0 every image was classified, 1 some or all were not, 2 wrong usage or settings.",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="a file, or a folder")
    command.add_argument("--checkpoint", help="path, or 'compact' (default: $PALISADE_CHECKPOINT, else compact)")
    command.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: $PALISADE_DEVICE, else auto)")
    command.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "int8"),
        help="what to compute in (default: $PALISADE_PRECISION, else auto)",
    )
    command.add_argument("--top", type=_count, metavar="N", help="scores shown, the largest (default: 1, and with --json all)")
    command.add_argument("--url", help="ask the service at this address, as http://127.0.0.1:8000")
    command.add_argument("--key-file", metavar="FILE", help=f"file with the API key to send (default: ${API_KEY}, if set)")
    command.add_argument(
        "--max-wait",
        type=_seconds,
        default=MAX_WAIT_S,
        metavar="SECONDS",
        help="longest Retry-After of the service that is waited for (default: %(default)g)",
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object a line: path, label, confidence, scores; or error"
    )
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from service.client.files import EXTENSIONS, find

    given = [f"--{name}" for name in OFFLINE_ONLY if getattr(options, name) is not None]
    if options.url and given:
        return fail(f"{', '.join(given)} cannot be chosen with --url: the service has its own", 2)
    if options.key_file and not options.url:
        return fail("--key-file needs --url", 2)
    files = find(options.images)
    if not files:
        return fail(f"no images in {', '.join(map(str, options.images))}: none ends in {', '.join(EXTENSIONS)}", 1)
    writer = _Writer(options.json, options.top)
    status = _ask(options, files, writer) if options.url else _compute(options, files, writer)
    if status:
        return status
    if writer.failed:
        print(f"palisade-serve: {writer.failed} of {len(files)} images could not be classified", file=sys.stderr)
    return 1 if writer.failed else 0


class _Writer:
    """Writes outcomes and counts those without a prediction."""

    def __init__(self, as_json: bool, top: int | None) -> None:
        self._json, self._top = as_json, top
        self.written = self.failed = 0

    def write(self, outcome: Outcome) -> None:
        self.written += 1
        self.failed += outcome.error is not None
        if self._json:
            print(json.dumps(outcome.to_json(self._top)))
        elif outcome.error is None:
            print(printable(outcome.to_text(self._top or 1)))
        else:
            print(printable(f"palisade-serve: {outcome.path}: {outcome.error}"), file=sys.stderr)


def _compute(options: argparse.Namespace, files: Sequence[Path], writer: _Writer) -> int:
    """Classify in this process; returns a status, 0 also when single images failed."""
    from model.checkpoint import CheckpointError
    from service.client.offline import Offline
    from service.settings import read_settings

    settings = read_settings()
    if settings is None:
        return 2
    chosen = {name: getattr(options, name) for name in OFFLINE_ONLY if getattr(options, name) is not None}
    try:
        outcomes = Offline(settings.model_copy(update=chosen)).classify(files)
        with _progress(len(files)) as tick:
            for outcome in outcomes:
                writer.write(outcome)
                tick()
    except BrokenPipeError:
        raise
    except (CheckpointError, ValueError, RuntimeError, OSError) as error:  # RuntimeError: no memory on the device, say
        return fail(str(error), 1)
    return 0


def _ask(options: argparse.Namespace, files: Sequence[Path], writer: _Writer) -> int:
    """Ask a service; returns a status, 0 also when single images failed."""
    from service.client.key import read_key
    from service.client.remote import Remote, RemoteError
    from service.load.connection import Target

    try:
        target, key = Target.parse(options.url), read_key(options.key_file)
    except ValueError as error:
        return fail(str(error), 2)
    url = target.origin + target.prefix
    with Remote(
        url, key, options.max_wait, lambda line: print(printable(f"palisade-serve: {line}"), file=sys.stderr)
    ) as remote:
        try:
            with _progress(len(files)) as tick:
                for outcome in remote.classify(files):
                    writer.write(outcome)
                    tick()
        except RemoteError as error:
            return fail(printable(f"{error} ({len(files) - writer.written} of {len(files)} images are left)"), 1)
    return 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """Show a bar if standard error is a terminal; yields what is called after each image."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines for a terminal are printed above the bar; lines for a file or a pipe go there untouched.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("images", total=total)
        yield lambda: progress.advance(task)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text}: give seconds from 0 to 86400")
    return seconds
