"""The run folder: where a training run keeps its configuration, its log and what it needs to go on after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "events"


class RunFolder:
    """One directory per run: ``config.json``, ``metrics.jsonl``, ``events/``, one ``*.safetensors`` per stage, plots.

    Args:
        path: The directory; made if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: SummaryWriter | None = None
        path.mkdir(parents=True, exist_ok=True)

    def write_config(self, settings: dict[str, Any]) -> None:
        """Write ``config.json``: the settings of the newest command, the code's revision and the library's version."""
        record = {"settings": settings, "git_revision": git_revision(), "torch": torch.__version__, "started": _now()}
        _write_atomically(self.path / "config.json", json.dumps(record, indent=2) + "\n")

    def log(self, stage: str, step: int, **values: float | str | list[float]) -> None:
        """Append one line to ``metrics.jsonl``, and its numbers to the TensorBoard events under ``events/``.

        TensorBoard shows them as ``<stage>/<name>``, a list's as ``<stage>/<name>/<position>``. Both are on disk when this
        returns. Steps that a resumed run repeats are in both a second time, with the same numbers.
        """
        with (self.path / "metrics.jsonl").open("a+") as file:
            if self._cut_short(file):
                file.write("\n")
            file.write(json.dumps({"time": _now(), "stage": stage, "step": step, **values}) + "\n")
        self._log_events(stage, step, values)

    def _log_events(self, stage: str, step: int, values: dict[str, float | str | list[float]]) -> None:
        scalars: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, list):
                scalars |= {f"{stage}/{name}/{position}": part for position, part in enumerate(value)}
            elif not isinstance(value, str):
                scalars[f"{stage}/{name}"] = value
        if not scalars:
            return
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, which commands that log nothing don't have

            self._events = SummaryWriter(str(self.path / EVENTS))
        for tag, scalar in scalars.items():
            self._events.add_scalar(tag, scalar, step)
        self._events.flush()

    def close(self) -> None:
        """Stop writing events; logging again starts a new file of them. Nothing is lost without this but a thread."""
        if self._events is not None:
            self._events.close()
            self._events = None

    @staticmethod
    def _cut_short(file: TextIO) -> bool:
        """Tell whether a kill left the last line without its end."""
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(size - 1)
        return file.read(1) != "\n"

    def metrics(self) -> list[dict[str, Any]]:
        """Return every line logged so far; a line cut short by a kill is left out."""
        target = self.path / "metrics.jsonl"
        rows = []
        for line in target.read_text().splitlines() if target.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def save(self, stage: str, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        """Replace a stage's saved state in one step, so that a kill leaves the old one or the new one."""
        target = self.path / f"{stage}.safetensors"
        scratch = target.with_suffix(".partial")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, scratch, {"counters": json.dumps(counters)})
        os.replace(scratch, target)

    def counters(self, stage: str) -> dict[str, Any] | None:
        """Return what a stage's saved state counts, without its tensors, or ``None`` when there is none."""
        found = self._opened(stage, lambda file: {})
        return None if found is None else found[1]

    def load(self, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return a stage's saved state, or ``None`` when there is none."""
        return self._opened(stage, lambda file: {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)

    def _opened(
        self, stage: str, read: Callable[[Any], dict[str, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        target = self.path / f"{stage}.safetensors"
        if not target.exists():
            return None
        try:
            with safe_open(target, framework="pt") as file:
                counters = json.loads((file.metadata() or {})["counters"])
                return read(file), counters
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{target} is not a saved training state ({error}): delete it to start the stage again") from error


def git_revision() -> str:
    """Return the checkout's commit (with ``+`` when there are uncommitted changes), or ``unknown``."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _write_atomically(target: Path, text: str) -> None:
    scratch = target.with_suffix(target.suffix + ".partial")
    scratch.write_text(text)
    os.replace(scratch, target)
