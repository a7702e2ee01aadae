"""One picture gets one protected answer, to the last digit, whichever protocol and form it comes by."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import LABELS, SharedEngine, serve_in_process
from tests.service.pictures import MULTIPART, base64_text, encode, multipart, noise, pixels
from tests.service.v2.messages import binary_tensor, length_prefixed, tensor

INFER = "/v2/models/palisade/infer"
SEEDS = (3, 4, 6)

BINARY_REPLY = {"parameters": {"binary_data_output": True}}
CLASSIFICATION = {"name": "probabilities", "parameters": {"classification": len(LABELS)}}

Body = tuple[str, bytes, dict[str, str]]


@dataclass(frozen=True)
class Told:
    """What a caller learns of a picture: its class, and the scores that are not 0 as they were written."""

    label: str
    scores: dict[str, Decimal]

    @classmethod
    def of(cls, label: str, scores: dict[str, Decimal]) -> Told:
        return cls(label, {name: score for name, score in scores.items() if score})


def v1(kind: str, body: bytes) -> Body:
    return "/v1/classify", body, {"Content-Type": kind}


def v2(entry: dict[str, Any], binary: bytes | None = None, pack: bool = False, **more: Any) -> Body:
    text = json.dumps({"inputs": [entry], **more}).encode()
    headers = {} if binary is None else {"Inference-Header-Content-Length": str(len(text))}
    body = text + (binary or b"")
    return (INFER, gzip.compress(body), {**headers, "Content-Encoding": "gzip"}) if pack else (INFER, body, headers)


def forms(seed: int) -> dict[str, Body]:
    """Every way to send one picture."""
    picture = noise(seed)
    file, values = encode(picture), pixels(picture)[None]  # (1, 3, 32, 32) uint8
    floats = values.astype(np.float32) / np.float32(255)
    colours_last = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
    files = {"name": "image_bytes", "datatype": "BYTES", "shape": [1]}
    raw = length_prefixed(file)
    return {
        "v1 image": v1("image/png", file),
        "v1 multipart": v1(MULTIPART, multipart(file)),
        "v1 json": v1("application/json", json.dumps({"images": [base64_text(file)]}).encode()),
        "v2 json uint8": v2(tensor(values)),
        "v2 json fp32": v2(tensor(floats, data=floats.tolist())),
        "v2 binary uint8": v2(*binary_tensor(values), **BINARY_REPLY),
        "v2 binary fp32": v2(*binary_tensor(floats), **BINARY_REPLY),
        "v2 binary nhwc": v2(*binary_tensor(colours_last, layout="NHWC")),
        "v2 binary gzip": v2(*binary_tensor(values), pack=True),
        "v2 image_bytes json": v2({**files, "data": [base64_text(file)]}),
        "v2 image_bytes binary": v2({**files, "parameters": {"binary_data_size": len(raw)}}, raw, **BINARY_REPLY),
    }


def classifications(seed: int) -> dict[str, Body]:
    values = pixels(noise(seed))[None]
    return {
        "classification json": v2(tensor(values), outputs=[CLASSIFICATION]),
        "classification binary": v2(*binary_tensor(values), outputs=[CLASSIFICATION], **BINARY_REPLY),
    }


def told_by(reply: httpx.Response) -> Told:
    assert reply.status_code == 200, reply.text
    length = int(reply.headers.get("Inference-Header-Content-Length", len(reply.content)))
    answer = json.loads(reply.content[:length], parse_float=Decimal)
    if "predictions" in answer:
        (prediction,) = answer["predictions"]
        assert LABELS[prediction["index"]] == prediction["label"]
        scores = prediction.get("scores", {})
        assert prediction.get("confidence") == scores.get(prediction["label"])
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        return Told.of(prediction["label"], scores)
    return _told_by_tensors(answer["outputs"], reply.content[length:])


def _told_by_tensors(outputs: list[dict[str, Any]], rest: bytes) -> Told:
    values: dict[str, list[Any]] = {}
    for output in outputs:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values[output["name"]] = output["data"]
        else:
            values[output["name"]], rest = _unpacked(output["datatype"], rest[:size]), rest[size:]
    assert rest == b""
    probabilities = values.get("probabilities", [])
    if probabilities and isinstance(probabilities[0], str):  # value:index:label, best first
        texts = [text.split(":") for text in probabilities]
        assert [LABELS[int(index)] for _, index, _ in texts] == [label for *_, label in texts]
        return Told.of(texts[0][2], {label: Decimal(value) for value, _, label in texts})
    (best,) = values["class_id"]
    return Told.of(LABELS[best], dict(zip(LABELS, probabilities, strict=bool(probabilities))))


def _unpacked(datatype: str, data: bytes) -> list[Any]:
    if datatype == "BYTES":
        texts = []
        while data:
            end = 4 + int.from_bytes(data[:4], "little")
            texts.append(data[4:end].decode())
            data = data[end:]
        return texts
    if datatype == "INT64":
        return list(np.frombuffer(data, "<i8").tolist())
    return [Decimal(str(value)) for value in np.frombuffer(data, "<f4")]  # the shortest text that is this float32


def decimals_of(score: Decimal) -> int:
    exponent = score.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


POLICIES: dict[str, tuple[dict[str, Any], Callable[[Told], bool]]] = {
    "1 decimal": ({"decimals": 1}, lambda told: all(decimals_of(score) <= 1 for score in told.scores.values())),
    "2 decimals": ({"decimals": 2}, lambda told: all(decimals_of(score) <= 2 for score in told.scores.values())),
    "4 decimals": ({"decimals": 4}, lambda told: len(told.scores) > 3 and max(map(decimals_of, told.scores.values())) == 4),
    "top 3": ({"decimals": 4, "top_n": 3}, lambda told: len(told.scores) == 3),
    "label only": ({"label_only": True}, lambda told: told.scores == {}),
}


@pytest.mark.parametrize("name", POLICIES)
async def test_a_picture_gets_the_same_protected_answer_in_every_form(engine: SharedEngine, name: str) -> None:
    policy, shows_no_more = POLICIES[name]
    answers = []
    # No cache: every answer is computed, and protected, anew.
    settings = {f"tier_anonymous_{field}": value for field, value in policy.items()}
    async with serve_in_process(engine, answer_cache_images=0, **settings) as served, served.client() as client:
        for seed in SEEDS:
            told = {}
            for form, (path, body, headers) in forms(seed).items():
                told[form] = told_by(await client.post(path, content=body, headers=headers))
            for form, (path, body, headers) in classifications(seed).items():
                reply = await client.post(path, content=body, headers=headers)
                if name == "label only":
                    assert reply.status_code == 403
                else:
                    told[form] = told_by(reply)
            plain = told["v1 image"]
            assert told == dict.fromkeys(told, plain)
            assert shows_no_more(plain)
            answers.append(plain)
    assert len({answer.label for answer in answers}) > 1, "pictures that look alike would prove nothing"
