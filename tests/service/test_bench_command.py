"""``palisade-serve bench``: the load that it puts on a service, and what it says of it."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.client_cost import Answering, serving
from benchmarks.ports import held_port
from service.cli import main
from service.load.connection import Target
from service.load.measurement import ClosedLoop, OpenLoop, closed_loop
from service.load.report import Report
from service.load.requests import multipart, single_images
from tests.service.conftest import RunningServer
from tests.service.scripted import Answer, Sent, scripted

MODEL = {"input": {"height": 8, "width": 8}}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.commands.bench.DISTINCT_IMAGES", 32)
    monkeypatch.delenv("PALISADE_API_KEY", raising=False)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("protocol", "images"), [("v1", 1), ("v1", 3), ("v2-json", 2), ("v2-binary", 5)])
def test_the_service_counts_what_the_client_counts(
    server: RunningServer, capsys: pytest.CaptureFixture[str], protocol: str, images: int
) -> None:
    before = server.metric("palisade_predictions_total")
    arguments = ["--protocol", protocol, "--images-per-request", str(images), "--connections", "2", "--seconds", "0.5"]
    found = bench(capsys, server.url, *arguments)
    assert found["statuses"] == {"200": found["requests"]}
    assert server.metric("palisade_predictions_total") - before == (found["requests"] + 1) * images  # one to see that it works
    assert 0 <= found["images_per_s"] <= found["requests"] * images / 0.5  # of what was answered within the time
    latency = list(found["latency_ms"].values())
    assert latency == sorted(latency)
    assert (found["loop"], found["distinct_images"]) == ("closed", 32 // images * images)


def test_an_open_loop_sends_as_many_requests_as_its_rate_says(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(capsys, server.url, "--rate", "50", "--seconds", "0.2")
    assert (found["loop"], found["requests"], found["answered"]) == ("open", 10, 10)
    assert found["client_late_ms_p99"] >= 0


def test_refusals_are_counted_apart_and_the_key_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered: list[int] = []

    def answer(sent: Sent) -> Answer:
        if sent.method == "GET":
            return 200, {}, MODEL
        answered.append((200, 429, 503, 500)[len(answered) % 4])
        return answered[-1], {"Retry-After": "1"}, {}

    key = tmp_path / "key"
    key.write_text("palisade_a_b")
    with scripted(answer) as (url, seen):
        arguments = [f"{url}/behind/a/proxy", "--connections", "1", "--seconds", "0.5", "--key-file", str(key)]
        assert main(["bench", "--json", *arguments]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    sent = answered[1:]  # the first one was to see that it works
    assert found["requests"] == len(sent)
    assert found["statuses"] == {str(status): sent.count(status) for status in (200, 429, 500, 503) if status in sent}
    assert found["refused"] == sent.count(429) + sent.count(503)
    assert f"{found['refused']} of {len(sent)} requests were refused" in err
    assert {each.headers["authorization"] for each in seen} == {"Bearer palisade_a_b"}
    assert {each.path for each in seen} == {"/behind/a/proxy/v1/model", "/behind/a/proxy/v1/classify"}


def test_a_service_that_does_not_answer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(lambda sent: (200, {}, MODEL) if sent.method == "GET" else (401, {}, {"detail": "no key"})) as (url, _):
        assert main(["bench", url]) == 1
        assert "no key" in capsys.readouterr().err
    with held_port() as port:
        url = f"http://127.0.0.1:{port}"
        assert main(["bench", url]) == 1
    assert url in capsys.readouterr().err
    assert main(["bench", "ftp://somewhere"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["bench", url, "--rate", "-1"])


def test_a_redirect_is_told_and_the_key_goes_to_nobody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("palisade_a_b")
    with scripted(lambda _: (200, {}, MODEL)) as (other, seen):
        for status in (301, 302, 303, 307, 308):
            moved: Answer = (status, {"Location": f"{other}/v1/model"}, {})
            with scripted(lambda _, moved=moved: moved) as (url, _):  # type: ignore[misc]
                assert main(["bench", url, "--seconds", "0.1", "--key-file", str(key)]) == 1
            assert f"redirect to {other}" in capsys.readouterr().err
        assert seen == []


def test_what_answers_in_another_protocol_is_no_service(capsys: pytest.CaptureFixture[str]) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        done = thread.submit(answer)
        assert main(["bench", f"http://127.0.0.1:{listener.getsockname()[1]}"]) == 1
        done.result()
    assert "not answered as HTTP has it" in capsys.readouterr().err


def test_lost_connections_are_counted_and_opened_again() -> None:
    closed: list[Answering] = []

    class Fickle(Answering):
        def answer(self, body: bytes) -> None:
            if len(closed) < 2:
                closed.append(self)
                assert self.transport is not None
                self.transport.close()
            else:  # in a while: the time is long for the sake of a busy machine
                asyncio.get_running_loop().call_later(0.1, super().answer, body)

    with serving(Fickle) as url:
        seen = closed_loop(url, single_images(2), 2, 2.0)
    assert seen.status.tolist().count(0) == 2
    assert seen.connections == 4
    assert set(seen.status.tolist()) == {0, 200}
    assert np.isinf(seen.latency_ms).sum() == 2
    nobody = closed_loop(url, single_images(1), 1, 0.15)
    assert set(nobody.status.tolist()) == {0}


def test_a_report_counts_what_callers_got() -> None:
    status, late = np.array([200] * 8 + [429, 0]), np.full(10, 1.0)
    latency = np.array([1.0, 2, 3, 4, 5, 6, 7, 80, 900, np.inf])
    opened = Report.of_open(OpenLoop(2.0, np.arange(10) / 5, latency, late, status, status > 0, 3, 1.0, 0), images=5)
    assert (opened.requests, opened.answered, opened.refused, opened.unanswered) == (10, 8, 1, 1)
    assert opened.images_per_s == 8 * 5 / 2
    assert opened.latency_ms == {"p50": 5, "p90": 80, "p95": 80, "p99": 80, "p99.9": 80, "max": 80}
    assert json.loads(json.dumps(opened.to_json()))["client_late_ms_p99"] == 1
    done = np.array([0.5] * 6 + [2.5] * 2 + [1, np.inf])  # two answers came after the time was over
    shut = Report.of_closed(ClosedLoop(2.0, done, latency, status, 3), images=5)
    assert shut.images_per_s == 6 * 5 / 2
    nothing = Report.of_closed(ClosedLoop(2.0, np.array([np.inf]), np.array([np.inf]), np.array([0]), 0), images=1)
    assert set(nothing.latency_ms.values()) == {None}
    assert "1 without an answer" in "\n".join(nothing.lines())


def test_a_multipart_body_holds_its_images() -> None:
    requests = multipart(3, count=2, size=(8, 8))
    assert len(requests.bodies) == 2
    assert all(body.count(b"\x89PNG") == 3 for body in requests.bodies)
    assert len({image for body in requests.bodies for image in body.split(b"\r\n--palisade") if b"PNG" in image}) == 6


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "prefix"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, False, ""),
        ("https://example.org/palisade/", "example.org", 443, True, "/palisade"),
        ("http://[::1]:80", "::1", 80, False, ""),
    ],
)
def test_a_url_says_where_a_service_is(url: str, host: str, port: int, tls: bool, prefix: str) -> None:
    assert Target.parse(url) == Target(host, port, tls, prefix)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "unix:///x", "http://", "http://a?b=c", "http://a:b@c", "http://a:99999"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address of a service|[Pp]ort"):
        Target.parse(url)
