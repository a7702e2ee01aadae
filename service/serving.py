"""The engine in use: what the batcher calls, while the engine behind it may be replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from service.batcher import Engine

VERSION_DIGITS = 12


@dataclass(frozen=True)
class ModelFacts:
    """What an engine runs.

    Attributes:
        weights_sha256: The checkpoint's digest.
        plan: Which executions run which batches, and why these.
        precision: What the experts compute in.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        gpu: The UUID of the GPU, as eight-four-four-four-twelve hexadecimal digits; empty on a processor.
    """

    weights_sha256: str
    plan: str
    precision: str
    device: str
    gpu: str = ""

    @property
    def version(self) -> str:
        """The model's version, as callers see it."""
        return self.weights_sha256[:VERSION_DIGITS]


class VersionedEngine(Engine, Protocol):
    """A batcher's engine that says which weights it has."""

    @property
    def version(self) -> str:
        """The version of its model; the same for as long as it lives."""
        ...


class Serving:
    """A batcher's engine that hands every batch to the engine in use.

    Args:
        engine: The first one.

    Attributes:
        engine: The one in use. Replace it only while no request is on its way through the batcher: a request's batches could
            otherwise be answered by two.
    """

    def __init__(self, engine: VersionedEngine) -> None:
        self.engine = engine

    @property
    def lanes(self) -> int:
        """How many batches may run at a time."""
        return self.engine.lanes

    async def up(self) -> None:
        """Return when the engine can take a batch, or was stopped because another has taken its place."""
        await self.engine.up()

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        """Return probabilities ``(B, C)`` for images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``."""
        return await self.engine.classify(images, alone)
