"""Encoded images: the input ``image_bytes``, pictures of any size as PNG, JPEG or WebP files."""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Any

from service.classify import EncodedImages
from service.problems import bad_input, unprocessable
from service.v2.fields import shown
from service.v2.pixels import check_count, flatten, shape_text

IMAGE_BYTES = "image_bytes"
LENGTH = struct.Struct("<I")


def encoded_images(
    datatype: str, shape: tuple[int, ...], content_type: str | None, data: memoryview | list[Any], max_images: int
) -> EncodedImages:
    """Return the files that an input holds, in order.

    JSON can't hold bytes, so its strings are base64 in any case. Elements of a binary tensor are the files themselves, or
    base64 when ``content_type`` says so (as MLServer's clients may).

    Args:
        datatype: As the input says.
        shape: As the input says, ``[N]`` or ``[N, 1]``; no dimension is negative.
        content_type: ``"base64"`` or ``None``.
        data: The body's binary part, each element after its length in four bytes (little-endian), or JSON's array of strings.
        max_images: Most images.

    Raises:
        Problem: 400 for another datatype or content type, a cut or too long tensor, or JSON that is not base64; 413 for too
            many images; 422 for another shape. A binary element that is not base64 is a 400 when it is decoded.
    """
    if datatype != "BYTES":
        raise bad_input(f"input '{IMAGE_BYTES}' has the datatype {shown(datatype)}; it must be BYTES")
    if content_type not in (None, "base64"):
        raise bad_input(f"input '{IMAGE_BYTES}': parameter 'content_type' is {shown(content_type)}; it may only be 'base64'")
    if shape[1:] not in ((), (1,)) or not shape:
        raise unprocessable(f"input '{IMAGE_BYTES}' has the shape {shape_text(shape)}; it must be [-1]: one file per image")
    check_count(shape[0], max_images)
    if isinstance(data, list):
        texts = flatten(IMAGE_BYTES, data, shape, (str,))
        return EncodedImages([_from_base64(number, text) for number, text in enumerate(texts, 1)])
    # Binary tensors are taken apart on the event loop, where megabytes of base64 would hold up everybody else.
    return EncodedImages(_elements(data, shape[0]), unpack=_from_base64 if content_type else None)


def _elements(data: memoryview, count: int) -> list[bytes]:
    elements, start = [], 0
    for number in range(1, count + 1):
        begin = start + LENGTH.size
        end = begin + LENGTH.unpack_from(data, start)[0] if begin <= len(data) else begin
        if end > len(data):
            raise bad_input(
                f"input '{IMAGE_BYTES}' is cut short: element {number} of {count} ends at byte {end}, "
                f"but the tensor has {len(data)}"
            )
        elements.append(bytes(data[begin:end]))
        start = end
    if start != len(data):
        raise bad_input(f"input '{IMAGE_BYTES}' has {len(data) - start} bytes more than its {count} elements")
    return elements


def _from_base64(number: int, text: str | bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_input(f"input '{IMAGE_BYTES}': element {number} is not base64: {error}") from error
