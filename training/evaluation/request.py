"""What an evaluation is asked for: how thorough it is and where it writes, checked before any work is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from training.evaluation.autoattack import ATTACKS
from training.evaluation.levels import Level


@dataclass(frozen=True)
class Request:
    """What to measure and where to write it.

    Attributes:
        level: How thoroughly to attack.
        attacks: Level ``full`` runs these of AutoAttack's attacks; ``None`` means all.
        corruptions: Also measure accuracy under common corruptions.
        compare: Other checkpoints, to be measured on the same images.
        json: Where to write the figures.
        plot: Where to draw the accuracies.
        folder: Where to write everything, made if need be; level ``full`` keeps its progress there.

    Raises:
        ValueError: A file can't be written, or the options contradict each other.
    """

    level: Level = "quick"
    attacks: tuple[str, ...] | None = None
    corruptions: bool = False
    compare: tuple[str, ...] = ()
    json: Path | None = None
    plot: Path | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.level == "full" and self.folder is None:
            raise ValueError("--level full takes long and keeps its progress in a folder: give one with --out DIR")
        if self.level != "full" and self.attacks is not None:
            raise ValueError(f"--attacks belongs to --level full, not to --level {self.level}")
        for option, file in (("--json", self.json), ("--plot", self.plot)):
            if file is not None:
                _check_file(option, file)
        if self.plot is not None and self.plot.suffix != ".png":
            raise ValueError(f"--plot {self.plot}: plots are PNG files; end the name with .png")
        if self.folder is not None:
            _check_folder(self.folder)

    @property
    def ensemble(self) -> tuple[str, ...]:
        """The attacks of level ``full``."""
        return ATTACKS if self.attacks is None else self.attacks


def _check_file(option: str, file: Path) -> None:
    if file.is_dir():
        raise ValueError(f"{option} {file}: this is a folder; give a file")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}; make it first")
    _check_writable(option, file if file.exists() else file.parent)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: this is a file; give a folder")
    if not folder.parent.is_dir():
        raise ValueError(f"--out {folder}: there is no folder {folder.parent}; make it first")
    _check_writable("--out", folder if folder.exists() else folder.parent)


def _check_writable(option: str, path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise ValueError(f"{option}: {path} may not be written to")
