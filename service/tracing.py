"""Tracing: a span for every step of a request's way, by OpenTelemetry. Imported only when it is on."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.identity import Caller
from service.pipeline import Admitted, Answered, Parcel, Pipeline
from service.problems import Problem

PROPAGATOR = TraceContextTextMapPropagator()
PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


class Tracing:
    """Puts spans around the parts of a service. Never pixels, keys or addresses are in them.

    Args:
        processor: What becomes of finished spans; by default they are sent where OpenTelemetry's own variables say.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "palisade")})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer: Tracer = provider.get_tracer("palisade")

    def asgi(self, app: ASGIApp) -> ASGIApp:
        """Return an application whose requests are spans, children of the caller's ``traceparent`` if it sent one."""
        return _TracedRequests(app, self._tracer)

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        """Return a pipeline whose steps are spans."""
        parts: dict[str, Any] = {field.name: getattr(pipeline, field.name) for field in fields(pipeline)}
        parts["reader"] = _Traced(pipeline.reader, self._tracer, {"read": "read"})
        parts["scheduler"] = _TracedScheduler(pipeline.scheduler, self._tracer, {"admit": "admit"})
        parts["policies"] = {
            tier: _Traced(policy, self._tracer, {"protect": "protect"}) for tier, policy in pipeline.policies.items()
        }
        return _TracedPipeline(**parts, tracer=self._tracer)


class _TracedRequests:
    """ASGI middleware outside of everything else."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        parent = PROPAGATOR.extract({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        # The SDK would write exceptions down word for word, and they may quote what a caller sent.
        with self._tracer.start_as_current_span(
            scope["method"], parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:

            async def send_with_parent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                    carrier: dict[str, str] = {}
                    PROPAGATOR.inject(carrier)
                    ours = [(name.encode(), value.encode()) for name, value in carrier.items() if name == "traceparent"]
                    message["headers"] = [*message.get("headers", ()), *ours]
                await send(message)

            try:
                await self._app(scope, receive, send_with_parent)
            finally:
                _describe(span, scope)


def _describe(span: Span, scope: Scope) -> None:
    """Give a request's span its name and what the log line says of it."""
    state = scope.get("state", {})
    route = state.get("route") or getattr(scope.get("route"), "path", "other")
    span.update_name(f"{scope['method']} {route}")
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.route", route)
    for name in ("request_id", "tier", "images", "reason"):
        if name in state:
            span.set_attribute(f"palisade.{name}", state[name])


@contextmanager
def _step(tracer: Tracer, name: str) -> Iterator[None]:
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except Problem as problem:
            span.set_attribute("palisade.reason", problem.reason)
            raise
        except Exception:
            span.set_status(StatusCode.ERROR)
            raise


class _Traced:
    """An object like another one, with spans around some of its methods.

    Args:
        inner: The other one.
        tracer: Makes the spans.
        steps: The spans' names, by method.
    """

    def __init__(self, inner: Any, tracer: Tracer, steps: Mapping[str, str]) -> None:
        self._inner = inner
        self._tracer = tracer
        for method, name in steps.items():
            setattr(self, method, _traced(getattr(inner, method), tracer, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _TracedScheduler(_Traced):
    """A scheduler whose answers are two spans, though another process may have taken these steps."""

    async def answer(self, ticket: Admitted, images: np.ndarray, deadline: float) -> Any:
        started = time.time_ns()
        try:
            return await self._inner.answer(ticket, images, deadline)
        finally:
            ended = time.time_ns()
            left = ended if ticket.left_queue is None else ended - round(1e9 * (time.monotonic() - ticket.left_queue))
            left = max(started, left)  # the two clocks are not read in the same moment
            self._tracer.start_span("queue", start_time=started).end(left)
            if ticket.left_queue is not None:
                self._tracer.start_span("engine", start_time=left).end(ended)


def _traced(function: Callable[..., Any], tracer: Tracer, name: str) -> Callable[..., Any]:
    async def later(*arguments: Any) -> Any:
        with _step(tracer, name):
            return await function(*arguments)

    def now(*arguments: Any) -> Any:
        with _step(tracer, name):
            return function(*arguments)

    return later if inspect.iscoroutinefunction(function) else now


@dataclass(frozen=True)
class _TracedPipeline(Pipeline):
    """A pipeline with spans around the steps that no part of it takes alone."""

    tracer: Tracer

    def identify(self, request: Request) -> Caller:
        with _step(self.tracer, "identify"):
            return super().identify(request)

    async def run(
        self,
        request: Request,
        parse: Callable[[bytearray], Parcel],
        version: str | None = None,
        text_bytes: int | None = None,
    ) -> Answered:
        return await super().run(request, _traced(parse, self.tracer, "parse"), version, text_bytes)

    async def _decode(self, parcel: Parcel, deadline: float) -> np.ndarray:
        with _step(self.tracer, "decode"):
            return await super()._decode(parcel, deadline)
