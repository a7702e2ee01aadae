"""The quarantine file: which samples a screening set aside, why, and what a person decided about each."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.data import Dataset
from training.screening.screening import DETECTORS, Screening, settings_json
from training.screening.settings import ScreenSettings

VERSION: Literal[1] = 1
DECIMALS = 4

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Sample(_Strict):
    """A quarantined sample; ``decision`` is the one field that is meant to be edited."""

    position: Annotated[int, Field(ge=0)]
    place: str
    sha256: Digest
    label: str
    decision: Literal["quarantine", "keep"]
    proposed: str
    reasons: list[str]
    scores: dict[str, float]


class _Data(_Strict):
    name: str
    training_sha256: Digest
    samples: int


class _File(_Strict):
    palisade_quarantine: Literal[1]
    data: _Data
    settings: dict[str, Any]
    flagged: dict[str, int]
    wrong_labels: dict[str, float]
    patches: list[dict[str, Any]]
    samples: list[_Sample]


def write_quarantine(screening: Screening, dataset: Dataset, settings: ScreenSettings, out: Path) -> str:
    """Write what is quarantined as JSON, a line for each sample, in one step, and return the file's SHA-256."""
    digests, labels = dataset.train.digests(), dataset.train.labels.tolist()
    rows = [
        _Sample(
            position=row,
            place=dataset.place("train", row),
            sha256=digests[row],
            label=dataset.label_names[labels[row]],
            decision="quarantine",
            proposed=screening.proposed[row],
            reasons=list(screening.reasons[row]),
            scores={name: round(float(screening.scores[name][row]), DECIMALS) for name in DETECTORS},
        )
        for row in np.flatnonzero(screening.quarantined).tolist()
    ]
    record = {
        "palisade_quarantine": VERSION,
        "data": {"name": dataset.name, "training_sha256": dataset.digest, "samples": len(dataset.train)},
        "settings": settings_json(settings),
        "flagged": {name: int(screening.flagged(name).sum()) for name in DETECTORS},
        "wrong_labels": {name: round(share, DECIMALS) for name, share in screening.wrong_labels.items()},
        "patches": [_patch(screening, dataset, number) for number in range(len(screening.patches))],
    }
    head = json.dumps(record, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(row.model_dump(), ensure_ascii=False)}" for row in rows)
    content = f'{head},\n  "samples": [\n{lines}\n  ]\n}}\n'.encode()
    scratch = out.with_name(f"{out.name}.partial")
    scratch.write_bytes(content)
    os.replace(scratch, out)
    return hashlib.sha256(content).hexdigest()


def without_quarantined(dataset: Dataset, quarantine: Path) -> Dataset:
    """Return the data without the training samples that a quarantine file names, but for those with the decision ``keep``.

    What is left carries the file's SHA-256, the number of samples left out and the digest of the whole in its provenance.

    Raises:
        ValueError: The file is not a quarantine file, or was made for other data.
        OSError: The file cannot be read.
    """
    content = quarantine.read_bytes()
    found = _read(content, quarantine)
    if found.data.training_sha256 != dataset.digest:
        raise ValueError(
            f"{quarantine} was made for other training data ({found.data.name}, SHA-256 {found.data.training_sha256[:12]}) "
            f"than {dataset.name} ({dataset.digest[:12]}): screen these data with 'palisade-train data screen', or give those"
        )
    digests, labels = dataset.train.digests(), dataset.train.labels.tolist()
    for sample in found.samples:
        known, described = sample.position < len(digests), (sample.sha256, sample.label)
        if not known or (digests[sample.position], dataset.label_names[labels[sample.position]]) != described:
            raise ValueError(
                f"{quarantine}: the sample at position {sample.position} is not the one that the file describes "
                f"({sample.place}, {sample.label}, SHA-256 {sample.sha256[:12]}): edit nothing in the file but 'decision'"
            )
    positions = sorted({sample.position for sample in found.samples if sample.decision == "quarantine"})
    provenance = {
        **dataset.provenance,
        "training_sha256": dataset.digest,
        "quarantine_sha256": hashlib.sha256(content).hexdigest(),
        "quarantined": len(positions),
    }
    return replace(dataset.without(torch.tensor(positions, dtype=torch.long)), provenance=provenance)


def _read(content: bytes, path: Path) -> _File:
    try:
        return _File.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(step) for step in problem["loc"])
        raise ValueError(f"{path} is not a quarantine file ({field}: {problem['msg']})") from error


def _patch(screening: Screening, dataset: Dataset, number: int) -> dict[str, Any]:
    patch = screening.patches[number]
    return {
        "row": patch.row,
        "column": patch.column,
        "height": patch.height,
        "width": patch.width,
        "label": dataset.label_names[patch.label],
        "samples": len(patch.members),
        "samples_of_other_labels": patch.others,
        "expected_by_chance": round(patch.expected, 2),
    }
