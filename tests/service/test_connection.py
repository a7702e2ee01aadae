"""Connections: what a client may send before its request counts as one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from service import connection
from service.connection import MAX_HEAD_BYTES, BoundedConnection


@asynccontextmanager
async def listening() -> AsyncIterator[int]:
    """A server that answers every request with its path; yields its port."""

    async def app(scope: dict, receive: object, send: object) -> None:
        await PlainTextResponse(scope["path"])(scope, receive, send)

    config = uvicorn.Config(app, http=BoundedConnection, lifespan="off", log_config=None, port=0)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup(sockets=[listener])
        yield listener.getsockname()[1]
        server.should_exit = True
        await server.shutdown(sockets=[listener])


async def exchange(port: int, data: bytes) -> bytes:
    """Send data and return all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


def request(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: here", *headers, "", ""]).encode()


async def test_requests_on_one_connection_are_answered() -> None:
    async with listening() as port:
        answer = await exchange(port, request("/one") + request("/two", "Connection: close"))
    assert answer.count(b"200 OK") == 2
    assert b"/one" in answer
    assert b"/two" in answer


@pytest.mark.parametrize("data", [request("/" + "a" * MAX_HEAD_BYTES), request("/", "X: " + "a" * MAX_HEAD_BYTES)])
async def test_a_head_that_is_too_long_is_refused(data: bytes) -> None:
    async with listening() as port:
        answer = await exchange(port, data)
    assert answer.startswith(b"HTTP/1.1 400")


async def test_many_headers_of_few_bytes_are_refused_before_they_end() -> None:
    async with listening() as port:
        answer = await exchange(port, b"GET / HTTP/1.1\r\n" + b"X-Header: 0123456789\r\n" * (MAX_HEAD_BYTES // 18 + 9))
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: he"])
async def test_a_connection_without_a_whole_request_is_closed(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_DEADLINE_S", 0.01)
    async with listening() as port:
        assert await exchange(port, start) == b""
