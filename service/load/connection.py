"""One connection of a load client. Of an answer only the status, its length and ``Retry-After`` are looked at."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast


@dataclass(frozen=True)
class Target:
    """Where a service listens.

    Attributes:
        host: Name or address.
        port: Port.
        tls: Whether it speaks TLS; its certificate is checked.
        prefix: What its paths begin with, ``""`` or ``/a/b``.
    """

    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Return what a URL says; raises ``ValueError`` for one that is not ``http[s]://HOST[:PORT][/PREFIX]``."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError(f"'{url}' is not the address of a service; write http://HOST:PORT")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))

    @property
    def origin(self) -> str:
        """The URL without its prefix."""
        return f"{'https' if self.tls else 'http'}://{self.authority}"

    @property
    def authority(self) -> str:
        """Host and port as in a URL and in the header ``Host``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def connect(self, owner: Owner) -> Connection:
        """Open a connection; raises ``OSError``."""
        make: Callable[[], Connection] = lambda: Connection(owner)  # noqa: E731
        _, connection = await asyncio.get_running_loop().create_connection(make, self.host, self.port, ssl=self.tls or None)
        return connection


class Owner(Protocol):
    """Whom a connection tells what happened."""

    def answered(self, connection: Connection, number: int, status: int, retry_after: bool, keep_alive: bool) -> None:
        """Take note of an answer; without ``keep_alive`` the connection closes."""

    def lost(self, connection: Connection, number: int) -> None:
        """Take note that a connection has closed, with request ``number`` unanswered unless that is negative."""


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._number = -1  # of the request on its way
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._in_body = False
        self._left = 0  # bytes of the answer's body to come, unless it is chunked
        self._status = 0
        self._retry_after = False
        self._chunked = False
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def send(self, number: int, request: bytes) -> None:
        """Send one request."""
        assert self._transport is not None
        self._number, self._received, self._in_body = number, b"", False
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Look for the answer's end."""
        if self._number < 0:  # a server that says why it closes an idle connection
            return
        if not self._in_body:
            self._received += data
            head, end, data = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            self._read_head(head.lower())
            self._received = b""
        if self._chunked:
            self._received = self._received[-8:] + data
            complete = self._received.endswith(b"0\r\n\r\n")
        else:
            self._left -= len(data)
            complete = self._left <= 0
        if complete:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the request on its way, if there is one, up for lost."""
        del exc
        number, self._number = self._number, -1
        self._owner.lost(self, number)

    def close(self) -> None:
        """Close without waiting for an answer."""
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        number, self._number = self._number, -1
        keep_alive = self._keep_alive
        self._owner.answered(self, number, self._status, self._retry_after, keep_alive)
        if not keep_alive:
            self.close()

    def _read_head(self, head: bytes) -> None:
        self._in_body = True
        self._status = int(head[9:12])
        self._retry_after = b"\r\nretry-after:" in head
        self._keep_alive = b"\r\nconnection: close" not in head
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        at = head.find(b"\r\ncontent-length:")
        self._left = 0 if at < 0 else int(head[at + 17 :].partition(b"\r\n")[0])
