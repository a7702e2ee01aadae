"""Replies: protected answers as tensors, in JSON or as bytes after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from service.classify import MODEL_NAME
from service.policy import Protected
from service.problems import Problem
from service.v2.outputs import CLASS_ID, PROBABILITIES, TOLERATED, RequestedOutput
from service.v2.request import InferRequest

HEADER_LENGTH = "Inference-Header-Content-Length"


def render_infer(
    request: InferRequest, protected: Protected, labels: Sequence[str], version: str
) -> tuple[bytes, dict[str, str]]:
    """Return a reply's body and its headers.

    Outputs: ``probabilities`` FP32 ``[N, C]``, rounded and 0 where the policy hides them, ``class_id`` INT64 ``[N]``, and, of a
    vote where the policy shows it, ``tolerated_partitions`` INT64 ``[N]``. With the classification extension, ``probabilities``
    is BYTES ``[N, k]`` of ``value:index:label``, best first, values with six decimals as Triton writes them; ``k`` is the
    number asked for, but no more than the policy shows.

    Args:
        request: What was asked; its ``check`` allowed it.
        protected: What may leave, ``N`` answers.
        labels: The ``C`` class names.
        version: The model's version.
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for output in request.outputs or _defaults(request, protected):
        tensor, data = _tensor(output, protected, labels)
        if isinstance(data, bytes):
            tensor["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        else:
            tensor["data"] = data
        described.append(tensor)
    reply: dict[str, Any] = {"model_name": MODEL_NAME, "model_version": version, "outputs": described}
    if request.id is not None:
        reply["id"] = request.id
    text = orjson.dumps(reply)
    if not parts:
        return text, {"Content-Type": "application/json"}
    return b"".join((text, *parts)), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}


def problem_response(problem: Problem) -> Response:
    """Return a problem as V2 clients read it: ``{"error": ...}`` with exactly ``application/json``."""
    return Response(orjson.dumps({"error": problem.detail}), problem.status, problem.headers, media_type="application/json")


def _defaults(request: InferRequest, protected: Protected) -> tuple[RequestedOutput, ...]:
    names: tuple[str, ...] = (CLASS_ID,) if protected.scores is None else (PROBABILITIES, CLASS_ID)
    if protected.tolerated is not None:
        names = (*names, TOLERATED)
    return tuple(RequestedOutput(name, request.binary) for name in names)


def _tensor(output: RequestedOutput, protected: Protected, labels: Sequence[str]) -> tuple[dict[str, Any], bytes | list[Any]]:
    """Return a tensor's description, and its values as bytes or as a flat list."""
    if output.name in (CLASS_ID, TOLERATED):
        numbers = protected.best if output.name == CLASS_ID else protected.tolerated
        assert numbers is not None
        whole = numbers.astype("<i8")  # (N,)
        described = {"name": output.name, "datatype": "INT64", "shape": list(whole.shape)}
        return described, whole.tobytes() if output.binary else whole.tolist()
    assert protected.scores is not None
    if output.classes:
        texts, shape = _classification(output.classes, protected, labels)
        described = {"name": PROBABILITIES, "datatype": "BYTES", "shape": shape}
        return described, _length_prefixed(texts) if output.binary else texts
    scores = protected.scores  # (N, C) float64
    described = {"name": PROBABILITIES, "datatype": "FP32", "shape": list(scores.shape)}
    return described, scores.astype("<f4").tobytes() if output.binary else scores.ravel().tolist()


def _classification(count: int, protected: Protected, labels: Sequence[str]) -> tuple[list[str], list[int]]:
    assert protected.scores is not None
    assert protected.shown is not None
    shown = protected.shown[:, :count]  # (N, k)
    values = np.take_along_axis(protected.scores, shown, axis=1)
    texts = [f"{value:f}:{index}:{labels[index]}" for value, index in zip(values.flat, shown.flat, strict=True)]
    return texts, list(shown.shape)


def _length_prefixed(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (len(text).to_bytes(4, "little"), text))
