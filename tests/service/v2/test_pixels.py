"""The input ``images``: what its tensors decode to, and which ones are refused."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.decode import Decoder
from service.problems import Problem
from service.v2.request import InferRequest
from tests.service.v2.messages import HEIGHT, WIDTH, attempt, binary_tensor, parsed, pictures, tensor

DECODER = Decoder(HEIGHT, WIDTH, max_bytes=10_000, max_pixels=10_000)
ONE = HEIGHT * WIDTH * 3


def decoded(request: InferRequest) -> np.ndarray:
    return request.decode(DECODER, lambda: False)


def send(entry: dict[str, Any], binary: bytes = b"") -> np.ndarray:
    return decoded(parsed({"inputs": [entry]}, binary))


def refused(entry: dict[str, Any], binary: bytes = b"") -> Problem:
    with pytest.raises(Problem) as caught:
        send(entry, binary)
    assert "'images'" in caught.value.detail or "in one request" in caught.value.detail
    return caught.value


def as_float(pixels: np.ndarray) -> np.ndarray:
    """What a client makes of bytes: divided in float32."""
    return pixels.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_picture_gives_the_same_pixels_however_it_is_sent(count: int) -> None:
    pixels = pictures(count)
    floats, colours_last = as_float(pixels), np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    nested = tensor(floats, data=floats.tolist())
    forms = [
        send(tensor(pixels)),
        send(tensor(pixels, data=pixels.tolist())),
        send(*binary_tensor(pixels)),
        send(tensor(floats)),
        send(nested),
        send(*binary_tensor(floats)),
        send(tensor(colours_last, parameters={"layout": "NHWC"})),
        send(tensor(colours_last, data=colours_last.tolist(), parameters={"layout": "NHWC"})),
        send(*binary_tensor(colours_last, layout="NHWC")),
        send(*binary_tensor(as_float(colours_last), layout="NHWC")),
        send(*binary_tensor(pixels, layout="NCHW")),
        send(*binary_tensor((pixels / 255).astype(np.float32))),
    ]
    for form in forms:
        assert form.dtype == np.uint8
        np.testing.assert_array_equal(form, pixels)
        assert form.flags.c_contiguous


def test_values_between_the_levels_of_a_byte_stay_as_they_are() -> None:
    floats = as_float(pictures(2))
    floats[1, 2, 3, 4] = np.nextafter(floats[1, 2, 3, 4], np.float32(0.5))
    for form in (send(*binary_tensor(floats)), send(tensor(floats))):
        assert form.dtype == np.float32
        np.testing.assert_array_equal(form, floats)
        assert form.flags.aligned


def test_the_ends_of_the_range_are_in_it() -> None:
    edges = np.zeros((1, 3, HEIGHT, WIDTH), np.float32)
    edges[0, 0, 0, :3] = 1.0, -0.0, 0.0
    for form in (send(*binary_tensor(edges)), send(tensor(edges))):
        assert form.dtype == np.uint8
        assert form[0, 0, 0].tolist() == [255, 0, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-6, 1.0000001, 2.0, 255.0, 3e38])
@pytest.mark.parametrize("position", [0, ONE, 2 * ONE - 1])
def test_binary_fp32_out_of_range_is_a_400_that_says_where(value: float, position: int) -> None:
    floats = np.full(2 * ONE, 0.3, np.float32)
    floats[position] = value
    problem = refused(*binary_tensor(floats.reshape(2, 3, HEIGHT, WIDTH)))
    assert problem.status == 400
    assert f"at position {position};" in problem.detail
    assert "[0, 1]" in problem.detail


@pytest.mark.parametrize("value", [-1e-6, 1.0000001, 2, 255, 1e300, -(2**63), 2**64 - 1, 10**30])
def test_fp32_out_of_range_in_json_is_a_400_that_says_where(value: float) -> None:
    floats: list[float] = [0.25] * ONE
    floats[7] = value
    problem = refused(tensor(as_float(pictures(1)), data=floats))
    assert problem.status == 400
    assert "at position 7;" in problem.detail


@pytest.mark.parametrize("value", [-1, 256, 2**63, 2**64 - 1, -(2**63)])
def test_a_uint8_in_json_that_is_none_is_a_400_that_says_where(value: int) -> None:
    problem = refused(tensor(pictures(1), data=[*[1] * (ONE - 1), value]))
    assert problem.status == 400
    assert f"value {value} at position {ONE - 1};" in problem.detail


@pytest.mark.parametrize("value", [True, None, "1", 0.5, [1], {}, [], "NaN"])
@pytest.mark.parametrize("position", [0, 5])
def test_a_value_of_another_type_is_a_400(value: object, position: int) -> None:
    numbers: list[object] = [1] * ONE
    numbers[position] = value
    assert refused(tensor(pictures(1), data=numbers)).status == 400
    if value != 0.5:
        assert refused(tensor(as_float(pictures(1)), data=numbers)).status == 400


@pytest.mark.parametrize(
    "shape",
    [[3, HEIGHT, WIDTH], [1, HEIGHT, WIDTH, 3], [1, 1, HEIGHT, WIDTH], [1, 3, WIDTH, HEIGHT], [1, 3, HEIGHT, WIDTH, 1],
     [1, 3, 10**9, 10**9], [1, 3, 0, WIDTH], [], [ONE], [1] * 5000, [1, 3, 2**64 - 1, 2**64 - 1]],
)  # fmt: skip
def test_a_shape_that_the_model_does_not_take_is_a_422_that_says_which_it_takes(shape: list[int]) -> None:
    problem = refused({**tensor(pictures(1)), "shape": shape})
    assert problem.status == 422
    assert f"[-1,3,{HEIGHT},{WIDTH}]" in problem.detail
    assert len(problem.detail) < 300


@pytest.mark.parametrize("shape", [[-1, 3, HEIGHT, WIDTH], [1, -3, HEIGHT, WIDTH], [1, 3, -HEIGHT, -WIDTH], [-(2**63)]])
def test_a_negative_shape_is_a_400(shape: list[int]) -> None:
    assert refused({**tensor(pictures(1)), "shape": shape}).status == 400


@pytest.mark.parametrize("dimension", [True, 1.0, "1", None, [1], 10**25])
def test_a_dimension_that_is_no_integer_is_a_400(dimension: object) -> None:
    assert refused({**tensor(pictures(1)), "shape": [dimension, 3, HEIGHT, WIDTH]}).status == 400


@pytest.mark.parametrize("count", [7, 10**9, 2**63, 2**64 - 1])
def test_too_many_images_are_a_413_before_their_data_is_looked_at(count: int) -> None:
    assert refused({**tensor(pictures(1)), "shape": [count, 3, HEIGHT, WIDTH], "data": ["nothing"]}).status == 413


def test_an_empty_batch_is_a_422() -> None:
    entry = {"name": "images", "datatype": "UINT8", "shape": [0, 3, HEIGHT, WIDTH], "data": []}
    with pytest.raises(Problem, match="no image") as caught:
        parsed({"inputs": [entry]})
    assert caught.value.status == 422


@pytest.mark.parametrize("values", [ONE - 1, ONE + 1, 0, 2 * ONE])
def test_another_number_of_values_than_the_shape_says_is_a_400(values: int) -> None:
    assert refused(tensor(pictures(1), data=[1] * values)).status == 400


@pytest.mark.parametrize("size", [ONE - 1, ONE + 1, 1, 4 * ONE])
def test_another_number_of_bytes_than_the_shape_says_is_a_400(size: int) -> None:
    entry, _ = binary_tensor(pictures(1), binary_data_size=size)
    problem = refused(entry, bytes(size))
    assert problem.status == 400
    assert f"{size} bytes" in problem.detail


def test_json_nested_otherwise_than_the_shape_says_is_a_400() -> None:
    pixels = pictures(2)
    rows = pixels.tolist()
    rows[1][2][3].pop()
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    wrong: list[list[Any]] = [
        pixels.transpose(0, 2, 3, 1).tolist(),
        rows,
        pixels.reshape(2, -1).tolist(),
        [pixels.tolist()],
        deep,
        [[]],
    ]
    for data in wrong:
        problem = refused(tensor(pixels, data=data))
        assert problem.status == 400
        assert "nested" in problem.detail


@pytest.mark.parametrize("datatype", ["", "fp32", "FP16", "BF16", "INT8", "BYTES", "FP64", "float32", "x" * 100_000])
def test_another_datatype_is_a_400_that_says_which_are_taken(datatype: str) -> None:
    problem = refused({**tensor(pictures(1)), "datatype": datatype})
    assert problem.status == 400
    assert "UINT8" in problem.detail
    assert len(problem.detail) < 300


def test_another_layout_is_a_400() -> None:
    assert refused({**tensor(pictures(1)), "parameters": {"layout": "CHWN"}}).status == 400
    assert refused({**tensor(pictures(1)), "parameters": {"layout": 4}}).status == 400


@given(values=st.lists(st.binary(min_size=4, max_size=4), min_size=ONE, max_size=ONE))
@settings(max_examples=60, deadline=None)
def test_any_bits_as_fp32_decode_to_themselves_or_are_refused(values: list[bytes]) -> None:
    entry, _ = binary_tensor(np.zeros((1, 3, HEIGHT, WIDTH), np.float32))
    numbers = [struct.unpack("<f", value)[0] for value in values]
    pixels = attempt(lambda: send(entry, b"".join(values)))
    in_range = all(0 <= number <= 1 for number in numbers)
    if isinstance(pixels, Problem):
        assert pixels.status == 400
        assert not in_range
    else:
        assert in_range
        scale = 255 if pixels.dtype == np.uint8 else 1
        np.testing.assert_allclose(pixels.ravel() / scale, numbers, rtol=1e-7, atol=1e-45)


def test_what_is_cheap_is_decoded_at_once() -> None:
    small, large = pictures(1), np.zeros((6, 3, HEIGHT, WIDTH), np.uint8)
    assert parsed({"inputs": [tensor(small)]}).is_cheap()
    entry, binary = binary_tensor(large)
    assert parsed({"inputs": [entry]}, binary).is_cheap()
