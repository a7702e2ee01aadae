"""Parts: a large file as several small ones with a manifest, for stores that limit the size of a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

BLOCK = 2**20
"""Bytes held in memory at a time."""


def _plain(name: str) -> str:
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


class _Entry(BaseModel):
    """A file as the manifest describes it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, AfterValidator(_plain)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(_Entry):
    parts: list[_Entry]


def split(file: Path, folder: Path, limit: int = 16 * 2**20) -> list[Path]:
    """Write a file as ``<name>.000``, ``<name>.001``, ... and ``<name>.manifest.json`` into a folder.

    Each of them replaces an older one in one step, the manifest last; then the parts that only an earlier split of the same
    name had are removed. After a kill in between, :func:`join` refuses what is there; splitting again mends it.

    Args:
        file: The file; its last name is ``<name>``.
        folder: Where the parts go; made if absent.
        limit: Largest part, in bytes.

    Returns:
        The parts in order (none for an empty file), then the manifest.

    Raises:
        ValueError: The limit is below 1, or the file's name has a backslash.
        OSError: The file cannot be read, or the folder not be written.
    """
    if limit < 1:
        raise ValueError(f"a part needs a limit of at least 1 byte, not {limit}")
    _plain(file.name)
    whole, size, parts = hashlib.sha256(), 0, list[_Entry]()
    with file.open("rb") as source:
        folder.mkdir(parents=True, exist_ok=True)
        while block := source.read(min(BLOCK, limit)):
            name = f"{file.name}.{len(parts):03d}"
            with _scratch(folder / name).open("wb") as part:
                digest, copied = _copy(block, source, part, limit, whole)
            parts.append(_Entry(name=name, bytes=copied, sha256=digest))
            size += copied
    manifest = _Manifest(name=file.name, bytes=size, sha256=whole.hexdigest(), parts=parts)
    written = [folder / part.name for part in parts] + [folder / f"{file.name}.manifest.json"]
    _scratch(written[-1]).write_text(json.dumps(manifest.model_dump(), indent=2) + "\n")
    for target in written:
        os.replace(_scratch(target), target)
    _remove_stale(folder, file.name, {target.name for target in written})
    return written


def _copy(block: bytes, source: BinaryIO, target: BinaryIO, limit: int, whole: hashlib._Hash) -> tuple[str, int]:
    """Copy a block and what follows it in the source, up to ``limit`` bytes in all, and return its SHA-256 and length."""
    digest, copied = hashlib.sha256(), 0
    while block:
        target.write(block)
        digest.update(block)
        whole.update(block)
        copied += len(block)
        block = source.read(min(BLOCK, limit - copied))
    return digest.hexdigest(), copied


def _remove_stale(folder: Path, name: str, current: set[str]) -> None:
    """Remove parts, and scratch files of a killed split, that the current split did not write."""
    ours = re.compile(re.escape(name) + r"\.(\d{3,}(\.partial)?|manifest\.json\.partial)")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in current and path.is_file():
            path.unlink()


def join(manifest: Path, out: Path) -> Path:
    """Put a file together again from the parts that lie beside its manifest.

    Every part and the whole are verified; ``out`` appears, or is replaced, in one step and only when all is right.

    Args:
        manifest: The ``<name>.manifest.json`` that :func:`split` wrote.
        out: Where the file goes; it may be called otherwise than the original.

    Returns:
        ``out``.

    Raises:
        ValueError: The manifest is not one, or a part is missing, damaged or of another size; the message names it.
        OSError: A file cannot be read or written.
    """
    content = _read_manifest(manifest)
    parts = [(manifest.parent / part.name, part) for part in content.parts]
    for path, part in parts:
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it again to where {manifest.name} lies")
        if path.stat().st_size != part.bytes:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {part.bytes}: copy it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch, whole = _scratch(out), hashlib.sha256()
    try:
        with scratch.open("wb") as target:
            for path, part in parts:
                with path.open("rb") as source:
                    limit = part.bytes + 1  # so that a part that has grown meanwhile is noticed
                    digest, _ = _copy(source.read(min(BLOCK, limit)), source, target, limit, whole)
                if digest != part.sha256:
                    raise ValueError(f"{path} is damaged, its SHA-256 is {digest}, not {part.sha256}: copy it again")
        if whole.hexdigest() != content.sha256:
            raise ValueError(f"{manifest}: the parts do not make the file whose SHA-256 it gives: split the file again")
        os.replace(scratch, out)
    finally:
        scratch.unlink(missing_ok=True)
    return out


def _read_manifest(path: Path) -> _Manifest:
    try:
        content = _Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: it is written beside the parts when a file is split") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"])
        raise ValueError(f"{path} is not a manifest of parts ({field}: {first['msg']}): split the file again") from error
    total = sum(part.bytes for part in content.parts)
    if total != content.bytes:
        raise ValueError(f"{path}: its parts have {total} bytes, the file {content.bytes}: split the file again")
    return content


def _scratch(target: Path) -> Path:
    return target.with_name(target.name + ".partial")
