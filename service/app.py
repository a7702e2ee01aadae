"""Wiring: builds the parts from the settings and puts them behind their routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from model.checkpoint import Header
from service import openapi
from service.body import BodyReader
from service.classify import MODEL_NAME, Classifier
from service.decode import Decoder
from service.identity import Identifier
from service.keys import KeyStore
from service.metrics import Metrics
from service.page import page_routes
from service.pipeline import Pipeline
from service.problems import Problem, draining, internal
from service.remote import RemoteScheduler
from service.request_log import RequestLog
from service.scheduler import Scheduler
from service.settings import Settings
from service.v2.reply import problem_response
from service.v2.routes import InferRoutes

if TYPE_CHECKING:
    from service.tracing import Tracing


class Service:
    """One running instance: the ASGI application and what stops it cleanly.

    Args:
        settings: Limits, tiers, keys.
        header: Of the checkpoint that the scheduler's engine runs.
        scheduler: Queue, quotas and the way to the engine; started and stopped with the application.
        metrics: Counts.
        tracing: Puts spans around every step; ``None`` costs nothing.

    Attributes:
        asgi: What the HTTP server runs.
    """

    def __init__(
        self,
        settings: Settings,
        header: Header,
        scheduler: Scheduler | RemoteScheduler,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings = settings
        self._header = header
        self._scheduler = scheduler
        self._metrics = metrics
        self._tracing = tracing
        self._pipeline: Pipeline | None = None
        self._stopping = False
        app = FastAPIOffline(redoc_url=None, lifespan=self._lifespan, **openapi.DESCRIPTION)
        app.get("/healthz", **openapi.HEALTHZ)(self._healthz)
        app.get("/readyz", **openapi.READYZ)(self._readyz)
        app.get("/v1/model", **openapi.MODEL)(self._model)
        app.post("/v1/classify", **openapi.CLASSIFY)(self._classify)
        delay_us = round(1000 * settings.max_queue_delay_ms)
        certified, most = self._header.is_certified, settings.max_images_per_request  # a reload changes neither
        infer = InferRoutes(self._ready, self._check_ready, most, delay_us, metrics.collected, certified)
        for method, path, handler in infer.table():
            app.add_api_route(path, handler, methods=[method], **openapi.v2(method, path))
        app.router.routes.extend(page_routes())
        app.add_exception_handler(Problem, _answer_problem)
        app.add_exception_handler(HTTPException, _answer_http_exception)
        app.add_exception_handler(ClientDisconnect, _answer_nobody)
        app.add_exception_handler(Exception, _answer_bug)
        busiest = {"/v1/classify": self._classify, f"/v2/models/{MODEL_NAME}/infer": infer.infer}
        self.asgi: ASGIApp = RequestLog(_Direct(app, busiest), metrics)
        if tracing is not None:
            self.asgi = tracing.asgi(self.asgi)

    def turn_unready(self) -> None:
        """Fail the readiness probe from now on; requests that still arrive are answered."""
        self._stopping = True
        self._scheduler.turn_unready()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(self._settings.decode_threads, thread_name_prefix="decode") as decode_pool:
            await self._scheduler.start()
            self._pipeline = self._build_pipeline(decode_pool)
            try:
                yield
                await self._scheduler.drain()
            finally:
                self.turn_unready()
                self._pipeline = None
                self._scheduler.stop()

    def _build_pipeline(self, decode_pool: ThreadPoolExecutor) -> Pipeline:
        settings, architecture = self._settings, self._header.architecture
        policies = settings.policies()
        if not self._header.is_certified:
            policies = {tier: replace(policy, certificate=False) for tier, policy in policies.items()}
        keys = KeyStore(Path(settings.keys_file)) if settings.keys_file else None
        pipeline = Pipeline(
            identifier=Identifier(keys, settings.anonymous == "on", settings.trusted_proxies, settings.forwarded_header),
            reader=BodyReader(settings.max_body_bytes, settings.max_in_flight_bytes, settings.body_deadline_ms / 1000),
            scheduler=self._scheduler,
            decoder=Decoder(architecture.height, architecture.input_width, settings.max_image_bytes, settings.max_image_pixels),
            decode_pool=decode_pool,
            policies=policies,
            labels=self._header.class_names,
            deadline_s=settings.request_deadline_ms / 1000,
            metrics=self._metrics,
            voters=architecture.num_experts if architecture.votes else 0,
        )
        return pipeline if self._tracing is None else self._tracing.pipeline(pipeline)

    def _ready(self) -> Pipeline:
        if self._pipeline is None:
            raise draining()
        return self._pipeline

    def _check_ready(self) -> None:
        self._ready()
        if self._stopping:
            raise draining()
        self._scheduler.check_up()

    async def _classify(self, request: Request) -> Response:
        return await Classifier(self._ready(), self._settings.max_images_per_request).classify(request)

    async def _model(self, request: Request) -> dict[str, Any]:
        return await Classifier(self._ready(), self._settings.max_images_per_request).describe(request)

    async def _healthz(self) -> dict[str, str]:
        return {"status": "alive"}

    async def _readyz(self) -> dict[str, str]:
        self._check_ready()
        return {"status": "ready"}


def tracing_of(settings: Settings) -> Tracing | None:
    """Return what puts spans around a service, if the settings say so.

    Raises:
        RuntimeError: They do, and OpenTelemetry is not installed.
    """
    if settings.tracing == "off":
        return None
    try:
        from service.tracing import Tracing
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"PALISADE_TRACING=on needs the extra `tracing`: pip install 'palisade[tracing]' ({error})"
        ) from error
    return Tracing()


class _Direct:
    """Answers the busiest routes without the framework, whose way to a handler costs more than reading a small image."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Callable[[Request], Awaitable[Response]]]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["route"] = scope["path"]
        scope["path_params"] = {"model": MODEL_NAME}
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Problem as problem:
            response = await _answer_problem(request, problem)
        except ClientDisconnect as error:
            response = await _answer_nobody(request, error)
        except Exception as error:
            await (await _answer_bug(request, error))(scope, receive, send)
            raise
        await response(scope, receive, send)


async def _answer_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    request.scope["state"]["reason"] = problem.reason
    return problem_response(problem) if _is_v2(request) else problem.response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    problem = Problem(error.status_code, detail, f"http-{error.status_code}", dict(error.headers or {}))
    return problem_response(problem) if _is_v2(request) else problem.response()


async def _answer_bug(request: Request, error: Exception) -> Response:
    """Answer what nobody foresaw; the error goes on to the request log."""
    del error
    request.scope["state"]["reason"] = "internal"
    problem = internal(request.scope["state"]["request_id"])
    return problem_response(problem) if _is_v2(request) else problem.response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """Give a closed connection a status for the log; nobody reads it."""
    del error
    request.scope["state"]["reason"] = "client-gone"
    return Response(status_code=499)


def _is_v2(request: Request) -> bool:
    path: str = request.scope["path"]
    return path == "/v2" or path.startswith("/v2/")
