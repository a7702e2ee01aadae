"""Tuned choices: what ``palisade-serve tune`` measured for one checkpoint on one kind of processor, kept in a folder.

Beside the choices lie the models that were compiled or quantised for them. Those are run, so a folder into which others could
have put something is not used, and neither is a file that is not byte for byte what was written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model.device import processor
from model.plan import ExecutionName, Plan

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_SHARED = 0o022  # writable by the group or by others
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Identity:
    """What choices are good for: another checkpoint, processor or version may need others.

    Attributes:
        checkpoint: The checkpoint's ``weights_sha256``.
        processor: The processor's slug (:func:`model.device.processor`).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads of the engine; 0 means all cores.
        top_k: How many experts run per image; ``None`` means all.
        versions: Versions of torch and OpenVINO; ``None`` for one that is not installed.
    """

    checkpoint: str
    processor: str
    device: str
    threads: int = 0
    top_k: int | None = None
    versions: Mapping[str, str | None] = field(default_factory=lambda: {name: _version(name) for name in ("openvino", "torch")})

    @classmethod
    def here(cls, checkpoint: str, device: str, threads: int = 0, top_k: int | None = None) -> Identity:
        """Return the identity of a checkpoint, given as its digest, on this machine."""
        return cls(checkpoint, processor(device)[1], device, threads, top_k)

    @property
    def stem(self) -> str:
        """How the names of all files of these choices start."""
        return f"{self.checkpoint[:12]}-{self.processor}-{self.device.replace(':', '')}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "checkpoint_sha256": self.checkpoint,
            "processor": self.processor,
            "device": self.device,
            "threads": self.threads,
            "top_k": self.top_k,
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class Tuning:
    """The choices.

    Attributes:
        plans: The fastest plan by precision.
        precision: The precision of the fastest plan of all.
        date: When they were measured, as ``2026-11-22``.
        machine: The processor, as people call it.
        files: SHA-256 by name of each file beside the choices.
        measured: Everything else that was found out, for people: images/s, agreement, accuracy.
    """

    plans: Mapping[str, Plan]
    precision: str
    date: str
    machine: str
    files: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tuning:
        """Return the choices in :func:`write`'s output; raises ``ValueError`` if they are not in it."""
        try:
            plans = {name: Plan.from_json(plan) for name, plan in values["plans"].items()}
            files, precision, date, machine = (values[name] for name in ("files", "precision", "date", "machine"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__} {error}") from error
        if precision not in plans or any(plan.precision != name for name, plan in plans.items()):
            raise ValueError(f"plans are for {', '.join(plans)}, precision is {precision}")
        if not isinstance(files, dict) or not all(map(_FILE_NAME.fullmatch, files)):
            raise ValueError(f"files must be an object with the names of files, not {str(files)[:100]}")
        return cls(plans, precision, str(date), str(machine), files, values.get("measured", {}))


def default_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/palisade``, by default ``~/.cache/palisade``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palisade"


def artefact(identity: Identity, execution: str) -> str | None:
    """Return the name of the file beside the choices that an execution is loaded from, ``None`` if it needs none."""
    name = ExecutionName.parse(execution)
    if name.kind == "aotinductor":
        return f"{identity.stem}.{name.precision}.pt2"
    return f"{identity.stem}.x{name.stack}.int8.xml" if name.precision == "int8" else None


def find(folder: Path, identity: Identity) -> Tuning | None:
    """Return the choices for a checkpoint on this machine; ``None``, after a log line that says why, if none can be used."""
    path = folder / f"{identity.stem}.json"
    if not path.is_file():
        others = sorted(other.name for other in folder.glob(f"{identity.checkpoint[:12]}-*.json"))
        if others:
            log.info("%s: tuned for other processors only (%s), looked for %s", folder, ", ".join(others), path.name)
        return None
    try:
        check_private(folder)
        check_private(path)
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"no JSON object of format_version {FORMAT_VERSION}")
        differs = [name for name, value in identity.to_json().items() if values.get(name) != value]
        if differs:
            found, wanted = ({name: source.get(name) for name in differs} for source in (values, identity.to_json()))
            log.info("%s: not used, as it was tuned for %s and this is %s: run palisade-serve tune again", path, found, wanted)
            return None
        tuning = Tuning.from_json(values)
        for name, digest in tuning.files.items():
            check_private(folder / name)
            if sha256(folder / name) != digest:
                raise ValueError(f"{name} is not the file that was written")
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: tuned choices cannot be used (%s): the default plan is; run palisade-serve tune again", path, error)
        return None
    return tuning


def keep(folder: Path, file: Path) -> str:
    """Copy a file into a folder of choices, in one step for those who read there, and return its SHA-256."""
    scratch = folder / f"{file.name}.partial"
    scratch.unlink(missing_ok=True)
    shutil.copyfile(file, scratch)
    scratch.chmod(0o644)
    digest = sha256(scratch)
    os.replace(scratch, folder / file.name)
    return digest


def write(folder: Path, identity: Identity, tuning: Tuning) -> Path:
    """Write choices into a folder, beside the files that they name, and return where they are."""
    values = {
        "format_version": FORMAT_VERSION,
        **identity.to_json(),
        "date": tuning.date,
        "machine": tuning.machine,
        "precision": tuning.precision,
        "plans": {name: plan.to_json() for name, plan in tuning.plans.items()},
        "files": dict(tuning.files),
        "measured": dict(tuning.measured),
    }
    path = folder / f"{identity.stem}.json"
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(values, indent=1))
    scratch.chmod(0o644)
    os.replace(scratch, path)
    return path


def make_folder(folder: Path) -> None:
    """Make a folder for choices, if need be; raises ``ValueError`` if others could write into it: it would not be used."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_private(folder)


def check_private(path: Path) -> None:
    """Raise ``ValueError`` if a file or folder belongs to somebody else than this user or root, or others may write to it."""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise ValueError(f"{path} belongs to user {status.st_uid}: only what this user or root owns is run")
    if status.st_mode & _SHARED:
        raise ValueError(f"{path} is writable by others than its owner: take that away with chmod go-w {path}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
