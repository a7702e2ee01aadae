"""Evidence: what one replica tells the others of a caller, and how it is written down. No pixel and no address is in it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.watch.fingerprint import SLOTS

DETECTORS = ("near-duplicates", "off-distribution", "distances")
"""By their number in what is written down."""
_FREE_BYTES, _FIXED_BYTES = 4 * SLOTS, 2 * SLOTS
_SENT = struct.Struct(f"<cQ{_FREE_BYTES}s{_FIXED_BYTES}s")
_JUDGED = struct.Struct("<QHHbfI")
_SUSPICION = struct.Struct("<c16sBI")
_FORGIVEN = struct.Struct("<c16s")


@dataclass(frozen=True)
class Sent:
    """An image that was sent, answered or not: a fingerprint's row, see :class:`service.watch.fingerprint.Fingerprints`."""

    exact: int
    free: np.ndarray
    fixed: np.ndarray


@dataclass(frozen=True)
class Judged:
    """A new image's answer, as far as detectors look at it.

    Attributes:
        exact: The image, as :class:`Sent` names it.
        label: Its class.
        classes: How many classes the model has that answered.
        is_unsure: Whether the answer was unsure; ``None`` where nobody tests that.
        distance: Of its thumbnail to the nearest one before of its class; ``None`` without one, and where it was passed over.
        model: Tells the model that answered from others, 32 bits: what is unsure says nothing of another's answers.
    """

    exact: int
    label: int
    classes: int
    is_unsure: bool | None
    distance: float | None
    model: int = 0


@dataclass(frozen=True)
class Suspicion:
    """A caller came under suspicion, or stays under it.

    Attributes:
        key: The caller, by what it is called among replicas: 32 hexadecimal digits.
        detector: One of :data:`DETECTORS`.
        images: Suspicious images since this was told last.
    """

    key: str
    detector: str
    images: int


@dataclass(frozen=True)
class Forgiven:
    """An operator forgave a caller, named as in :class:`Suspicion`."""

    key: str


@dataclass
class Place:
    """How far a journal of evidence or verdicts was read: its epoch, its last entry's number, the store's time in µs."""

    epoch: bytes = b""
    number: int = 0
    read_at: int = 0


Evidence = Sent | Judged
Verdict = Suspicion | Forgiven


def write_sent(sent: Sent) -> bytes:
    """Return an image that was sent as bytes."""
    return _SENT.pack(b"S", sent.exact, sent.free.astype("<u4").tobytes(), sent.fixed.astype("<u2").tobytes())


def write_judged(judged: Sequence[Judged]) -> bytes:
    """Return answers of one request as bytes."""
    rows = (
        _JUDGED.pack(
            each.exact, each.label, each.classes, -1 if each.is_unsure is None else each.is_unsure,
            math.nan if each.distance is None else each.distance, each.model,
        )
        for each in judged
    )  # fmt: skip
    return b"J" + b"".join(rows)


def write_verdict(verdict: Verdict) -> bytes:
    """Return a verdict as bytes."""
    key = bytes.fromhex(verdict.key)
    if isinstance(verdict, Forgiven):
        return _FORGIVEN.pack(b"F", key)
    return _SUSPICION.pack(b"N", key, DETECTORS.index(verdict.detector), min(verdict.images, 2**32 - 1))


def read_evidence(data: bytes) -> list[Evidence]:
    """Return what an entry says of its caller; nothing if another version of the service wrote it in another form."""
    if data[:1] == b"S" and len(data) == _SENT.size:
        _, exact, free, fixed = _SENT.unpack(data)
        return [Sent(exact, np.frombuffer(free, "<u4"), np.frombuffer(fixed, "<u2"))]
    if data[:1] == b"J" and len(data) % _JUDGED.size == 1:
        return [
            Judged(
                exact,
                label,
                classes,
                None if unsure < 0 else bool(unsure),
                distance if math.isfinite(distance) else None,
                model,
            )
            for exact, label, classes, unsure, distance, model in _JUDGED.iter_unpack(data[1:])
            if label < classes
        ]
    return []


def read_verdict(data: bytes) -> Verdict | None:
    """Return what an entry says; ``None`` if another version of the service wrote it in another form."""
    if data[:1] == b"F" and len(data) == _FORGIVEN.size:
        return Forgiven(_FORGIVEN.unpack(data)[1].hex())
    if data[:1] == b"N" and len(data) == _SUSPICION.size:
        _, key, detector, images = _SUSPICION.unpack(data)
        return Suspicion(key.hex(), DETECTORS[detector], images) if detector < len(DETECTORS) else None
    return None
