"""Pixels: the input ``images``, a tensor of the model's own size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from service.decode import Decoder
from service.problems import Problem, bad_input, too_large, unprocessable
from service.v2.fields import JSON_TYPES, shown

IMAGES = "images"
DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
LAYOUTS = ("NCHW", "NHWC")

LEVELS = (np.arange(256) / 255).astype(np.float32)
"""What the 256 values of a byte are as FP32."""

CHEAP_BYTES = 200_000
CHEAP_NUMBERS = 4_096
"""Binary tensors and JSON arrays up to these sizes decode in about 0.1 ms, the time that handing them to a thread takes."""


@dataclass(frozen=True)
class PixelTensor:
    """Pixels as they arrived: counted and measured, but not looked at.

    Attributes:
        datatype: ``FP32`` or ``UINT8``.
        shape: ``(N, 3, H, W)`` or, where ``nhwc``, ``(N, H, W, 3)``.
        nhwc: Whether the colours come last.
        data: A part of the body with exactly the tensor's bytes, or JSON's array of numbers, flat or nested as the shape says.
    """

    datatype: str
    shape: tuple[int, ...]
    nhwc: bool
    data: memoryview | list[Any]

    @property
    def images(self) -> int:
        """How many there are."""
        return self.shape[0]

    def is_cheap(self) -> bool:
        """Tell whether decoding takes less time than handing it to a thread does."""
        if isinstance(self.data, memoryview):
            return self.datatype == "UINT8" or len(self.data) <= CHEAP_BYTES
        return math.prod(self.shape) <= CHEAP_NUMBERS

    def decode(self, decoder: Decoder, expired: Callable[[], bool]) -> np.ndarray:
        """Return ``(N, 3, H, W)``: uint8, also of FP32 whose values are all ``float32(k / 255)``, else float32 in ``[0, 1]``.

        A picture thus gets one answer, whatever it is sent as.

        Args:
            decoder: Not needed: the pixels have the model's size.
            expired: Not asked: there is no image after which to stop.

        Raises:
            Problem: 400 for an array that does not fit its shape, or a value that is not in range.
        """
        del decoder, expired
        if isinstance(self.data, memoryview):
            values = np.frombuffer(self.data, DTYPES[self.datatype])
        elif self.datatype == "UINT8":
            values = _bytes(flatten(IMAGES, self.data, self.shape, (int,)))
        else:
            values = _floats(flatten(IMAGES, self.data, self.shape, (int, float)))
        if self.datatype == "FP32":
            values = _on_grid(_in_range(values))
        pixels = values.reshape(self.shape)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if self.nhwc else pixels


def pixel_tensor(
    datatype: str, shape: tuple[int, ...], layout: str, data: memoryview | list[Any], size: tuple[int, int], max_images: int
) -> PixelTensor:
    """Return the tensor that an input describes.

    Args:
        datatype: As the input says.
        shape: As the input says; no dimension is negative.
        layout: ``NCHW`` or ``NHWC``.
        data: The body's binary part or JSON's array.
        size: The model's height and width.
        max_images: Most images.

    Raises:
        Problem: 400 for a datatype or layout that is not taken or bytes that are not as many as the shape says, 413 for too
            many images, 422 for a shape that is not the model's.
    """
    if datatype not in DTYPES:
        raise bad_input(f"input '{IMAGES}' has the datatype {shown(datatype)}; send FP32 in [0, 1], or UINT8")
    if layout not in LAYOUTS:
        raise bad_input(f"input '{IMAGES}': parameter 'layout' is {shown(layout)}; it must be {' or '.join(LAYOUTS)}")
    wanted = (3, *size) if layout == "NCHW" else (*size, 3)
    if shape[1:] != wanted:
        raise unprocessable(
            f"input '{IMAGES}' has the shape {shape_text(shape)}; the model takes {shape_text((-1, *wanted))} "
            f"(layout {layout}); send pictures of other sizes as 'image_bytes'"
        )
    check_count(shape[0], max_images)
    expected = math.prod(shape) * DTYPES[datatype].itemsize
    if isinstance(data, memoryview) and len(data) != expected:
        raise bad_input(f"input '{IMAGES}' has {len(data)} bytes; {datatype} of the shape {shape_text(shape)} has {expected}")
    return PixelTensor(datatype, shape, layout == "NHWC", data)


def check_count(images: int, max_images: int) -> None:
    """Raise ``Problem`` 413 for too many images and 422 for none."""
    if images > max_images:
        raise too_large(f"{images} images in one request; at most {max_images} are taken")
    if images == 0:
        raise unprocessable("there is no image in the request")


def flatten(name: str, data: list[Any], shape: tuple[int, ...], kinds: tuple[type, ...]) -> list[Any]:
    """Return an array's values in row-major order.

    Args:
        name: The input, for errors.
        data: Flat, or nested exactly as the shape says.
        shape: As the input says.
        kinds: The types that values may have.

    Raises:
        Problem: 400 for another nesting, another number of values or another type.
    """
    values = data
    if data and type(data[0]) is list:
        level = [data]
        for depth, length in enumerate(shape):
            if any(type(part) is not list or len(part) != length for part in level):
                raise bad_input(
                    f"input '{name}': 'data' is not nested as its shape {shape_text(shape)} says (level {depth + 1})"
                )
            level = list(chain.from_iterable(level))
        values = level
    expected = math.prod(shape)
    if len(values) != expected:
        raise bad_input(f"input '{name}' has {len(values)} values; the shape {shape_text(shape)} has {expected}")
    for kind in set(map(type, values)).difference(kinds):
        wanted = " or ".join(JSON_TYPES[one] for one in kinds)
        raise bad_input(f"input '{name}': 'data' must hold {wanted}, not {JSON_TYPES[kind]}")
    return values


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as JSON writes it, cut short when it has more dimensions than any tensor."""
    dimensions = [str(length) for length in shape[:8]] + ["..."] * (len(shape) > 8)
    return f"[{','.join(dimensions)}]"


def _bytes(values: list[int]) -> np.ndarray:
    try:
        return np.frombuffer(bytearray(values), np.uint8)
    except ValueError:
        position = next(index for index, value in enumerate(values) if not 0 <= value <= 255)
        raise bad_input(
            f"input '{IMAGES}' has the value {values[position]} at position {position}; UINT8 goes from 0 to 255"
        ) from None


def _floats(values: list[float]) -> np.ndarray:
    wide = _in_range(np.array(values, np.float64))  # a double beyond float32's range would become infinite, with a warning
    return wide.astype(np.float32)


def _in_range(values: np.ndarray) -> np.ndarray:
    if values.min() >= 0 and values.max() <= 1:  # false for NaN too
        return values
    position = int(np.flatnonzero(~((values >= 0) & (values <= 1)))[0])
    raise _out_of_range(float(values[position]), position)


def _out_of_range(value: float, position: int) -> Problem:
    hint = "; divide by 255, or send UINT8" if 1 < value <= 255 else ""
    return bad_input(f"input '{IMAGES}' has the value {value:g} at position {position}; FP32 must lie in [0, 1]{hint}")


def _on_grid(values: np.ndarray) -> np.ndarray:
    """Return FP32 values as bytes when they are exactly that, else as float32 of their own memory, which is aligned."""
    nearest = np.rint(values * np.float32(255)).astype(np.uint8)
    return nearest if np.array_equal(LEVELS[nearest], values) else values.astype(np.float32)
