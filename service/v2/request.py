"""Requests: the body of ``POST /v2/models/{model}/infer`` taken apart, with nothing decoded.

Formats: the Open Inference Protocol's REST binding, and Triton's extensions for binary tensors and classification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from service.classify import EncodedImages
from service.decode import Decoder
from service.policy import Policy
from service.problems import bad_input, forbidden, too_large
from service.v2.encoded import IMAGE_BYTES, encoded_images
from service.v2.fields import JSON_TYPES, objects, optional, required, shown
from service.v2.outputs import PROBABILITIES, TOLERATED, RequestedOutput, requested_outputs
from service.v2.pixels import IMAGES, PixelTensor, pixel_tensor

MAX_ID = 1024
OTHER_VALUES = 10_000
"""JSON values that a request may hold besides its pixels."""


@dataclass(frozen=True)
class InferLimits:
    """What a request may hold.

    Attributes:
        height: The model's input height in pixels.
        width: The model's input width in pixels.
        max_images: Most images in one request.
        certified: Whether the model has certificates.
    """

    height: int
    width: int
    max_images: int
    certified: bool = False

    @property
    def max_values(self) -> int:
        """Most values in a request's JSON."""
        return self.max_images * 3 * self.height * self.width + OTHER_VALUES


@dataclass(frozen=True)
class InferRequest:
    """A request whose form is right; its images are counted and not decoded.

    Attributes:
        id: As given, to be echoed.
        deadline_s: How long the caller wants to wait; ``None`` for as long as the service lets it.
        tensor: The images.
        outputs: The outputs that it names; empty for all that its policy shows.
        binary: Whether outputs that are not named come as bytes.
    """

    id: str | None
    deadline_s: float | None
    tensor: PixelTensor | EncodedImages
    outputs: tuple[RequestedOutput, ...]
    binary: bool

    @property
    def images(self) -> int:
        """How many images it holds."""
        return self.tensor.images

    def is_cheap(self) -> bool:
        """Tell whether decoding takes less time than handing it to a thread does."""
        return self.tensor.is_cheap()

    def decode(self, decoder: Decoder, expired: Callable[[], bool]) -> np.ndarray:
        """Return ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``; raises what the tensor's ``decode`` raises."""
        return self.tensor.decode(decoder, expired)

    def check(self, policy: Policy) -> None:
        """Raise ``Problem`` 403 when the request names an output that the policy does not show."""
        named = {output.name for output in self.outputs}
        for name, is_shown in ((PROBABILITIES, not policy.label_only), (TOLERATED, policy.shows_certificates)):
            if name in named and not is_shown:
                raise forbidden(f"output '{name}' is not shown to your tier; ask for 'class_id', or name no outputs")


def parse_infer(body: bytes | bytearray, header_length: str | None, limits: InferLimits) -> InferRequest:
    """Take a request's body apart.

    Args:
        body: JSON, followed by a binary tensor where ``header_length`` says so. Unpacked already.
        header_length: The header ``Inference-Header-Content-Length``: bytes of the JSON; ``None`` when all of it is JSON.
        limits: What it may hold.

    Raises:
        Problem: 400 for a body that is not what the protocol says, 413 for too many images or values, 422 for a shape that
            the model does not take.
    """
    length = _header_length(header_length, len(body))
    header = _json(body, length, limits.max_values)
    rest = memoryview(body)[length:]
    request_id = optional(header, "id", str, "the request's")
    if request_id is not None and len(request_id) > MAX_ID:
        raise bad_input(f"the request's 'id' has {len(request_id)} characters; at most {MAX_ID} are taken")
    parameters = optional(header, "parameters", dict, "the request's") or {}
    where = "the request's parameter"
    timeout_us = _not_negative(parameters, "timeout")
    _not_negative(parameters, "priority")  # taken, since clients send it; requests are served in turn
    binary = optional(parameters, "binary_data_output", bool, where) or False
    return InferRequest(
        id=request_id,
        deadline_s=timeout_us / 1e6 if timeout_us else None,
        outputs=requested_outputs(header, binary, limits.certified),
        tensor=_tensor(_only_input(header), rest, limits, header_length is not None),
        binary=binary,
    )


def text_bytes(header_length: str | None) -> int | None:
    """Return how much of a body is JSON as far as its header length tells, ``None`` when all of it may be."""
    return int(header_length) if header_length is not None and _is_length(header_length) else None


def _is_length(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 20


def _header_length(text: str | None, available: int) -> int:
    if text is None:
        return available
    if not _is_length(text):
        raise bad_input(f"Inference-Header-Content-Length is {shown(text)}; it must be the number of bytes of the body's JSON")
    if int(text) > available:
        raise bad_input(f"Inference-Header-Content-Length is {text}, but the body has {available} bytes (unpacked)")
    return int(text)


def _json(body: bytes | bytearray, length: int, max_values: int) -> dict[str, Any]:
    # Counted before parsing, since a million small values cost a hundred times their bytes.
    values = body.count(b",", 0, length)
    containers = body.count(b"[", 0, length) + body.count(b"{", 0, length)
    if max(values, containers) > max_values:
        raise too_large(f"the request's JSON has more than {max_values} values; send fewer images")
    try:
        header = orjson.loads(memoryview(body)[:length])
    except orjson.JSONDecodeError as error:
        whole = "the body" if length == len(body) else f"the body's first {length} bytes"
        raise bad_input(f"{whole} must be JSON: {error}") from error
    if type(header) is not dict:
        raise bad_input(f"the request's JSON must be an object, not {JSON_TYPES[type(header)]}")
    return header


def _not_negative(parameters: dict[str, Any], name: str) -> int:
    value = optional(parameters, name, int, "the request's parameter") or 0
    if value < 0:
        raise bad_input(f"the request's parameter '{name}' is {value}; it must not be negative")
    return value


def _only_input(header: dict[str, Any]) -> dict[str, Any]:
    inputs = objects(required(header, "inputs", list, "the request's"), "the request's 'inputs'")
    names: list[str] = []
    for entry in inputs:
        name = required(entry, "name", str, "an input's")
        if name not in (IMAGES, IMAGE_BYTES):
            raise bad_input(f"there is no input {shown(name)}; send '{IMAGES}' or '{IMAGE_BYTES}'")
        if name in names:
            raise bad_input(f"input '{name}' is given twice")
        names.append(name)
    if len(inputs) != 1:
        raise bad_input(f"the request has {len(inputs)} inputs; send either '{IMAGES}' or '{IMAGE_BYTES}'")
    return inputs[0]


def _tensor(
    entry: dict[str, Any], rest: memoryview, limits: InferLimits, has_header_length: bool
) -> PixelTensor | EncodedImages:
    name: str = entry["name"]
    datatype = required(entry, "datatype", str, f"input '{name}':")
    shape = _shape(entry, name)
    parameters = optional(entry, "parameters", dict, f"input '{name}':") or {}
    data = _data(entry, name, parameters, rest, has_header_length)
    where = f"input '{name}': parameter"
    if name == IMAGE_BYTES:
        content_type = optional(parameters, "content_type", str, where)
        return encoded_images(datatype, shape, content_type, data, limits.max_images)
    layout = optional(parameters, "layout", str, where) or "NCHW"
    return pixel_tensor(datatype, shape, layout, data, (limits.height, limits.width), limits.max_images)


def _shape(entry: dict[str, Any], name: str) -> tuple[int, ...]:
    shape = required(entry, "shape", list, f"input '{name}':")
    for length in shape:
        if type(length) is not int:
            raise bad_input(f"input '{name}': 'shape' must hold integers, not {JSON_TYPES[type(length)]}")
        if length < 0:
            raise bad_input(f"input '{name}': 'shape' has the dimension {length}; none may be negative")
    return tuple(shape)


def _data(
    entry: dict[str, Any], name: str, parameters: dict[str, Any], rest: memoryview, has_header_length: bool
) -> memoryview | list[Any]:
    """Return the bytes or the JSON array of the only input, which takes all that follows the JSON."""
    where = f"input '{name}': parameter"
    if parameters.get("shared_memory_region") is not None:
        raise bad_input(f"{where} 'shared_memory_region' is not supported; send the tensor with the request")
    size = optional(parameters, "binary_data_size", int, where)
    array = optional(entry, "data", list, f"input '{name}':")
    if (size is None) == (array is None):
        both = "both" if array is not None else "neither"
        raise bad_input(f"input '{name}' has {both} 'data' and the parameter 'binary_data_size'; send one of them")
    if size is not None and not has_header_length:
        raise bad_input(f"input '{name}' is binary, but the header Inference-Header-Content-Length is missing")
    if (size or 0) != len(rest):
        raise bad_input(
            f"the body has {len(rest)} bytes after its JSON, but input '{name}' has {size or 0} ('binary_data_size'); "
            "see that Inference-Header-Content-Length is right and that the body is whole"
        )
    return rest if array is None else array
