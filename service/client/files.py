"""Image files: found in folders, and read within a limit."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")


class UnreadableError(Exception):
    """A file cannot be read; the message says why, without its name."""


def find(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are given, and for each folder the images in it and below it, by extension and in order of name.

    Links to folders are not followed. A folder that cannot be read stands for what may be in it, to fail when it is read.
    """
    found: list[Path] = []
    for path in paths:
        found += _inside(path) if path.is_dir() else [path]
    return found


def read(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes; raises :class:`UnreadableError` for more than ``max_bytes`` and for what is no regular file."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError("not a regular file")
            if status.st_size > max_bytes:
                raise UnreadableError(f"the image has {status.st_size} bytes; at most {max_bytes} are taken")
            return file.read(max_bytes)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    except ValueError as error:  # a null byte in the name
        raise UnreadableError(str(error)) from error


def _inside(folder: Path) -> list[Path]:
    unreadable: list[str] = []
    found: list[Path] = []
    for root, _, names in os.walk(folder, onerror=lambda error: unreadable.append(error.filename)):
        found += [Path(root, name) for name in names if name.lower().endswith(EXTENSIONS)]
    return sorted([*found, *map(Path, unreadable)])
