"""Bad input, sent to the whole service: each is refused with its status and a message, and the next request is answered."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import SharedEngine, serve_in_process
from tests.service.v2.messages import binary_tensor, tensor

INFER = "/v2/models/palisade/infer"
ONE = np.full((1, 3, 32, 32), 7, np.uint8)
ENTRY, PIXELS = binary_tensor(ONE)
DEEP = 60_000

Sent = tuple[bytes, dict[str, str]]


def plain(*inputs: dict[str, Any], **more: Any) -> Sent:
    return json.dumps({"inputs": list(inputs), **more}).encode(), {}


def binary(entry: dict[str, Any], data: bytes, off: int = 0) -> Sent:
    text = json.dumps({"inputs": [entry]}).encode()
    return text + data, {"Inference-Header-Content-Length": str(len(text) + off)}


def packed(sent: Sent, encoding: str = "gzip", pack: Callable[[bytes], bytes] = gzip.compress) -> Sent:
    return pack(sent[0]), {**sent[1], "Content-Encoding": encoding}


def shaped(*shape: int) -> dict[str, Any]:
    return {**tensor(ONE), "shape": list(shape)}


def floats(value: float) -> Sent:
    values = np.full((1, 3, 32, 32), 0.5, np.float32)
    values[0, 2, 31, 31] = value
    return binary(*binary_tensor(values))


BAD: dict[str, tuple[int, str, Sent]] = {
    "header length too long": (400, "Inference-Header-Content-Length", binary(ENTRY, PIXELS, 10**6)),
    "header length short": (400, "JSON", binary(ENTRY, PIXELS, -5)),
    "header length off by one": (400, "JSON", binary(ENTRY, PIXELS, 1)),
    "header length negative": (400, "Inference-Header-Content-Length", (b"{}", {"Inference-Header-Content-Length": "-1"})),
    "header length no number": (400, "Inference-Header-Content-Length", (b"{}", {"Inference-Header-Content-Length": "one"})),
    "header length missing": (400, "JSON", (binary(ENTRY, PIXELS)[0], {})),
    "negative shape": (400, "negative", plain(shaped(-1, 3, 32, 32))),
    "huge batch": (413, "at most", plain(shaped(2**62, 3, 32, 32))),
    "huge picture": (422, "[-1,3,32,32]", plain(shaped(1, 3, 2**31, 2**31))),
    "huge number of dimensions": (422, "shape", plain(shaped(*[1] * 5000))),
    "too few values": (400, "values", plain({**tensor(ONE), "data": [1, 2, 3]})),
    "too few bytes": (400, "bytes", binary({**ENTRY, "parameters": {"binary_data_size": 100}}, PIXELS[:100])),
    "nan": (400, "[0, 1]", floats(float("nan"))),
    "infinity": (400, "[0, 1]", floats(float("inf"))),
    "below range": (400, "[0, 1]", floats(-0.001)),
    "above range": (400, "divide by 255", floats(200.0)),
    "unknown datatype": (400, "UINT8", plain({**tensor(ONE), "datatype": "FP128"})),
    "cut off binary": (400, "whole", binary(ENTRY, PIXELS[:-1])),
    "surplus binary": (400, "whole", binary(ENTRY, PIXELS + b"!")),
    "gzip bomb": (413, "bytes", packed((bytes(64_000_000), {}))),
    "deflate bomb": (413, "bytes", packed((bytes(64_000_000), {}), "deflate", zlib.compress)),
    "bomb in a bomb": (400, "JSON", packed(packed((bytes(64_000_000), {})))),
    "cut off gzip": (400, "cut short", (gzip.compress(plain(tensor(ONE))[0])[:-5], {"Content-Encoding": "gzip"})),
    "unknown encoding": (415, "gzip", (b"{}", {"Content-Encoding": "br"})),
    "deep array": (400, "JSON", (b'{"inputs": ' + b"[" * DEEP + b"]" * DEEP + b"}", {})),
    "deep object": (400, "JSON", (b'{"inputs": ' * (DEEP // 2) + b"0" + b"}" * (DEEP // 2), {})),
    "deep data": (400, "nested", plain({**tensor(ONE), "data": json.loads("[" * 400 + "1" + "]" * 400)})),
    "input twice": (400, "twice", plain(tensor(ONE), tensor(ONE))),
    "no input": (400, "inputs", plain()),
}


async def test_bad_input_is_refused_with_its_status_and_a_message(engine: SharedEngine) -> None:
    async with serve_in_process(engine, max_body_bytes=2_000_000) as served, served.client() as client:

        async def send(sent: Sent) -> httpx.Response:
            return await client.post(INFER, content=sent[0], headers=sent[1])

        for name, (status, said, sent) in BAD.items():
            reply = await send(sent)
            assert reply.status_code == status, f"{name}: {reply.text}"
            assert reply.headers["content-type"] == "application/json", name
            (error,) = reply.json().values()
            assert said in error, name
            assert len(error) < 400, name
            assert (await send(binary(ENTRY, PIXELS))).status_code == 200, name
        assert served.metric("palisade_queue_images") == 0


@pytest.mark.parametrize("path", ["/v2/models/other/infer", "/v2/models/palisade/versions/7/infer"])
async def test_another_model_or_version_is_a_404_whatever_is_sent(engine: SharedEngine, path: str) -> None:
    async with serve_in_process(engine) as served, served.client() as client:
        for content in (b"", b"{", plain(tensor(ONE))[0]):
            reply = await client.post(path, content=content)
            assert reply.status_code == 404
            assert list(reply.json()) == ["error"]
