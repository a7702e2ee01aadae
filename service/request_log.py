"""The outermost layer: gives every request an id, a log line, a duration and a count, whatever happens inside."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.connection import CONNECTION, BoundedConnection
from service.metrics import Metrics
from service.problems import internal

log = logging.getLogger("palisade.request")

ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
CLIENT_GONE = 499
"""The status of a request whose client closed the connection; nobody reads it but the operator."""


class RequestLog:
    """Pure ASGI middleware: ``X-Request-ID`` in and out, one JSON log line and the request metrics.

    Inner layers put what they know (``images``, ``tier``, ``reason``) into ``scope["state"]``. When the client closes the
    connection, whatever works on its request is cancelled.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        header = (b"x-request-id", request_id.encode())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        connection: BoundedConnection | None = scope.get(CONNECTION)
        task = asyncio.current_task()
        assert task is not None
        lost = False

        def give_up() -> None:
            nonlocal lost
            lost = True
            task.cancel()

        if connection is not None:
            connection.when_lost = give_up
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not lost:  # the server stops
                raise
            task.uncancel()
            state["reason"], status = "client-gone", status or CLIENT_GONE
        except Exception:
            log.exception("request %s failed", request_id)
            if status == 0:
                await internal(request_id).response()(scope, receive, send_with_id)
        finally:
            if connection is not None:
                connection.when_lost = None
        self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = state.get("route") or getattr(scope.get("route"), "path", "other")
        self._metrics.request_over(route, status, seconds, state.get("reason"))
        level = logging.DEBUG if route in ("/healthz", "/readyz") else logging.INFO
        if not log.isEnabledFor(level):
            return
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(1000 * seconds, 3),
            **{name: state[name] for name in ("tier", "images", "reason") if name in state},
        }
        log.log(level, "request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    """Return the caller's own id for the request if it is one that can be logged, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if ACCEPTABLE_ID.fullmatch(value) else uuid.uuid4().hex
    return uuid.uuid4().hex
