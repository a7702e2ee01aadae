"""Nothing finer than the policy leaves the service, by any route, in any byte of a body or a header."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import httpx
import numpy as np
import pytest

from service.policy import Policy
from service.settings import Settings
from tests.service.conftest import RunningServer, SharedEngine, serve_in_process
from tests.service.pictures import encode, noise, pixels
from tests.service.v2.messages import binary_tensor, message, reply_tensors, tensor

POLICIES: list[dict[str, Any]] = [
    {"decimals": 2},
    {"decimals": 0},
    {"decimals": 1, "top_n": 3},
    {"decimals": 3, "reverse_sigmoid": 0.9},
    {"decimals": 2, "top_n": 1, "reverse_sigmoid": 0.4},
    {"decimals": 2, "label_only": True},
]
INFER = "/v2/models/palisade/infer"


class Scripted:
    """An engine that answers what it was told to, for the picture whose first value says so."""

    version = "0123456789ab"
    lanes = 1

    def __init__(self, real: SharedEngine, rows: np.ndarray) -> None:
        self.header = real.header
        self._rows = rows

    async def up(self) -> None: ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        del alone
        return np.repeat(self._rows[None], len(images), axis=0)


def requests(picture: np.ndarray) -> list[tuple[str, str, dict[str, Any]]]:
    """Every way to ask of a picture (3, H, W) uint8, and what else may be read: method, path, and the rest."""
    png = encode(noise(7))
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/classify", {"content": png, "headers": {"Content-Type": "image/png"}}),
        ("GET", "/v1/model", {}),
        ("GET", "/v2", {}),
        ("GET", "/v2/models/palisade", {}),
    ]
    plain = tensor(picture[None])
    outputs: list[dict[str, Any]] = [
        {"name": "probabilities", "parameters": {"binary_data": False}},
        {"name": "probabilities", "parameters": {"binary_data": True}},
        {"name": "probabilities", "parameters": {"binary_data": False, "classification": 10}},
        {"name": "probabilities", "parameters": {"binary_data": True, "classification": 4}},
        {"name": "class_id", "parameters": {"binary_data": True}},
    ]
    for header in ({"inputs": [plain]}, *({"inputs": [plain], "outputs": [output]} for output in outputs)):
        ways.append(("POST", INFER, {"content": bytes(message({"id": "0", **header})[0])}))
    entry, data = binary_tensor(picture[None])
    body, length = message({"id": "0", "inputs": [entry], "parameters": {"binary_data_output": True}}, data)
    ways.append(("POST", INFER, {"content": bytes(body), "headers": {"Inference-Header-Content-Length": length or ""}}))
    return ways


async def responses(engine: SharedEngine, row: np.ndarray, policy: dict[str, Any]) -> list[tuple[int, list[Any], bytes]]:
    """Status, headers and body of every request, against a model whose exact answer is ``row``."""
    settings = {f"tier_anonymous_{name}": value for name, value in policy.items()}
    stub: Any = Scripted(engine, row)
    found = []
    async with serve_in_process(stub, **settings) as served, served.client() as client:
        for method, path, rest in requests(pixels(noise(7))):
            headers = {**rest.pop("headers", {}), "X-Request-ID": "same"}
            reply = await client.request(method, path, headers=headers, **rest)
            found.append((reply.status_code, sorted(reply.headers.items()), reply.content))
    return found


@pytest.mark.parametrize("policy", POLICIES, ids=str)
async def test_exact_answers_that_a_policy_makes_equal_can_not_be_told_apart(
    engine: SharedEngine, policy: dict[str, Any]
) -> None:
    one = np.array([0.4521, 0.3312, 0.1104, 0.0513, 0.0207, 0.0113, 0.0098, 0.0068, 0.0041, 0.0023], np.float32)
    protect = Policy("anonymous", **policy).protect
    told = protect(one[None])
    other = one.copy()
    other[[0, 1]] += np.float32([3e-5, -3e-5])  # too little for any grid here
    again = protect(other[None])
    if told.scores is not None:
        assert np.array_equal(told.scores, again.scores), "else this test says nothing"
    assert await responses(engine, one, policy) == await responses(engine, other, policy)


def numbers(text: str) -> list[Decimal]:
    """Every number with a decimal point or an exponent in a text."""
    return [
        Decimal(found)
        for found in re.findall(r"(?<![\w.])-?[0-9]+(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)(?!\.?[0-9])", text)
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
async def test_every_number_that_leaves_is_on_the_grid(engine: SharedEngine, policy: dict[str, Any]) -> None:
    rows = np.random.default_rng(3).dirichlet(np.full(10, 0.3), 6).astype(np.float32)
    step = Decimal(1).scaleb(-policy["decimals"])
    seen = 0
    for row in rows:
        for status, headers, body in await responses(engine, row, policy):
            assert status in (200, 403)
            length = dict(headers).get("inference-header-content-length", str(len(body)))
            tensors = reply_tensors(body, {"Inference-Header-Content-Length": length}) if b'"model_name"' in body else {}
            if (values := tensors.get("probabilities")) is not None and values.dtype == np.float32:
                scaled = values.astype(np.float64) * 10 ** policy["decimals"]
                assert np.abs(scaled - np.round(scaled)).max() < 1e-3
                assert values.min() >= 0
                assert not np.signbit(values).any()
                seen += values.size
            text = "".join(value for name, value in headers if name not in ("x-request-id", "content-length"))
            text += body[: int(length)].decode()  # what follows it is binary, and was read above
            for number in numbers(text.replace(Scripted.version, "").replace("Triton 2.0", "")):
                assert number == number.quantize(step), f"{number} is finer than {step}"
                assert not number.is_signed()
                assert number <= 1
                seen += 1
    if not policy.get("label_only"):
        assert seen > 100, "else this test looked at nothing"
    else:
        assert seen == 0, "a label was wanted and a number came"


def test_a_server_with_sockets_sends_nothing_finer(server: RunningServer) -> None:
    decimals = Settings().tier_anonymous_decimals
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for method, path, rest in requests(pixels(noise(7))):
            reply = client.request(method, path, **rest)
            assert reply.status_code == 200
            if "binary_data_size" not in reply.text[:400]:
                version = json.loads(reply.content).get("version", "") or json.loads(reply.content).get("model_version", "")
                stripped = reply.text.replace(str(version) or "-", "")
                stripped = re.sub(r'"(id|model_version|version|versions)":("[^"]*"|\[[^\]]*\])', "", stripped)
                assert all(number == round(number, decimals) for number in numbers(stripped)), reply.text
            headers = " ".join(value for name, value in reply.headers.items() if name not in ("x-request-id", "date"))
            assert numbers(headers) == []
