"""Requests: the JSON around the tensors, the options it carries, and everything that can be wrong with it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.decode import Decoder
from service.problems import Problem
from service.v2.outputs import RequestedOutput
from service.v2.request import InferRequest, parse_infer
from tests.service.v2.messages import (
    HEIGHT,
    LIMITS,
    WIDTH,
    attempt,
    binary_tensor,
    length_prefixed,
    message,
    parsed,
    pictures,
    tensor,
)

ENTRY, BINARY = binary_tensor(pictures(2))
GOOD: dict[str, Any] = {"inputs": [ENTRY]}
DECODER = Decoder(HEIGHT, WIDTH, max_bytes=10_000, max_pixels=10_000)


def refused(header: object, binary: bytes = BINARY) -> Problem:
    with pytest.raises(Problem) as caught:
        parsed(header, binary)
    assert 400 <= caught.value.status < 500
    assert len(caught.value.detail) < 400, "an error is no place for the whole request"
    return caught.value


def with_header_length(text: str | None, body: bytearray) -> InferRequest:
    return parse_infer(body, text, LIMITS)


def test_the_options_of_a_request_are_read() -> None:
    outputs = [{"name": "class_id"}, {"name": "probabilities", "parameters": {"binary_data": False, "classification": 3}}]
    parameters = {"timeout": 2_500_000, "priority": 7, "binary_data_output": True, "anything": "else"}
    request = parsed({**GOOD, "id": 'a"b\u2603', "parameters": parameters, "outputs": outputs, "model_name": "x"}, BINARY)
    assert (request.id, request.deadline_s, request.images) == ('a"b\u2603', 2.5, 2)
    assert request.outputs == (RequestedOutput("class_id", True), RequestedOutput("probabilities", False, 3))


def test_what_is_left_out_or_null_has_a_default() -> None:
    nothing = {"id": None, "parameters": None, "outputs": None}
    for header in (GOOD, {**GOOD, **nothing}, {**GOOD, "parameters": {"timeout": 0, "priority": None}, "outputs": []}):
        request = parsed(header, BINARY)
        assert (request.id, request.deadline_s, request.outputs, request.binary) == (None, None, (), False)


def test_the_header_length_may_be_left_out_or_be_all_of_the_body_when_all_of_it_is_json() -> None:
    body, _ = message({"inputs": [tensor(pictures(1))]})
    for text in (None, str(len(body)), f"0{len(body)}"):
        assert with_header_length(text, body).images == 1


@pytest.mark.parametrize(
    "text", ["", "-1", "+5", "1.0", "1e1", "0x10", " 5", "five", "\u0665", "9" * 5000, "99999999999999999999", "5,5", "NaN"]
)
def test_a_header_length_that_is_no_number_of_bytes_of_the_body_is_a_400_that_names_it(text: str) -> None:
    with pytest.raises(Problem, match="Inference-Header-Content-Length") as caught:
        with_header_length(text, message(GOOD, BINARY)[0])
    assert caught.value.status == 400
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize("off", [-3, -1, 1, 3])
def test_a_header_length_that_is_off_is_a_400(off: int) -> None:
    body, text = message(GOOD, BINARY)
    assert text is not None
    with pytest.raises(Problem) as caught:
        with_header_length(str(int(text) + off), body)
    assert caught.value.status == 400
    for wrong in ("0", str(len(body)), str(len(body) + 1), None):
        with pytest.raises(Problem) as caught:
            with_header_length(wrong, body)
        assert caught.value.status == 400


def test_a_binary_tensor_without_a_header_length_is_a_400_that_names_the_header() -> None:
    body, _ = message(GOOD)
    with pytest.raises(Problem, match="Inference-Header-Content-Length is missing") as caught:
        with_header_length(None, body)
    assert caught.value.status == 400


@pytest.mark.parametrize("cut", [1, 50, len(BINARY)])
def test_a_cut_body_and_surplus_bytes_are_400s(cut: int) -> None:
    body, text = message(GOOD, BINARY)
    for wrong in (body[:-cut], body + bytes(cut)):
        with pytest.raises(Problem) as caught:
            with_header_length(text, wrong)
        assert caught.value.status == 400
    assert refused({"inputs": [tensor(pictures(1))]}, bytes(cut)).status == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[]", b"null", b"3", b'"x"', b"[" * 100_000, b'{"inputs":' * 90_000, b'{"inputs": [NaN]}',
     b"{}", b'{"inputs": null}', b'{"inputs": {}}', b'{"inputs": []}', b'{"inputs": [1]}', b'{"inputs": [null]}',
     b'{"inputs": [[]]}', b'{"inputs": [{}]}', b'{"id": "\\ud800"}'],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parse_infer(bytearray(body), None, LIMITS)
    assert caught.value.status in (400, 413)


@pytest.mark.parametrize("filler", [b"1,", b"[],", b"{},", b"[[", b'{"":['])
def test_json_of_a_million_small_values_is_a_413_before_it_is_parsed(filler: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parse_infer(bytearray(b'{"inputs": [' + filler * 1_000_000), None, LIMITS)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "change",
    [{"name": None}, {"name": 3}, {"datatype": None}, {"datatype": ["UINT8"]}, {"shape": None}, {"shape": "2"}, {"shape": 2},
     {"shape": {}}, {"parameters": []}, {"parameters": "x"}, {"parameters": {}}, {"data": [1]}, {"data": {}}, {"data": "AA=="},
     {"parameters": {"binary_data_size": -1}}, {"parameters": {"binary_data_size": True}},
     {"parameters": {"binary_data_size": "120"}}, {"parameters": {"binary_data_size": 120.0}},
     {"parameters": {"binary_data_size": 2**64 - 1}}, {"parameters": {"binary_data_size": 10**30}},
     {"parameters": {"binary_data_size": 120, "shared_memory_region": "r", "shared_memory_byte_size": 120}}],
)  # fmt: skip
def test_an_input_with_a_field_of_another_type_is_a_400(change: dict[str, object]) -> None:
    assert refused({"inputs": [{**ENTRY, **change}]}).status == 400


@pytest.mark.parametrize(
    "change",
    [{"id": 7}, {"id": True}, {"id": ["a"]}, {"id": "a" * 1025}, {"parameters": []}, {"parameters": 1}, {"outputs": {}},
     {"outputs": "class_id"}, {"outputs": ["class_id"]}, {"outputs": [None]}, {"outputs": [{}]}, {"outputs": [{"name": 1}]},
     {"parameters": {"timeout": "5"}}, {"parameters": {"timeout": -1}}, {"parameters": {"timeout": 1.5}},
     {"parameters": {"timeout": True}}, {"parameters": {"priority": -1}}, {"parameters": {"priority": "high"}},
     {"parameters": {"binary_data_output": 1}}, {"parameters": {"binary_data_output": "true"}}],
)  # fmt: skip
def test_a_request_with_a_field_of_another_type_is_a_400(change: dict[str, object]) -> None:
    assert refused({**GOOD, **change}).status == 400


@pytest.mark.parametrize(
    "parameters",
    [{"classification": 0}, {"classification": -1}, {"classification": True}, {"classification": 1.0}, {"classification": "1"},
     {"binary_data": 1}, {"binary_data": "false"}, {"shared_memory_region": "r"}],
)  # fmt: skip
def test_an_output_with_a_bad_parameter_is_a_400_that_names_both(parameters: dict[str, object]) -> None:
    problem = refused({**GOOD, "outputs": [{"name": "probabilities", "parameters": parameters}]})
    assert problem.status == 400
    assert "'probabilities'" in problem.detail
    assert f"'{next(iter(parameters))}'" in problem.detail


def test_a_class_can_not_be_classified() -> None:
    assert refused({**GOOD, "outputs": [{"name": "class_id", "parameters": {"classification": 1}}]}).status == 400


@pytest.mark.parametrize("name", ["", "logits", "Probabilities", "gate", "x" * 100_000, "\n"])
def test_unknown_inputs_and_outputs_are_400s_that_say_which_there_are(name: str) -> None:
    problem = refused({**GOOD, "outputs": [{"name": name}]})
    assert problem.status == 400
    assert "'class_id'" in problem.detail
    problem = refused({"inputs": [{**ENTRY, "name": name}]})
    assert problem.status == 400
    assert "'image_bytes'" in problem.detail


def test_inputs_and_outputs_given_twice_are_400s() -> None:
    for problem in (refused({"inputs": [ENTRY, ENTRY]}), refused({**GOOD, "outputs": [{"name": "class_id"}] * 2})):
        assert problem.status == 400
        assert "twice" in problem.detail


def test_images_in_both_inputs_are_a_400() -> None:
    files = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": ["AA=="]}
    for inputs in ([ENTRY, files], [files, ENTRY]):
        problem = refused({"inputs": inputs})
        assert problem.status == 400
        assert "either" in problem.detail


def test_a_timeout_of_any_size_is_a_deadline() -> None:
    deadline_s = parsed({**GOOD, "parameters": {"timeout": 2**64 - 1}}, BINARY).deadline_s
    assert deadline_s is not None
    assert deadline_s > 1e12


SCALARS: st.SearchStrategy[object] = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5), st.sampled_from([0, 1, 2, 3, HEIGHT, WIDTH, 120, "FP32", "UINT8", "BYTES", "images", "image_bytes",
                                          "class_id", "probabilities", "NHWC", "AA=="]),
)  # fmt: skip
NAMES = st.sampled_from(
    ["name", "datatype", "shape", "data", "parameters", "inputs", "outputs", "id", "binary_data_size", "layout", "timeout",
     "classification", "binary_data", "binary_data_output", "content_type"]
)  # fmt: skip
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)), max_leaves=12
)


@st.composite
def mangled_headers(draw: st.DrawFn) -> object:
    """A good request in which up to three places hold something else, or nothing."""
    entries = [
        ENTRY,
        tensor(pictures(1)),
        {"name": "image_bytes", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(BINARY)}},
        {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": ["AA=="]},
    ]
    outputs = [{"name": "probabilities", "parameters": {"classification": 2, "binary_data": True}}, {"name": "class_id"}]
    header = {"id": "1", "parameters": {"timeout": 1}, "inputs": [draw(st.sampled_from(entries))], "outputs": outputs}
    value: Any = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(0, 3))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(JSON_VALUES)
            break
    return value


def survive(body: bytearray, header_length: str | None) -> None:
    """Parse and decode: a picture or a refusal, and nothing else."""

    def answer() -> tuple[InferRequest, np.ndarray]:
        request = parse_infer(body, header_length, LIMITS)
        return request, request.decode(DECODER, lambda: False)

    result = attempt(answer)
    if isinstance(result, Problem):
        assert result.status in (400, 413, 415, 422)
        assert len(result.detail) < 500
        assert orjson.dumps(result.detail)
    else:
        request, images = result
        assert images.shape == (request.images, 3, HEIGHT, WIDTH)
        assert 1 <= request.images <= LIMITS.max_images


@given(
    header=mangled_headers(),
    binary=st.one_of(st.just(BINARY), st.just(length_prefixed(b"a", b"b")), st.binary(max_size=200)),
    off=st.sampled_from([0, 0, 0, 1, -1]),
)
@settings(max_examples=600, deadline=None)
def test_a_mangled_request_is_answered_or_refused_and_never_breaks_anything(header: object, binary: bytes, off: int) -> None:
    text = orjson.dumps(header)
    survive(bytearray(text + binary), str(len(text) + off))
    survive(bytearray(text), None)


@given(body=st.binary(max_size=300), header_length=st.one_of(st.none(), st.integers(-5, 400).map(str), st.text(max_size=4)))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_answered_or_refused(body: bytes, header_length: str | None) -> None:
    survive(bytearray(body), header_length)
