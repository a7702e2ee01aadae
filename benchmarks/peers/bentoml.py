"""Peer: BentoML with its adaptive batching, the PNG file as base64 in JSON; one worker, which computes on all cores.

BentoML chooses the delay itself; ``max_latency_ms`` is the age at which it refuses requests. Files in multipart bodies and two
workers with a thread each are no faster on two cores; a service of its own in front of the model costs twice as much.
"""

from __future__ import annotations

import base64
from typing import Any

import bentoml

from benchmarks.peers.classifier import MAX_BATCH_SIZE, Classifier


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Mixture:
    """The model."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=10_000)
    def classify(self, images: list[str]) -> list[dict[str, Any]]:
        """Answer a batch that BentoML has put together."""
        return self.classifier.answers([base64.b64decode(image) for image in images])
