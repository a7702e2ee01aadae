"""``POST /v1/classify`` and ``GET /v1/model``: the plain protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.body import split_images
from service.decode import Decoder, is_small_png
from service.pipeline import Pipeline
from service.policy import Protected

MODEL_NAME = "palisade"


@dataclass(frozen=True)
class EncodedImages:
    """The images of a v1 body."""

    encoded: list[bytes]
    deadline_s: float | None = None

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.encoded)

    def is_cheap(self) -> bool:
        """Tell whether there is one image and it is a small PNG."""
        return len(self.encoded) == 1 and is_small_png(self.encoded[0])

    def decode(self, decoder: Decoder, expired: Callable[[], bool]) -> np.ndarray:
        """Return ``(N, 3, H, W)`` uint8."""
        return decoder.decode_all(self.encoded, expired)


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
            request, lambda data: EncodedImages(split_images(content_type, data, self.max_images))
        )
        answer = {
            "id": request.scope["state"]["request_id"],
            "model": MODEL_NAME,
            "version": self.pipeline.version,
            "predictions": predictions_of(answered.protected, self.pipeline.labels),
        }
        return Response(orjson.dumps(answer), headers=answered.headers, media_type="application/json")

    async def describe(self, request: Request) -> dict[str, Any]:
        """Return what a caller may know of the model, its policy and its quota."""
        pipeline = self.pipeline
        caller = pipeline.identify(request)
        return {
            "name": MODEL_NAME,
            "version": pipeline.version,
            "labels": list(pipeline.labels),
            "input": {"height": pipeline.decoder.height, "width": pipeline.decoder.width},
            "policy": pipeline.policies[caller.tier].describe(),
            "quota": [
                {
                    "window": level.window.name,
                    "limit": level.window.quota,
                    "remaining": level.remaining,
                    "reset_s": round(level.reset_s),
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
    return predictions
