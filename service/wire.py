"""Small messages between the processes of one service: JSON values, one a line, over a socket pair of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import orjson


class Wire(asyncio.Protocol):
    """One end of a socket pair.

    Args:
        on_message: Called with each message that arrives, in order.
        on_close: Called once, when the other end is gone.
    """

    def __init__(self, on_message: Callable[[Any], None], on_close: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_close = on_close
        self._transport: asyncio.WriteTransport | None = None
        self._rest = b""

    async def open(self, end: socket.socket) -> None:
        """Begin to listen."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=end)

    def send(self, message: object) -> None:
        """Send a message; once the other end is gone it is lost."""
        if self._transport is not None:
            self._transport.write(orjson.dumps(message) + b"\n")

    def close(self) -> None:
        """Close this end; the other one's ``on_close`` is called."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way out."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        """Take messages apart."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_message(orjson.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell of it."""
        self._transport = None
        self._on_close()
