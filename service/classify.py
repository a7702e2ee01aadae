"""``POST /v1/classify`` and ``GET /v1/model``: the plain protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.body import is_one_image, split_images
from service.decode import Decoder, is_small_png
from service.pipeline import Pipeline
from service.policy import Policy, Protected

MODEL_NAME = "palisade"


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of any size.

    Attributes:
        encoded: The files, or what ``unpack`` makes files of.
        deadline_s: How long the caller wants to wait, if it said so.
        unpack: Makes a file, given its number from 1 and what is in ``encoded``; slow, so that it waits for ``decode``.
    """

    encoded: list[bytes]
    deadline_s: float | None = None
    unpack: Callable[[int, bytes], bytes] | None = None

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.encoded)

    def check(self, policy: Policy) -> None:
        """Allow it: v1 shows what the policy lets out and asks for nothing else."""

    def is_cheap(self) -> bool:
        """Tell whether there is one image and it is a small PNG."""
        return len(self.encoded) == 1 and self.unpack is None and is_small_png(self.encoded[0])

    def decode(self, decoder: Decoder, expired: Callable[[], bool]) -> np.ndarray:
        """Return ``(N, 3, H, W)`` uint8."""
        encoded = self.encoded
        if self.unpack:
            encoded = [self.unpack(number, data) for number, data in enumerate(encoded, 1)]
        return decoder.decode_all(encoded, expired)


@dataclass(frozen=True)
class Classifier:
    """Reads v1 requests and writes v1 answers.

    Attributes:
        pipeline: The way in between.
        max_images: Most images in one request.
    """

    pipeline: Pipeline
    max_images: int

    async def classify(self, request: Request) -> Response:
        """Answer one request; raises what :meth:`Pipeline.run` raises."""
        content_type = request.headers.get("content-type", "")
        answered = await self.pipeline.run(
            request,
            lambda data: EncodedImages(split_images(content_type, data, self.max_images)),
            text_bytes=0 if is_one_image(content_type) else None,
        )
        answer = {
            "id": request.scope["state"]["request_id"],
            "model": MODEL_NAME,
            "version": answered.version,
            "predictions": predictions_of(answered.protected, self.pipeline.labels),
        }
        return Response(orjson.dumps(answer), headers=answered.headers, media_type="application/json")

    async def describe(self, request: Request) -> dict[str, Any]:
        """Return what a caller may know of the model, its policy and its quota."""
        pipeline = self.pipeline
        caller = pipeline.identify(request)
        policy = await pipeline.policy_of(caller)
        certified = pipeline.voters and policy.shows_certificates
        return {
            "name": MODEL_NAME,
            "version": pipeline.version,
            "labels": list(pipeline.labels),
            "input": {"height": pipeline.decoder.height, "width": pipeline.decoder.width},
            "policy": policy.describe(),
            **({"certificate": {"partitions": pipeline.voters}} if certified else {}),
            "quota": [
                {
                    "window": level.window.name,
                    "limit": level.window.quota,
                    "remaining": level.remaining,
                    "reset_s": None if level.reset_s is None else max(0, math.ceil(level.reset_s)),
                }
                for level in await pipeline.quota_of(caller)
            ],
        }


def predictions_of(protected: Protected, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return one v1 prediction per image."""
    best: list[int] = protected.best.tolist()
    predictions: list[dict[str, Any]] = [{"label": labels[index], "index": index} for index in best]
    if protected.scores is None or protected.shown is None:
        return predictions
    rows, shown = protected.scores.tolist(), protected.shown.tolist()
    for prediction, index, row, order in zip(predictions, best, rows, shown, strict=True):
        prediction["confidence"] = row[index]
        prediction["scores"] = {labels[i]: row[i] for i in order}
    if protected.tolerated is not None:
        for prediction, tolerated in zip(predictions, protected.tolerated.tolist(), strict=True):
            prediction["certificate"] = {"tolerated_partitions": tolerated}
    return predictions
