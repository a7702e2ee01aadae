"""A replay: held-out training images and attacks on them, by which ``palisade-serve tune`` judges int8."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.checkpoint import Header

MOST_CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Replay:
    """Held-out training images and attacks on them, as ``palisade-train replay`` keeps them.

    Attributes:
        clean: ``(N, 3, H, W)`` uint8.
        attacked: ``(N, 3, H, W)`` float32 in ``[0, 1]``.
        labels: ``(N,)`` int64.
    """

    clean: npt.NDArray[np.uint8]
    attacked: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def split(self) -> tuple[Replay, Replay]:
        """Return the images to calibrate on, a quarter at most, and the others, to judge by."""
        count = max(1, min(len(self) // 4, MOST_CALIBRATION_IMAGES))
        parts = (slice(count), slice(count, None))
        first, rest = (Replay(self.clean[part], self.attacked[part], self.labels[part]) for part in parts)
        return first, rest

    @property
    def inputs(self) -> npt.NDArray[np.float32]:
        """Clean and attacked images, ``(2 N, 3, H, W)`` float32 in ``[0, 1]``."""
        return np.concatenate([self.clean.astype(np.float32) / 255, self.attacked])


def read_replay(path: Path, header: Header) -> Replay:
    """Read a replay that was made for a checkpoint; raises ``ValueError`` that names the file and what is wrong with it."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("clean", "attacked", "labels", "provenance")}
        digest = json.loads(str(arrays["provenance"]))["checkpoint_sha256"]
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no replay ({error}): make one with palisade-train replay") from error
    if digest != header.weights_sha256:
        raise ValueError(
            f"{path} attacks the checkpoint {str(digest)[:12]}, this is {header.weights_sha256[:12]}: make another replay"
        )
    shape = (len(arrays["labels"]), 3, header.architecture.height, header.architecture.input_width)
    for name, wanted, kind in (("clean", shape, np.uint8), ("attacked", shape, np.float32), ("labels", shape[:1], np.int64)):
        if arrays[name].shape != wanted or arrays[name].dtype != kind:
            raise ValueError(f"{path}: {name} must be {wanted} {np.dtype(kind)}, not {arrays[name].shape} {arrays[name].dtype}")
    if shape[0] < 2:
        raise ValueError(f"{path} holds {shape[0]} images: int8 is calibrated on some and judged by others")
    return Replay(arrays["clean"], arrays["attacked"], arrays["labels"])
