"""Compression: what is unpacked, how far, and what is refused."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message

from service.body import BodyReader
from service.problems import Problem
from service.v2.compression import PIECE_BYTES, UnpackedRequest, Unpacker, content_encoding, pack
from tests.service.v2.messages import attempt

TEXT = bytes(range(256)) * 700  # more than two pieces


def raw_deflate(data: bytes, level: int = 6) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw": ("deflate", raw_deflate),
}


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def unpack(encoding: str, parts: Iterable[bytes]) -> bytes:
    unpacker = Unpacker(encoding)
    pieces = [piece for part in parts for piece in unpacker.feed(part)] + list(unpacker.finish())
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


def request(parts: Iterable[bytes], *encodings: str) -> Request:
    messages = iter(parts)

    async def receive() -> Message:
        part = next(messages, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    headers = [(b"content-encoding", encoding.encode()) for encoding in encodings]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def reader(max_bytes: int, max_in_flight: int = 10**9) -> BodyReader:
    return BodyReader(max_bytes, max_in_flight, deadline_s=60)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("size", [1, 2, 7, 100_000])
def test_a_body_is_unpacked_however_it_arrives(packer: str, size: int) -> None:
    encoding, compress = PACKERS[packer]
    assert unpack(encoding, chunks(compress(TEXT), size)) == TEXT


@given(data=st.binary(max_size=5000), size=st.integers(1, 600), level=st.integers(0, 9), repeats=st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_any_body_comes_back(data: bytes, size: int, level: int, repeats: int) -> None:
    data *= repeats
    assert unpack("gzip", chunks(gzip.compress(data, level), size)) == data
    assert unpack("deflate", chunks(zlib.compress(data, level), size)) == data
    assert unpack("deflate", chunks(raw_deflate(data, level), size)) == data


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_cut_damaged_or_prolonged_stream_is_a_400(packer: str, size: int) -> None:
    encoding, compress = PACKERS[packer]
    packed = compress(TEXT)
    damaged = bytearray(packed)
    damaged[len(packed) // 2 :] = bytes(byte ^ 0x5A for byte in packed[len(packed) // 2 :])
    for bad in (packed[:-1], packed[: len(packed) // 2], b"", packed[:1], bytes(damaged), packed + b"x", packed + packed, TEXT):
        with pytest.raises(Problem) as caught:
            unpack(encoding, chunks(bad, size))
        assert caught.value.status == 400
        assert encoding in caught.value.detail


@given(data=st.binary(max_size=400), encoding=st.sampled_from(["gzip", "deflate"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_unpacked_or_refused(data: bytes, encoding: str) -> None:
    result = attempt(lambda: unpack(encoding, [data]))
    assert isinstance(result, bytes) or result.status == 400


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "x" * 10_000, "gzip;q=1"])
def test_another_encoding_is_a_415(encoding: str) -> None:
    with pytest.raises(Problem) as caught:
        UnpackedRequest(request([b"data"], encoding))
    assert caught.value.status == 415
    assert "gzip" in caught.value.detail
    assert len(caught.value.detail) < 200


def test_encodings_are_told_whatever_their_case() -> None:
    said = {"GZIP": "gzip", " gzip ": "gzip", "x-gzip": "gzip", "Deflate": "deflate", "identity": None, "": None}
    assert {name: content_encoding(Headers({"content-encoding": name})) for name in said} == said
    assert content_encoding(Headers({})) is None
    with pytest.raises(Problem):
        UnpackedRequest(request([], "gzip", "gzip"))


@pytest.mark.parametrize("packer", PACKERS)
async def test_a_reader_gets_the_unpacked_body_and_counts_it(packer: str) -> None:
    encoding, compress = PACKERS[packer]
    body = await reader(len(TEXT)).read(UnpackedRequest(request(chunks(compress(TEXT), 1000), encoding)))
    assert body.data == TEXT
    assert body.size == len(TEXT)


async def test_a_body_that_is_not_packed_passes_as_it_is() -> None:
    for encodings in ((), ("identity",)):
        body = await reader(len(TEXT)).read(UnpackedRequest(request(chunks(TEXT, 1000), *encodings)))
        assert body.data == TEXT


@pytest.mark.parametrize("packer", PACKERS)
async def test_a_bomb_is_a_413_as_soon_as_it_is_too_large(packer: str) -> None:
    encoding, compress = PACKERS[packer]
    bomb, limit = compress(bytes(50_000_000)), 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(Problem) as caught:
            await reader(limit).read(UnpackedRequest(request([bomb], encoding)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.status == 413
    assert peak < 3 * limit


async def test_unpacked_bytes_count_against_those_held_together_and_are_given_back() -> None:
    packed = gzip.compress(TEXT)
    shared = reader(len(TEXT), max_in_flight=len(TEXT) + 10)
    first = await shared.read(UnpackedRequest(request([packed], "gzip")))
    with pytest.raises(Problem) as caught:
        await shared.read(UnpackedRequest(request([packed], "gzip")))
    assert caught.value.status == 503
    first.close()
    assert (await shared.read(UnpackedRequest(request([packed], "gzip")))).data == TEXT


LONG = b'{"outputs": []}' * 200


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate, br", "gzip"), ("br;q=1.0, GZIP;q=0.5", "gzip"),
     ("gzip;q=0, deflate", "deflate"), ("gzip; q=0.000", None), ("", None), ("br", None), ("identity", None), (";;,,", None)],
)  # fmt: skip
def test_a_reply_is_packed_as_the_client_asks(accept: str, encoding: str | None) -> None:
    body, headers = pack(LONG, Headers({"accept-encoding": accept}))
    assert headers.get("Content-Encoding") == encoding
    unpackers: dict[str | None, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}
    assert unpackers[encoding](body) == LONG
    assert encoding is None or len(body) < len(LONG)


def test_a_short_reply_is_not_worth_packing() -> None:
    assert pack(b"{}", Headers({"accept-encoding": "gzip"})) == (b"{}", {})
