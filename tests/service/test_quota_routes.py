"""Quotas count images, whichever route and form they come by: one request of 100 uses up what 100 single ones do."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import RunningServer, SharedEngine, serve_in_process
from tests.service.pictures import MULTIPART, base64_text, encode, multipart, noise
from tests.service.v2.messages import binary_tensor, length_prefixed

QUOTA = 100
WATCH_OFF = {f"watch_{detector}": "off" for detector in ("near_duplicates", "off_distribution", "distances")}
LIMITED = {"limits": "on", "tier_anonymous_limits": f"{QUOTA}/day", **WATCH_OFF}  # quotas alone: a hundred equal images are odd
PNG = encode(noise(0))
INFER = "/v2/models/palisade/infer"
CLASSES = [{"name": "probabilities", "parameters": {"classification": 2}}]

Body = tuple[str, bytes, dict[str, str]]


def v2(entry: dict[str, Any], binary: bytes | None = None, path: str = INFER, **more: Any) -> Body:
    text = json.dumps({"inputs": [entry], **more}).encode()
    headers = {} if binary is None else {"Inference-Header-Content-Length": str(len(text))}
    return path, text + (binary or b""), headers


def packed(body: Body, encoding: str = "gzip") -> Body:
    path, content, headers = body
    return path, gzip.compress(content), {**headers, "Content-Encoding": encoding}


def pixels(count: int, dtype: str = "u1", colours_last: bool = False) -> np.ndarray:
    return np.zeros((count, 32, 32, 3) if colours_last else (count, 3, 32, 32), dtype)


def json_tensor(count: int, datatype: str) -> dict[str, Any]:
    return {"name": "images", "datatype": datatype, "shape": [count, 3, 32, 32], "data": [0] * (count * 3 * 32 * 32)}


def files(count: int, **more: Any) -> dict[str, Any]:
    return {"name": "image_bytes", "datatype": "BYTES", "shape": [count], **more}


def binary_files(count: int, file: bytes = PNG, **parameters: Any) -> tuple[dict[str, Any], bytes]:
    data = length_prefixed(*[file] * count)
    return files(count, parameters={"binary_data_size": len(data), **parameters}), data


FORMS: dict[str, Callable[[int], Body]] = {
    "v1 multipart": lambda n: ("/v1/classify", multipart(*[PNG] * n), {"Content-Type": MULTIPART}),
    "v1 json": lambda n: (
        "/v1/classify",
        json.dumps({"images": [base64_text(PNG)] * n}).encode(),
        {"Content-Type": "application/json"},
    ),
    "v2 json uint8": lambda n: v2(json_tensor(n, "UINT8")),
    "v2 json fp32": lambda n: v2(json_tensor(n, "FP32")),
    "v2 binary uint8": lambda n: v2(*binary_tensor(pixels(n))),
    "v2 binary fp32": lambda n: v2(*binary_tensor(pixels(n, "f4"))),
    "v2 binary nhwc": lambda n: v2(*binary_tensor(pixels(n, colours_last=True), layout="NHWC")),
    "v2 binary gzip": lambda n: packed(v2(*binary_tensor(pixels(n)))),
    "v2 json gzip": lambda n: packed(v2(json_tensor(n, "UINT8"))),
    "v2 image_bytes json": lambda n: v2(files(n, data=[base64_text(PNG)] * n)),
    "v2 image_bytes binary": lambda n: v2(*binary_files(n)),
    "v2 image_bytes base64": lambda n: v2(*binary_files(n, base64_text(PNG).encode(), content_type="base64")),
    "v2 classification": lambda n: v2(*binary_tensor(pixels(n)), outputs=CLASSES),
    "v2 binary reply": lambda n: v2(*binary_tensor(pixels(n)), parameters={"binary_data_output": True}),
}
SINGLE: dict[str, Callable[[int], Body]] = {"v1 image": lambda n: ("/v1/classify", PNG, {"Content-Type": "image/png"})}


def left(reply: httpx.Response) -> int:
    """What a reply says is left of the day's images."""
    assert reply.headers["RateLimit-Policy"] == f'"day";q={QUOTA};w=86400'
    match = re.fullmatch(r'"day";r=([0-9]+);t=([0-9]+)', reply.headers["RateLimit"])
    assert match, reply.headers["RateLimit"]
    assert 0 <= int(match[2]) <= 86400
    return int(match[1])


async def ask(client: httpx.AsyncClient, body: Body) -> tuple[int, int]:
    """The status of the reply, and what it says is left."""
    path, content, headers = body
    reply = await client.post(path, content=content, headers=headers)
    if reply.status_code == 429:
        assert int(reply.headers["Retry-After"]) >= 1
    return reply.status_code, left(reply)


@pytest.mark.parametrize("form", [*FORMS, *SINGLE])
async def test_a_hundred_images_are_a_hundred_images(engine: SharedEngine, form: str) -> None:
    make = (FORMS | SINGLE)[form]
    async with serve_in_process(engine, **LIMITED) as served:
        async with served.client("192.0.2.1") as client:
            one = make(1)
            for number in range(1, QUOTA + 1):
                assert await ask(client, one) == (200, QUOTA - number)
            assert await ask(client, one) == (429, 0)
        if form in SINGLE:
            return
        async with served.client("192.0.2.2") as client:
            assert await ask(client, make(QUOTA + 1)) == (413, QUOTA)  # no day grants that many
            assert await ask(client, make(QUOTA)) == (200, 0)
            assert await ask(client, one) == (429, 0)
        async with served.client("192.0.2.3") as client:
            assert await ask(client, make(60)) == (200, 40)
            assert await ask(client, make(41)) == (429, 40)
            assert await ask(client, make(40)) == (200, 0)


NAN = np.full((3, 3, 32, 32), np.nan, np.float32)
LATE = {"parameters": {"timeout": 1}}
NEW = encode(noise(9))  # nobody else sends it: an answer that is kept already is never too late
FAILING: dict[str, tuple[int, Body]] = {
    "v1 damaged image": (400, ("/v1/classify", multipart(PNG, PNG[:60], PNG), {"Content-Type": MULTIPART})),
    "v1 other format": (415, ("/v1/classify", b"GIF89a" + bytes(50), {"Content-Type": "image/png"})),
    "v2 damaged image": (400, v2(*binary_files(3, PNG[:60]))),
    "v2 json out of range": (400, v2({**json_tensor(1, "UINT8"), "data": [256] * 3072})),
    "v2 binary out of range": (400, v2(*binary_tensor(NAN))),
    "v2 too late": (504, v2(*binary_tensor(pixels(5) + np.uint8(9)), **LATE)),
    "v2 files too late": (504, v2(*binary_files(5, NEW), **LATE)),
    "v2 unknown output": (400, v2(*binary_tensor(pixels(5)), outputs=[{"name": "logits"}])),
    "v2 other size": (422, v2(*binary_tensor(np.zeros((5, 3, 16, 16), np.uint8)))),
}


@pytest.mark.parametrize("case", FAILING)
async def test_what_fails_costs_nothing(engine: SharedEngine, case: str) -> None:
    status, body = FAILING[case]
    async with serve_in_process(engine, **LIMITED) as served, served.client() as client:
        assert await ask(client, FORMS["v1 json"](7)) == (200, QUOTA - 7)
        assert await ask(client, body) == (status, QUOTA - 7)
        assert await ask(client, FORMS["v1 json"](QUOTA - 7)) == (200, 0)


@pytest.fixture(scope="module")
def family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two HTTP processes that share their callers' quotas."""
    with RunningServer(tmp_path_factory.mktemp("quotas"), checkpoint=str(checkpoint), frontends="2", **LIMITED) as running:
        yield running


def test_processes_share_a_quota_of_images_on_every_route(family: RunningServer) -> None:
    def send(address: str, body: Body) -> tuple[int, int]:
        path, content, headers = body
        with family.client(address) as client:  # a connection of its own, so that either process may get it
            reply = client.post(path, content=content, headers=headers)
        return reply.status_code, left(reply)

    for number, make in enumerate(FORMS.values()):
        address = f"127.0.1.{1 + number}"
        assert send(address, make(QUOTA)) == (200, 0)
        assert send(address, make(1)) == (429, 0)
    singles = [make(1) for make in (FORMS | SINGLE).values()]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: send("127.0.2.1", singles[number % len(singles)]), range(QUOTA + 20)))
    answered = sorted((remaining for status, remaining in replies if status == 200), reverse=True)
    assert answered == list(range(QUOTA - 1, -1, -1)), "every image was counted once, and every reply told the truth"
    assert [reply for reply in replies if reply[0] != 200] == [(429, 0)] * 20
    for number, (status, body) in enumerate(FAILING.values()):
        assert send(f"127.0.3.{1 + number}", body) == (status, QUOTA)
