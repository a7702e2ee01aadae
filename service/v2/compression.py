"""Compression: bodies that arrive as gzip or deflate, and replies that leave so when they are asked for."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncGenerator, Iterator

from starlette.datastructures import Headers
from starlette.requests import Request

from service.problems import bad_input, unsupported_type
from service.v2.fields import shown

PIECE_BYTES = 65_536
"""Most bytes unpacked at a time, whatever they were packed into: a bomb is noticed after this much of it."""

GZIP, ZLIB, RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS

WORTH_BYTES = 1024
"""Replies below this size are sent as they are: a packet holds them anyway."""


def content_encoding(headers: Headers) -> str | None:
    """Return ``"gzip"``, ``"deflate"`` or, for a body as it is, ``None``; raises ``Problem`` 415 for another encoding."""
    said = ", ".join(headers.getlist("content-encoding")).strip().lower()
    if said in ("", "identity"):
        return None
    if said in ("gzip", "x-gzip"):
        return "gzip"
    if said == "deflate":
        return said
    raise unsupported_type(f"the Content-Encoding is {shown(said)}; send gzip, deflate or none")


class Unpacker:
    """Unpacks one stream, a piece at a time; whoever takes the pieces stops when they are too many.

    Args:
        encoding: ``"gzip"`` or ``"deflate"``. The latter is zlib's format (RFC 9110, section 8.4.1.2); the bare stream that
            some clients send instead is told apart by its first two bytes.
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._head = b""
        self._stream = zlib.decompressobj(GZIP) if encoding == "gzip" else None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what ``data`` unpacks to, in pieces of at most ``PIECE_BYTES``; raises ``Problem`` 400."""
        if self._stream is None:
            self._head += data
            if len(self._head) < 2:
                return
            data, self._head = self._head, b""
            self._stream = zlib.decompressobj(_deflate_format(data))
        while data:
            if self._stream.eof:
                raise bad_input(f"bytes follow the end of the body's {self._encoding} stream")
            piece = self._decompress(data)
            data = self._stream.unconsumed_tail or self._stream.unused_data
            if piece:
                yield piece

    def finish(self) -> Iterator[bytes]:
        """Yield what is left; raises ``Problem`` 400 when the stream is cut short."""
        while self._stream and not self._stream.eof:
            piece = self._decompress(b"")
            if not piece:
                break
            yield piece
        if not self._stream or not self._stream.eof:
            raise bad_input(f"the body's {self._encoding} stream is cut short")

    def _decompress(self, data: bytes) -> bytes:
        assert self._stream is not None
        try:
            return self._stream.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            raise bad_input(f"the body is not {self._encoding}, as its Content-Encoding says: {error}") from error


class UnpackedRequest(Request):
    """A request whose body is unpacked as it arrives, so that a reader's limits hold for the unpacked bytes.

    Raises:
        Problem: 415 for an encoding that is not taken; ``stream()`` raises 400 for a body that is damaged.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request.scope, request.receive)
        self._encoding = content_encoding(request.headers)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the unpacked body; others get their turn after every piece, since a few bytes may unpack to many."""
        if self._encoding is None:
            async for chunk in super().stream():
                yield chunk
            return
        unpacker = Unpacker(self._encoding)
        async for chunk in super().stream():
            for piece in unpacker.feed(chunk):
                yield piece
                await asyncio.sleep(0)
        for piece in unpacker.finish():
            yield piece


def pack(body: bytes, headers: Headers) -> tuple[bytes, dict[str, str]]:
    """Return a reply's body and the headers that say how it is encoded: as the request's ``Accept-Encoding`` asks, or as is."""
    if len(body) < WORTH_BYTES:
        return body, {}
    accepted = _accepted(", ".join(headers.getlist("accept-encoding")))
    if "gzip" in accepted:
        return gzip.compress(body, compresslevel=1, mtime=0), {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    if "deflate" in accepted:
        return zlib.compress(body, level=1), {"Content-Encoding": "deflate", "Vary": "Accept-Encoding"}
    return body, {}


def _deflate_format(data: bytes) -> int:
    """Tell zlib's format, whose first two bytes are a method of 8 and a multiple of 31 (RFC 1950), from a bare stream."""
    return ZLIB if data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0 else RAW


def _accepted(header: str) -> set[str]:
    accepted = set()
    for item in header.lower().split(","):
        name, _, weight = item.partition(";")
        if weight.replace(" ", "").rstrip("0") not in ("q=", "q=0."):  # q=0 and q=0.000 mean: not this one
            accepted.add(name.strip())
    return accepted
