"""V2 requests for tests, built by hand as the protocol's text says, and the replies taken apart the same way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from service.problems import Problem
from service.v2.request import InferLimits, InferRequest, parse_infer

T = TypeVar("T")

HEIGHT, WIDTH = 4, 5
LIMITS = InferLimits(HEIGHT, WIDTH, max_images=6)


def message(header: object, binary: bytes = b"") -> tuple[bytearray, str | None]:
    """The body, and its header length if anything follows the JSON."""
    text = json.dumps(header).encode()
    return bytearray(text + binary), str(len(text)) if binary else None


def parsed(header: object, binary: bytes = b"") -> InferRequest:
    return parse_infer(*message(header, binary), LIMITS)


def attempt(work: Callable[[], T]) -> T | Problem:
    """What came of it: a result or a refusal; anything else is raised."""
    try:
        return work()
    except Problem as problem:
        return problem


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Noise (N, 3, H, W) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, HEIGHT, WIDTH), np.uint8)


def tensor(values: np.ndarray, **more: Any) -> dict[str, Any]:
    """An input in JSON, flat."""
    datatype = {"uint8": "UINT8", "float32": "FP32"}[values.dtype.name]
    return {"name": "images", "datatype": datatype, "shape": list(values.shape), "data": values.ravel().tolist(), **more}


def binary_tensor(values: np.ndarray, **parameters: Any) -> tuple[dict[str, Any], bytes]:
    """An input whose values follow the JSON, and those."""
    entry = tensor(values)
    del entry["data"]
    return {**entry, "parameters": {"binary_data_size": values.nbytes, **parameters}}, values.tobytes()


def length_prefixed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def reply_tensors(body: bytes, headers: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Every output of a reply, whichever form it has."""
    length = int(headers.get("Inference-Header-Content-Length", len(body)))
    reply, position, found = json.loads(body[:length]), length, {}
    for output in reply["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = output["data"]
        else:
            raw, position = body[position : position + size], position + size
            values = _unprefixed(raw) if output["datatype"] == "BYTES" else raw
        kind: Any = {"FP32": "<f4", "INT64": "<i8", "BYTES": object}[output["datatype"]]
        array = np.frombuffer(values, kind) if isinstance(values, bytes) else np.array(values, kind)
        found[output["name"]] = array.reshape(output["shape"])
    assert position == len(body), "bytes that no output explains"
    return found


def _unprefixed(raw: bytes) -> list[str]:
    texts = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return texts
