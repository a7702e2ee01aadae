"""Wiring: builds the parts from the settings and puts them behind their routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service import openapi
from service.admission import Admission
from service.answers import AnswerCache
from service.batcher import Batcher
from service.body import BodyReader
from service.classify import Classifier
from service.decode import Decoder
from service.engine import Engine
from service.metrics import Metrics
from service.policy import Policy
from service.problems import Problem, draining, internal
from service.quota import Limiter
from service.request_log import RequestLog
from service.settings import Settings


class Service:
    """One running instance: the ASGI application and what stops it cleanly.

    Attributes:
        asgi: What the HTTP server runs.
    """

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._classifier: Classifier | None = None
        self._stopping = False
        app = FastAPIOffline(redoc_url=None, lifespan=self._lifespan, **openapi.DESCRIPTION)
        app.get("/healthz", **openapi.HEALTHZ)(self._healthz)
        app.get("/readyz", **openapi.READYZ)(self._readyz)
        app.get("/v1/model", **openapi.MODEL)(self._model)
        app.post("/v1/classify", **openapi.CLASSIFY)(self._classify)
        app.add_exception_handler(Problem, _answer_problem)
        app.add_exception_handler(HTTPException, _answer_http_exception)
        app.add_exception_handler(ClientDisconnect, _answer_nobody)
        app.add_exception_handler(Exception, _answer_bug)
        self.asgi = RequestLog(app, metrics)

    def turn_unready(self) -> None:
        """Fail the readiness probe from now on; requests that still arrive are answered."""
        self._stopping = True
        self._metrics.ready.set(0)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        settings = self._settings
        batcher = Batcher(
            self._engine.classify,
            settings.max_batch_size,
            settings.max_queue_delay_ms / 1000,
            settings.max_queue_images,
            self._metrics,
        )
        self._metrics.queue_images.set_function(lambda: batcher.queued_images)
        runner = asyncio.create_task(batcher.run())
        runner.add_done_callback(lambda _: self.turn_unready())
        with ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode") as decode_pool:
            self._classifier = self._build_classifier(batcher, decode_pool)
            self._metrics.ready.set(1)
            try:
                yield
                await batcher.drain()
            finally:
                self.turn_unready()
                self._classifier = None
                runner.cancel()
        self._engine.close()

    def _build_classifier(self, batcher: Batcher, decode_pool: ThreadPoolExecutor) -> Classifier:
        settings, header = self._settings, self._engine.header
        policy = Policy(
            "anonymous",
            settings.tier_anonymous_decimals,
            settings.tier_anonymous_top_n,
            settings.tier_anonymous_label_only,
        )
        limiter = None
        if settings.limits == "on":
            limiter = Limiter(settings.tier_anonymous_limits, settings.limiter_max_callers, time.monotonic)
        return Classifier(
            reader=BodyReader(settings.max_body_bytes, settings.max_in_flight_bytes, settings.body_deadline_ms / 1000),
            max_images=settings.max_images_per_request,
            admission=Admission(batcher, limiter, policy, self._metrics),
            decoder=Decoder(
                header.architecture.height,
                header.architecture.input_width,
                settings.max_image_bytes,
                settings.max_image_pixels,
            ),
            decode_pool=decode_pool,
            answers=AnswerCache(settings.answer_cache_images),
            batcher=batcher,
            policy=policy,
            labels=header.class_names,
            version=self._engine.version,
            deadline_s=settings.request_deadline_ms / 1000,
            metrics=self._metrics,
        )

    def _ready(self) -> Classifier:
        if self._classifier is None:
            raise draining()
        return self._classifier

    async def _classify(self, request: Request) -> Response:
        return await self._ready().classify(request)

    async def _model(self, request: Request) -> dict[str, Any]:
        return self._ready().describe(request)

    async def _healthz(self) -> dict[str, str]:
        return {"status": "alive"}

    async def _readyz(self) -> dict[str, str]:
        self._ready()
        if self._stopping:
            raise draining()
        return {"status": "ready"}


async def _answer_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    request.scope["state"]["reason"] = problem.reason
    return problem.response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return Problem(error.status_code, detail, f"http-{error.status_code}", dict(error.headers or {})).response()


async def _answer_bug(request: Request, error: Exception) -> Response:
    """Answer what nobody foresaw; the error goes on to the request log."""
    del error
    request.scope["state"]["reason"] = "internal"
    return internal(request.scope["state"]["request_id"]).response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """Give a closed connection a status for the log; nobody reads it."""
    del error
    request.scope["state"]["reason"] = "client-gone"
    return Response(status_code=499)
