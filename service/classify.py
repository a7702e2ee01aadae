"""``POST /v1/classify``: one request's way, from its body to its protected answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.admission import Admission, caller_of
from service.answers import AnswerCache, digest
from service.batcher import Batcher, Places
from service.body import Body, BodyReader, split_images
from service.decode import Decoder
from service.metrics import Metrics
from service.policy import Policy
from service.problems import Problem, deadline_passed
from service.quota import rate_limit_headers

T = TypeVar("T")

INLINE_BYTES = 65_536
"""Bodies up to this size are taken apart on the event loop: quicker than handing them to a thread."""


@dataclass(frozen=True)
class Classifier:
    """The parts that a request passes, in this order.

    Attributes:
        reader: Reads the body within limits.
        max_images: Most images in one request.
        admission: Holds queue places and charges quota.
        decoder: Turns encoded images into the model's pixels.
        decode_pool: Threads that decode.
        answers: Answers given before.
        batcher: Leads to the engine.
        policy: What of the answer leaves.
        labels: Class names.
        version: The model's version.
        deadline_s: How long a request may take to reach the engine.
        metrics: Counts.
    """

    reader: BodyReader
    max_images: int
    admission: Admission
    decoder: Decoder
    decode_pool: ThreadPoolExecutor
    answers: AnswerCache
    batcher: Batcher
    policy: Policy
    labels: tuple[str, ...]
    version: str
    deadline_s: float
    metrics: Metrics

    async def classify(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            Problem: See docs/http-api.md for every status.
            ClientDisconnect: The client has gone.
        """
        deadline = asyncio.get_running_loop().time() + self.deadline_s
        caller = caller_of(request.client.host if request.client else None)
        request.scope["state"]["tier"] = self.policy.tier
        body = await self.reader.read(request)
        try:
            encoded = await self._split(request.headers.get("content-type", ""), body)
            request.scope["state"]["images"] = len(encoded)
            with self.admission.admit(caller, len(encoded)) as places:
                rows = await _unless_client_goes(request, self._probabilities(encoded, places, deadline))  # (N, C)
        except Problem as problem:
            problem.headers = {**rate_limit_headers(self.admission.levels(caller)), **problem.headers}
            raise
        finally:
            body.close()
        predictions = self.policy.protect(rows, self.labels)
        self.metrics.answered(prediction["label"] for prediction in predictions)
        answer = {
            "id": request.scope["state"]["request_id"],
            "model": "palisade",
            "version": self.version,
            "predictions": predictions,
        }
        headers = rate_limit_headers(self.admission.levels(caller))
        return Response(orjson.dumps(answer), headers=headers, media_type="application/json")

    def describe(self, request: Request) -> dict[str, Any]:
        """Return what a caller may know of the model, its policy and its quota."""
        caller = caller_of(request.client.host if request.client else None)
        return {
            "name": "palisade",
            "version": self.version,
            "labels": list(self.labels),
            "input": {"height": self.decoder.height, "width": self.decoder.width},
            "policy": self.policy.describe(),
            "quota": [
                {
                    "window": level.window.name,
                    "limit": level.window.quota,
                    "remaining": level.remaining,
                    "reset_s": round(level.reset_s),
                }
                for level in self.admission.levels(caller)
            ],
        }

    async def _split(self, content_type: str, body: Body) -> list[bytes]:
        data = body.take()
        if len(data) <= INLINE_BYTES:
            return split_images(content_type, data, self.max_images)
        # Taking megabytes of hostile multipart apart can take seconds, in which others must be answered.
        return await asyncio.to_thread(split_images, content_type, data, self.max_images)

    async def _probabilities(self, encoded: list[bytes], places: Places, deadline: float) -> np.ndarray:
        """Decode, look up, queue what is new, and return exact probabilities ``(N, C)``."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        gone = threading.Event()  # stops a decoding that nobody waits for
        try:
            async with asyncio.timeout_at(deadline):
                decoding = loop.run_in_executor(self.decode_pool, self.decoder.decode_all, encoded, gone.is_set)
                images = await decoding  # (N, 3, H, W) uint8
        except TimeoutError:
            raise deadline_passed() from None
        finally:
            gone.set()
        self.metrics.decode.observe(time.perf_counter() - started)
        keys = [digest(image) for image in images]
        known = [self.answers.get(key) for key in keys]
        new = [index for index, row in enumerate(known) if row is None]
        if new:
            fresh = await self.batcher.submit(images[new], places, deadline)
            for index, row in zip(new, fresh, strict=True):
                known[index] = self.answers.keep(keys[index], row)
        return np.stack([row for row in known if row is not None])


async def _unless_client_goes(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the work's result, or cancel it and raise ``ClientDisconnect`` when the client closes the connection."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body is read, so the next event is the disconnect
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
