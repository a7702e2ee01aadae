"""Manifests: what a dataset was, image by image, so that training can refuse what someone has changed since."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.data import PARTS, Dataset

VERSION: Literal[1] = 1
NAMED = 5
"""So many differences are named; the others are counted."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Head(BaseModel):
    """A manifest's first line."""

    model_config = ConfigDict(strict=True, extra="forbid")

    palisade_manifest: Literal[1]
    name: str
    label_names: list[str]
    train_images: Annotated[int, Field(ge=0)]
    test_images: Annotated[int, Field(ge=0)]
    train_sha256: Digest
    test_sha256: Digest


class _Row(BaseModel):
    """Every other line: one image."""

    model_config = ConfigDict(strict=True, extra="forbid")

    part: Literal["train", "test"]
    place: str
    sha256: Digest
    label: str


def write_manifest(dataset: Dataset, out: Path) -> str:
    """Write what a dataset is as JSON lines, in one step, and return the file's SHA-256.

    The first line says what the data are called, their classes, how many images each split has and the split's digest. Every
    other line is one image: its split, its place (a file below the data's folder, or a position in an array), the SHA-256 of
    its pixels as rows of RGB bytes (a folder's after resizing) and the name of its label.

    Raises:
        OSError: The file cannot be written.
    """
    head = _Head(
        palisade_manifest=VERSION,
        name=dataset.name,
        label_names=list(dataset.label_names),
        train_images=len(dataset.train),
        test_images=len(dataset.test),
        train_sha256=dataset.digest,
        test_sha256=dataset.test_digest,
    )
    lines = [head.model_dump(), *(row.model_dump() for row in _rows(dataset))]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    scratch = out.with_name(f"{out.name}.partial")
    scratch.write_bytes(content)
    os.replace(scratch, out)
    return hashlib.sha256(content).hexdigest()


def checked(dataset: Dataset, manifest: Path) -> Dataset:
    """Return the data, which now carry the manifest's SHA-256 in their provenance.

    A file that was only renamed is no difference as long as the images keep their order.

    Raises:
        ValueError: The data are not those of the manifest; the message names the first differences and counts all. Or the
            file is not a manifest.
        OSError: The file cannot be read.
    """
    content = manifest.read_bytes()
    head, before = _read(content, manifest)
    if head.label_names != list(dataset.label_names):
        raise ValueError(
            f"{dataset.name} has the classes {', '.join(dataset.label_names)}; the manifest {manifest} has "
            f"{', '.join(head.label_names)}: give the data that it was made for, or make a new one"
        )
    found = [difference for part in PARTS for difference in _differences(before[part], _rows(dataset, part))]
    if found:
        kinds = Counter(kind for kind, _ in found)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        named = "; ".join(f"{where}" for _, where in found[:NAMED]) + ("; ..." if len(found) > NAMED else "")
        raise ValueError(
            f"{dataset.name} is not what the manifest {manifest} says ({counts}): {named}. Find out who changed the data; if "
            "the change is wanted, make a new manifest with 'palisade-train data manifest'"
        )
    if (head.train_sha256, head.test_sha256) != (dataset.digest, dataset.test_digest):
        raise ValueError(f"{manifest}: the digests in its first line are not those of its images: make a new manifest")
    return replace(dataset, provenance={**dataset.provenance, "manifest_sha256": hashlib.sha256(content).hexdigest()})


def _rows(dataset: Dataset, *parts: str) -> list[_Row]:
    rows = []
    for part in parts or PARTS:
        split = dataset.train if part == "train" else dataset.test
        names = [dataset.label_names[label] for label in split.labels.tolist()]
        for position, (digest, name) in enumerate(zip(split.digests(), names, strict=True)):
            row: dict[str, Any] = {"part": part, "place": dataset.place(part, position), "sha256": digest, "label": name}
            rows.append(_Row.model_construct(**row))  # 60,000 rows of our own need no checks
    return rows


def _read(content: bytes, path: Path) -> tuple[_Head, dict[str, list[_Row]]]:
    rows: dict[str, list[_Row]] = {part: [] for part in PARTS}
    number, lines = 0, content.splitlines()
    try:
        head = _Head.model_validate_json(lines[0] if lines else b"")
        for number, line in enumerate(lines[1:], start=1):  # noqa: B007 (the error names it)
            row = _Row.model_validate_json(line)
            rows[row.part].append(row)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(step) for step in problem["loc"])
        raise ValueError(f"{path} is not a manifest: line {number + 1}: {field} {problem['msg']}") from error
    for part, said in (("train", head.train_images), ("test", head.test_images)):
        if len(rows[part]) != said:
            raise ValueError(f"{path} was cut short or changed: it lists {len(rows[part])} {part} images, its head says {said}")
    return head, rows


def _differences(before: Sequence[_Row], now: Sequence[_Row]) -> list[tuple[str, str]]:
    """Return each difference of a split as its kind and a sentence, those of an image that both have first.

    Images are told by their pixels, so that one that was inserted into an array does not make all that follow it differ.
    """
    found: list[tuple[str, str]] = []
    gone, new = _unmatched(before, now)
    by_pixels = defaultdict[str, list[_Row]](list)
    for row in new:
        by_pixels[row.sha256].append(row)
    missing: dict[str, _Row] = {}
    for old in gone:  # the same pixels under another label
        if by_pixels[old.sha256]:
            row = by_pixels[old.sha256].pop(0)
            found.append(("relabelled", f"{row.place}: label changed from {old.label} to {row.label}"))
        else:
            missing[old.place] = old
    for row in (row for rows in by_pixels.values() for row in rows):
        old_row = missing.pop(row.place, None)
        if old_row is None:
            found.append(("added", f"{row.place}: added ({row.label})"))
        elif old_row.label == row.label:
            found.append(("with other pixels", f"{row.place}: pixels changed ({row.label})"))
        else:
            found.append(("replaced", f"{row.place}: pixels changed, label changed from {old_row.label} to {row.label}"))
    found += [("missing", f"{place}: missing ({old.label})") for place, old in missing.items()]
    if not found:
        pairs = zip(before, now, strict=True)
        moved = [(old, row) for old, row in pairs if (old.sha256, old.label) != (row.sha256, row.label)]
        found = [("in another order", f"{row.place}: not where it was") for _, row in moved]
    return found


def _unmatched(before: Sequence[_Row], now: Sequence[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Return the rows of either list that the other lacks, by pixels and label, each list in its order."""

    def beyond(rows: Sequence[_Row], others: Sequence[_Row]) -> list[_Row]:
        # A row at its old place is matched first, so that of two equal images the one that changed is named.
        at_place = {(row.place, row.sha256, row.label) for row in others}
        count = Counter((row.sha256, row.label) for row in others)
        left = []
        for row in sorted(rows, key=lambda row: (row.place, row.sha256, row.label) not in at_place):
            key = (row.sha256, row.label)
            if count[key]:
                count[key] -= 1
            else:
                left.append(row)
        return left

    return beyond(before, now), beyond(now, before)
