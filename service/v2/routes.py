"""Routes: everything under ``/v2``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response

from service.classify import MODEL_NAME
from service.metrics import FOLDER
from service.pipeline import Pipeline
from service.problems import Problem, no_such_version
from service.v2.compression import UnpackedRequest, pack
from service.v2.fields import shown
from service.v2.metadata import ModelCard, configuration, describe_model, describe_server
from service.v2.reply import HEADER_LENGTH, render_infer
from service.v2.request import InferLimits, InferRequest, parse_infer, text_bytes
from service.v2.statistics import statistics

Handler = Callable[[Request], Awaitable[Response]]

MODEL = "/v2/models/{model}"
VERSION = "/v2/models/{model}/versions/{version}"
KEPT_S = 1.0


class Counted:
    """The statistics, read on a thread and once for all who ask meanwhile.

    Where several processes count, reading means the files of every process that there has been, so it is kept for
    ``KEPT_S``: whoever asks without end must not keep others waiting.

    Args:
        registry: The service's metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._kept_s = KEPT_S if FOLDER in os.environ else 0.0
        self._reading: asyncio.Future[dict[str, Any]] | None = None
        self._version = ""
        self._until = 0.0

    async def of(self, version: str) -> dict[str, Any]:
        """Return the body of ``GET /v2/models/{model}/stats`` for the model's version."""
        reading = self._reading
        if reading is None or version != self._version or (reading.done() and time.monotonic() >= self._until):
            self._version = version
            reading = self._reading = asyncio.ensure_future(asyncio.to_thread(self._read, version))
        return await asyncio.shield(reading)  # others may wait for it, too

    def _read(self, version: str) -> dict[str, Any]:
        counted = statistics(self._registry, version)
        self._until = time.monotonic() + self._kept_s
        return counted


@dataclass(frozen=True)
class InferRoutes:
    """Answers requests under ``/v2``.

    Attributes:
        pipeline: Returns the way that requests take; raises ``Problem`` 503 while there is none.
        check_ready: Raises ``Problem`` 503 when the service is not ready or about to stop.
        max_images: Most images in one request.
        max_queue_delay_us: How long a batch may wait for more images, in microseconds.
        registry: The service's metrics.
        certified: Whether the model has certificates.
    """

    pipeline: Callable[[], Pipeline]
    check_ready: Callable[[], None]
    max_images: int
    max_queue_delay_us: int
    registry: CollectorRegistry
    certified: bool

    def table(self) -> list[tuple[str, str, Handler]]:
        """Return every route: its method, its path and what answers it. The handlers raise ``Problem``."""
        model_routes: list[tuple[str, str, Handler]] = [
            ("GET", "", self.describe),
            ("GET", "/ready", self.model_ready),
            ("GET", "/config", self.configure),
            ("GET", "/stats", self.stats),
            ("POST", "/infer", self.infer),
        ]
        return [
            ("GET", "/v2", self.server),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("GET", "/v2/models", self.models),
            *((method, base + path, handler) for base in (MODEL, VERSION) for method, path, handler in model_routes),
        ]

    async def infer(self, request: Request) -> Response:
        """Classify the images of one request.

        Raises:
            Problem: See docs/http-api.md for every status.
        """
        pipeline = self._pipeline_for(request)
        limits = InferLimits(pipeline.decoder.height, pipeline.decoder.width, self.max_images, self.certified)
        lengths = request.headers.getlist(HEADER_LENGTH)
        header_length = ",".join(lengths) if lengths else None
        parsed: list[InferRequest] = []

        def parse(data: bytearray) -> InferRequest:
            infer = parse_infer(data, header_length, limits)
            parsed.append(infer)
            return infer

        version = request.path_params.get("version")
        answered = await pipeline.run(UnpackedRequest(request), parse, version, text_bytes(header_length))
        body, headers = render_infer(parsed[0], answered.protected, pipeline.labels, answered.version)
        body, encoding = pack(body, request.headers)
        return Response(body, headers={**answered.headers, **headers, **encoding})

    async def server(self, request: Request) -> Response:
        """Describe the service."""
        del request
        return _json(describe_server())

    async def live(self, request: Request) -> Response:
        """Say that the process is alive."""
        del request
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Say that requests are accepted; raises ``Problem`` 503 when they are not."""
        del request
        self.check_ready()
        return _json({"ready": True})

    async def models(self, request: Request) -> Response:
        """List the models: there is one."""
        del request
        return _json({"models": [MODEL_NAME]})

    async def model_ready(self, request: Request) -> Response:
        """Say that the model answers; raises ``Problem`` 404 for another model and 503 when it is not ready."""
        self.check_ready()
        self._pipeline_for(request)
        return _json({"name": MODEL_NAME, "ready": True})

    async def describe(self, request: Request) -> Response:
        """Describe the model's inputs and outputs, as far as the caller's policy shows them."""
        return _json(describe_model(await self._card(request)))

    async def configure(self, request: Request) -> Response:
        """Return the model's configuration, as far as the caller's policy shows it."""
        return _json(configuration(await self._card(request)))

    async def stats(self, request: Request) -> Response:
        """Return what was counted so far."""
        pipeline = self._pipeline_for(request)
        pipeline.identify(request)
        return _json(await self._counted.of(pipeline.version))

    @cached_property
    def _counted(self) -> Counted:
        return Counted(self.registry)

    def _pipeline_for(self, request: Request) -> Pipeline:
        """Return the way of requests for the model and version in a request's path; raises ``Problem`` 404 or 503."""
        pipeline = self.pipeline()
        model: str = request.path_params["model"]
        version: str = request.path_params.get("version", pipeline.version)
        if model != MODEL_NAME:
            raise Problem(404, f"there is no model {shown(model)}; this service has '{MODEL_NAME}'", "not-found")
        if version != pipeline.version:
            raise no_such_version(shown(version), pipeline.version)
        return pipeline

    async def _card(self, request: Request) -> ModelCard:
        pipeline = self._pipeline_for(request)
        policy = await pipeline.policy_of(pipeline.identify(request))  # a suspect's is not its tier's
        return ModelCard(
            version=pipeline.version,
            classes=len(pipeline.labels),
            height=pipeline.decoder.height,
            width=pipeline.decoder.width,
            max_images=self.max_images,
            max_queue_delay_us=self.max_queue_delay_us,
            label_only=policy.label_only,
            certified=self.certified and policy.shows_certificates,
        )


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
