"""The input ``image_bytes``: encoded images of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.decode import Decoder
from service.problems import Problem
from tests.service.pictures import base64_text, encode, noise, pixels, png_bomb
from tests.service.v2.messages import HEIGHT, WIDTH, length_prefixed, parsed

DECODER = Decoder(HEIGHT, WIDTH, max_bytes=10_000, max_pixels=10_000)
FILES = [encode(noise(seed, WIDTH, HEIGHT)) for seed in range(2)]


def entry(shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": "image_bytes", "datatype": "BYTES", "shape": shape, **more}


def binary_entry(shape: list[int], binary: bytes, **parameters: Any) -> dict[str, Any]:
    return entry(shape, parameters={"binary_data_size": len(binary), **parameters})


def send(one: dict[str, Any], binary: bytes = b"") -> np.ndarray:
    return parsed({"inputs": [one]}, binary).decode(DECODER, lambda: False)


def refused(one: dict[str, Any], binary: bytes = b"") -> Problem:
    with pytest.raises(Problem) as caught:
        send(one, binary)
    return caught.value


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files_are_decoded_in_order_however_they_are_sent(shape: list[int]) -> None:
    wanted = np.stack([pixels(noise(seed, WIDTH, HEIGHT)) for seed in range(2)])
    texts = [base64_text(file) for file in FILES]
    raw, encoded = length_prefixed(*FILES), length_prefixed(*[text.encode() for text in texts])
    forms = [
        send(binary_entry(shape, raw), raw),
        send(binary_entry(shape, encoded, content_type="base64"), encoded),
        send(entry(shape, data=texts)),
        send(entry(shape, data=texts, parameters={"content_type": "base64"})),
        send(entry(shape, data=texts if len(shape) == 1 else [[text] for text in texts])),
    ]
    for form in forms:
        np.testing.assert_array_equal(form, wanted)


def test_a_picture_of_another_size_is_resized() -> None:
    raw = length_prefixed(encode(noise(0, 40, 9), "JPEG"))
    assert send(binary_entry([1], raw), raw).shape == (1, 3, HEIGHT, WIDTH)


def test_a_bad_file_is_refused_with_its_number_and_counted_before_it_is_decoded() -> None:
    raw = length_prefixed(FILES[0], png_bomb())
    request = parsed({"inputs": [binary_entry([2], raw)]}, raw)
    assert request.images == 2
    with pytest.raises(Problem) as caught:
        request.decode(DECODER, lambda: False)
    assert caught.value.status == 413
    assert "image 2 of 2" in caught.value.detail


@pytest.mark.parametrize(
    ("binary", "count"),
    [
        (length_prefixed(b"abc")[:-1], 1),
        (length_prefixed(b"abc"), 2),
        (length_prefixed(b"abc", b"d"), 1),
        (length_prefixed(b"abc") + b"\0", 1),
        (length_prefixed(b"abc") + b"\0\0\0", 2),
        (b"\xff\xff\xff\xff", 1),
        (b"\xff\xff\xff\xffabc", 1),
        (b"\0", 1),
    ],
)
def test_a_cut_or_too_long_tensor_is_a_400(binary: bytes, count: int) -> None:
    problem = refused(binary_entry([count], binary), binary)
    assert problem.status == 400
    assert "image_bytes" in problem.detail


@pytest.mark.parametrize("shape", [[], [1, 1, 1], [1, 2], [2, 2], [1, 0]])
def test_a_shape_that_is_not_one_file_per_image_is_a_422(shape: list[int]) -> None:
    assert refused(entry(shape, data=["AA=="])).status == 422


def test_too_many_files_are_a_413_and_none_a_422() -> None:
    assert refused(entry([7], data=["AA=="])).status == 413
    assert refused(entry([2**64 - 1], data=["AA=="])).status == 413
    assert refused(entry([0], data=[])).status == 422
    assert refused(entry([-1], data=["AA=="])).status == 400


@pytest.mark.parametrize("data", [["?"], ["AA"], ["\u00e9"], [1], [None], [True], ["AA==", "AA=="], [], [["AA=="], 1], [{}]])
def test_json_that_is_not_one_base64_string_per_image_is_a_400(data: list[object]) -> None:
    assert refused(entry([1], data=data)).status == 400


def test_another_datatype_or_content_type_is_a_400() -> None:
    assert refused({**entry([1], data=["AA=="]), "datatype": "UINT8"}).status == 400
    assert refused(entry([1], data=["AA=="], parameters={"content_type": "str"})).status == 400
    assert refused(entry([1], data=["AA=="], parameters={"content_type": 1})).status == 400


def test_base64_in_a_binary_tensor_waits_for_the_decoding_of_its_images() -> None:
    texts = length_prefixed(base64_text(FILES[0]).encode(), b"?" * 100)
    request = parsed({"inputs": [binary_entry([2], texts, content_type="base64")]}, texts)
    assert request.images == 2
    with pytest.raises(Problem, match="element 2 is not base64") as caught:
        request.decode(DECODER, lambda: False)
    assert caught.value.status == 400
    small = length_prefixed(FILES[0])
    assert parsed({"inputs": [binary_entry([1], small)]}, small).is_cheap()
    small = length_prefixed(base64_text(FILES[0]).encode())
    assert not parsed({"inputs": [binary_entry([1], small, content_type="base64")]}, small).is_cheap()


def test_an_empty_file_is_a_400() -> None:
    raw = length_prefixed(b"")
    assert refused(binary_entry([1], raw), raw).status == 400
