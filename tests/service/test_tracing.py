"""Traces: what spans a request leaves behind, read from OpenTelemetry's own exporters."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `tracing` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from service.tracing import Tracing
from tests.service.conftest import RunningServer, SharedEngine, eventually, serve_in_process
from tests.service.pictures import encode, noise

STEPS = ["identify", "read", "parse", "admit", "decode", "queue", "engine", "protect"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ADDRESS = "203.0.113.9"
GREY = 0.7345129
PNG = encode(noise(0))


class Traced:
    """A tracer, and what it has made."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._exporter))

    def spans(self) -> list[Any]:
        """Finished spans in the order in which they began, a request before its steps."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: (span.start_time, span.parent is not None))

    def request(self) -> Any:
        (span,) = (span for span in self.spans() if span.kind.name == "SERVER")
        return span


@pytest.fixture
def traced() -> Traced:
    return Traced()


async def v1(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await client.post("/v1/classify", content=PNG, headers={"Content-Type": "image/png", **headers})


async def v2(client: httpx.AsyncClient) -> httpx.Response:
    tensor = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [GREY] * 3072}
    return await client.post("/v2/models/palisade/infer", json={"inputs": [tensor]})


@pytest.mark.parametrize("ask", [v1, v2])
async def test_every_step_of_a_request_is_a_span_below_the_request(engine: SharedEngine, traced: Traced, ask: Any) -> None:
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        reply = await ask(client)
    assert reply.status_code == 200
    request, *steps = traced.spans()
    assert [step.name for step in steps] == STEPS
    assert {step.parent.span_id for step in steps} == {request.context.span_id}
    assert {step.context.trace_id for step in steps} == {request.context.trace_id}
    assert request.parent is None
    route = reply.request.url.path
    assert request.name == f"POST {route}"
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": route,
        "http.response.status_code": 200,
        "palisade.request_id": reply.headers["X-Request-ID"],
        "palisade.tier": "anonymous",
        "palisade.images": 1,
    }
    named, _, flags = reply.headers["traceparent"].rpartition("-")
    assert named == f"00-{request.context.trace_id:032x}-{request.context.span_id:016x}"
    assert int(flags, 16) & 1, "it is recorded"
    for earlier, later in itertools.pairwise(steps):
        assert request.start_time <= earlier.start_time <= earlier.end_time <= later.start_time + 1_000_000
    assert all(step.end_time <= request.end_time for step in steps)


async def test_a_pause_between_two_looks_at_the_clocks_does_not_turn_the_steps_round(
    engine: SharedEngine, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = SimpleNamespace(time_ns=time.time_ns, monotonic=lambda: time.monotonic() + 5)
    monkeypatch.setattr("service.tracing.time", clocks)
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        await v1(client)
    request, *steps = traced.spans()
    assert [step.name for step in steps] == STEPS
    assert all(request.start_time <= step.start_time <= step.end_time for step in steps)


async def test_a_caller_s_trace_goes_on(engine: SharedEngine, traced: Traced) -> None:
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        reply = await v1(client, traceparent=f"00-{TRACE}-{PARENT}-01")
    request = traced.request()
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert reply.headers["traceparent"] == f"00-{TRACE}-{request.context.span_id:016x}-01"


async def test_a_trace_that_its_caller_does_not_record_is_not_recorded(engine: SharedEngine, traced: Traced) -> None:
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        reply = await v1(client, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert reply.status_code == 200
    assert traced.spans() == []


@pytest.mark.parametrize("parent", ["", "00", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "\xff" * 60])
async def test_a_bad_traceparent_is_as_none(engine: SharedEngine, traced: Traced, parent: str) -> None:
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        headers: Any = {"Content-Type": "image/png", b"traceparent": parent.encode("latin-1")}
        assert (await client.post("/v1/classify", content=PNG, headers=headers)).status_code == 200
    assert traced.request().parent is None


async def test_a_refused_request_says_where_and_why(engine: SharedEngine, traced: Traced) -> None:
    limits = {"limits": "on", "tier_anonymous_limits": "1/day"}
    async with serve_in_process(engine, traced.tracing, **limits) as served, served.client() as client:
        assert (await v1(client)).status_code == 200
        before = len(traced.spans())
        assert (await v1(client)).status_code == 429
    request, *steps = traced.spans()[before:]
    assert [step.name for step in steps] == ["identify", "read", "parse", "admit"]
    assert dict(steps[-1].attributes) == {"palisade.reason": "quota-exceeded"}
    assert request.attributes["palisade.reason"] == "quota-exceeded"
    assert request.attributes["http.response.status_code"] == 429
    assert request.status.status_code is StatusCode.UNSET, "it is the caller's doing"


async def test_an_answer_given_before_waits_for_no_engine(engine: SharedEngine, traced: Traced) -> None:
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        await v1(client)
        before = len(traced.spans())
        await v1(client)
    assert [span.name for span in traced.spans()[before + 1 :]] == [step for step in STEPS if step != "engine"]


async def test_probes_leave_no_spans_and_other_routes_do(engine: SharedEngine, traced: Traced) -> None:
    async with serve_in_process(engine, traced.tracing) as served, served.client() as client:
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert "traceparent" not in (await client.get(path)).headers
        await client.get("/no/such/place?key=secret")
    (request,) = traced.spans()
    assert request.name == "GET other"
    assert "secret" not in request.to_json()


async def test_spans_have_no_pixels_keys_or_addresses_however_a_request_ends(engine: SharedEngine, traced: Traced) -> None:
    class Broken(SharedEngine):
        async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
            raise RuntimeError(f"cannot multiply {images.ravel()[:4]}")

    for each in (engine, Broken(engine._engine)):
        async with serve_in_process(each, traced.tracing) as served, served.client(ADDRESS) as client:
            await v1(client, **{"X-API-Key": "palisade_unmistakable"})
            await v2(client)
            await client.post("/v1/classify?key=unmistakable", json={"images": ["unmistakable"]})
    assert {span.attributes["http.response.status_code"] for span in traced.spans() if span.kind.name == "SERVER"} >= {200, 503}
    assert any(span.status.status_code is StatusCode.ERROR for span in traced.spans())
    text = "".join(span.to_json() for span in traced.spans())
    words = [ADDRESS, "unmistakable", "multiply", "0.7345", base64.b64encode(PNG).decode()[:24]]
    assert [word for word in words if word in text] == []
    assert all(not span.events for span in traced.spans())


def test_nothing_of_the_sdk_is_imported_when_it_is_off() -> None:
    script = (
        "import sys, json\nfrom service import app, coordinator, frontend, engine_process\nfrom service.commands import run\n"
        "from service.settings import Settings\nassert app.tracing_of(Settings()) is None\n"
        "ours = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print(json.dumps([name for name in sys.modules if name.startswith(ours)]))\n"
        "assert 'service.tracing' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A server that takes spans by OTLP over HTTP; where it is, and the spans."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()
            thread.join()


def test_front_ends_send_the_steps_that_other_processes_take(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with RunningServer(tmp_path, checkpoint=str(checkpoint), frontends="2", tracing="on") as running:
            headers = {"Content-Type": "image/png", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            with running.client() as client:
                assert client.post("/v1/classify", content=PNG, headers=headers).status_code == 200
            eventually(lambda: len(spans) >= 1 + len(STEPS), "the spans arrive")
    (request,) = (span for span in spans if span.name == "POST /v1/classify")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    steps = sorted((span for span in spans if span is not request), key=lambda span: span.start_time_unix_nano)
    assert [step.name for step in steps] == STEPS
    assert {step.parent_span_id for step in steps} == {request.span_id}
    for step in steps:
        assert request.start_time_unix_nano <= step.start_time_unix_nano <= step.end_time_unix_nano
        assert step.end_time_unix_nano <= request.end_time_unix_nano
