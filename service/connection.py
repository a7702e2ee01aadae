"""One HTTP connection, with a bound on what a client may send before a request counts as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536
HEAD_DEADLINE_S = 10.0
CONNECTION = "palisade.connection"  # where a request's scope has its connection


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, closed when a request's head is too long or takes too long, and quick to tell that it was lost.

    uvicorn bounds neither, and both happen before a request reaches the application and its limits.

    Attributes:
        when_lost: Called when the connection is lost. Whoever answers a request sets it and takes it back afterwards; the
            alternative, a task that waits for ``http.disconnect`` beside every request, costs as much as decoding an image.
    """

    when_lost: Callable[[], object] | None = None
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_timer()
        super().connection_lost(exc)
        if self.when_lost is not None:
            self.when_lost()

    def on_message_begin(self) -> None:
        """Start counting a request's head."""
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        """Count a piece of the request's target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request on."""
        self._stop_timer()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError(f"the request's head has more than {MAX_HEAD_BYTES} bytes")  # uvicorn answers 400 and closes

    def _expect_head(self) -> None:
        self._stop_timer()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
