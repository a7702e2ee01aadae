"""The outermost layer: request ids, log lines and what happens when something inside breaks."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.logs import JsonFormatter
from service.metrics import Metrics
from service.request_log import RequestLog
from tests.service.conftest import SharedEngine, serve_in_process
from tests.service.pictures import encode, multipart, noise

ADDRESS = "203.0.113.9"


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["tier"] = "anonymous"
    scope["state"]["images"] = 3
    await PlainTextResponse("fine")(scope, receive, send)


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("secret inner words")


async def broken_halfway(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("secret inner words")


async def get(app: ASGIApp, headers: dict[str, str] | None = None) -> httpx.Response:
    transport = httpx.ASGITransport(RequestLog(app, Metrics()), client=(ADDRESS, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://palisade") as client:
        return await client.get("/", headers=headers)


def request_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The request log as an operator reads it."""
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "palisade.request"]
    assert all("\n" not in line for line in lines)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("offered", ["a", "0f8fad5b-d9cd-469f-a165-70867728950e", "x" * 128, "trace/1.2:3_4+5="])
async def test_an_acceptable_request_id_is_echoed(offered: str) -> None:
    assert (await get(fine, {"X-Request-ID": offered})).headers["X-Request-ID"] == offered


@pytest.mark.parametrize("offered", ["", "x" * 129, "two words", '"quoted"', "<script>", "{}", "a;b", "a\tb", "%0a"])
async def test_another_request_id_is_replaced(offered: str) -> None:
    given = (await get(fine, {"X-Request-ID": offered})).headers["X-Request-ID"]
    assert given != offered
    assert len(given) == 32
    assert given.isalnum()


async def test_every_request_has_an_id_of_its_own() -> None:
    assert len({(await get(fine)).headers["X-Request-ID"] for _ in range(5)}) == 5


async def test_an_error_inside_is_a_500_that_tells_an_id_and_nothing_else() -> None:
    reply = await get(broken, {"X-Request-ID": "mine"})
    assert reply.status_code == 500
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["X-Request-ID"] == "mine"
    assert "mine" in reply.json()["detail"]
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text


async def test_an_error_inside_is_logged_with_its_trace_for_the_operator(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await get(broken, {"X-Request-ID": "mine"})
    trace, line = request_lines(caplog)
    assert "secret inner words" in trace["exception"]
    assert "mine" in trace["message"]
    assert (line["request_id"], line["status"]) == ("mine", 500)


async def test_an_error_after_the_reply_has_begun_is_logged_and_does_not_begin_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(AssertionError):  # httpx: the reply was never completed
        await get(broken_halfway)
    assert "secret inner words" in request_lines(caplog)[0]["exception"]


async def test_an_error_anywhere_in_the_service_is_a_problem_that_tells_an_id_and_nothing_else(engine: SharedEngine) -> None:
    class OneClassTooMany(SharedEngine):
        async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
            return np.eye(11, dtype=np.float32)[[10] * len(images)]  # (B, 11), where the model has 10 labels

    broken = OneClassTooMany(engine._engine)
    async with serve_in_process(broken) as served, served.client() as client:
        headers = {"Content-Type": "image/png", "X-Request-ID": "mine"}
        reply = await client.post("/v1/classify", content=encode(noise(0)), headers=headers)
        assert reply.status_code == 500
        assert reply.headers["X-Request-ID"] == "mine"
        assert "IndexError" not in reply.text
        assert "Traceback" not in reply.text
        assert reply.headers["content-type"] == "application/problem+json"
        assert "mine" in reply.json()["detail"]


async def test_the_log_line_says_what_happened_and_never_to_whom(
    engine: SharedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    files = multipart(encode(noise(0)), encode(noise(1)))
    async with serve_in_process(engine, limits="on") as served, served.client(ADDRESS) as client:
        with caplog.at_level(logging.INFO):
            headers = {"Content-Type": "multipart/form-data; boundary=q7f3a9", "X-Request-ID": "mine"}
            assert (await client.post("/v1/classify?key=secret", content=files, headers=headers)).status_code == 200
            assert (await client.post("/v1/classify", content=b"x", headers={"Content-Type": "text/plain"})).status_code == 415
            assert (await client.get("/nothing/here")).status_code == 404
    good, bad, nowhere = request_lines(caplog)
    assert good["request_id"] == "mine"
    assert good["level"] == "info"
    assert (good["method"], good["route"], good["status"]) == ("POST", "/v1/classify", 200)
    assert (good["images"], good["tier"]) == (2, "anonymous")
    assert good["duration_ms"] > 0
    assert (bad["status"], bad["reason"]) == (415, "unsupported-type")
    assert (nowhere["status"], nowhere["route"]) == (404, "other")
    ours = [record for record in caplog.records if not record.name.startswith("httpx")]
    text = "\n".join(JsonFormatter().format(record) for record in ours)
    assert ADDRESS not in text
    assert "secret" not in text


async def test_probes_do_not_fill_the_log(engine: SharedEngine, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_in_process(engine) as served, served.client() as client:
        with caplog.at_level(logging.INFO):
            await client.get("/healthz")
            await client.get("/readyz")
    assert request_lines(caplog) == []


async def test_no_line_has_pixels_however_the_request_ends(engine: SharedEngine, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SharedEngine):
        async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
            raise RuntimeError("out of memory")

    grey = 0.7345129
    tensor = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [grey] * 3072}
    picture = base64.b64encode(encode(noise(0))).decode()
    bodies: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/classify", {"images": [picture]}, 200),
        ("/v1/classify", {"images": ["unmistakable" * 20]}, 400),
        ("/v2/models/palisade/infer", {"inputs": [tensor]}, 200),
        ("/v2/models/palisade/infer", {"inputs": [{**tensor, "shape": [1, 3, 32, 31]}]}, 422),
        ("/v2/models/palisade/infer", {"inputs": [{**tensor, "data": ["unmistakable"] * 3072}]}, 400),
    ]
    with caplog.at_level(logging.INFO):
        async with serve_in_process(engine) as served, served.client() as client:
            for path, body, status in bodies:
                reply = await client.post(path, json=body)
                assert reply.status_code == status, reply.text
        async with serve_in_process(Broken(engine._engine)) as served, served.client() as client:
            for path, body in (bodies[0][:2], bodies[2][:2]):
                assert (await client.post(path, json=body)).status_code == 503
    lines = [JsonFormatter().format(record) for record in caplog.records if not record.name.startswith("httpx")]
    assert len(lines) >= 7
    words = ["unmistakable", str(grey), picture[:24], picture[-24:]]
    assert [word for word in words if word in "\n".join(lines)] == []
    told = {
        "time",
        "level",
        "logger",
        "message",
        "request_id",
        "method",
        "route",
        "status",
        "duration_ms",
        "tier",
        "images",
        "reason",
    }
    assert all(line.keys() <= told for line in request_lines(caplog))
