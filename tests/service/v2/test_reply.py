"""Replies: protected answers as tensors, in every form that a request may ask for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.policy import Policy
from service.problems import Problem, quota_exceeded
from service.v2.reply import problem_response, render_infer
from service.v2.request import InferRequest
from tests.service.v2.messages import parsed, pictures, reply_tensors, tensor

LABELS = ("ant", "bee:wasp", "caf\u00e9", "dog")
EXACT = np.array([[0.115, 0.6249, 0.2501, 0.01], [0.333, 0.332, 0.334, 0.001]], np.float32)


def asked(*outputs: dict[str, Any], **more: Any) -> InferRequest:
    return parsed({"inputs": [tensor(pictures(2))], "outputs": list(outputs), **more})


def rendered(request: InferRequest, policy: Policy) -> tuple[bytes, dict[str, str]]:
    return render_infer(request, policy.protect(EXACT), LABELS, "v7")


def named(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


ROUGH = Policy("anonymous", 1)
FINE = Policy("trusted", 6)


def test_a_reply_names_the_model_its_version_and_echoes_the_id() -> None:
    body, headers = rendered(asked(id="q\u2603"), ROUGH)
    reply = json.loads(body)
    assert (reply["model_name"], reply["model_version"], reply["id"]) == ("palisade", "v7", "q\u2603")
    assert headers == {"Content-Type": "application/json"}
    assert "id" not in json.loads(rendered(asked(), ROUGH)[0])


def test_all_outputs_come_in_json_unless_asked_otherwise() -> None:
    outputs = json.loads(rendered(asked(), ROUGH)[0])["outputs"]
    assert outputs == [
        {"name": "probabilities", "datatype": "FP32", "shape": [2, 4], "data": [0.1, 0.6, 0.3, 0.0, 0.3, 0.3, 0.3, 0.0]},
        {"name": "class_id", "datatype": "INT64", "shape": [2], "data": [1, 2]},
    ]


@pytest.mark.parametrize("names", [["probabilities"], ["class_id"], ["class_id", "probabilities"]])
def test_the_outputs_that_are_named_come_in_that_order(names: list[str]) -> None:
    reply = json.loads(rendered(asked(*[{"name": name} for name in names]), ROUGH)[0])
    assert [output["name"] for output in reply["outputs"]] == names


@pytest.mark.parametrize("whole", [True, False, None])
@pytest.mark.parametrize("own", [True, False, None])
def test_an_outputs_own_choice_of_form_beats_the_requests(whole: bool | None, own: bool | None) -> None:
    parameters = {} if own is None else {"binary_data": own}
    request = asked(named("class_id", **parameters), {"name": "probabilities"}, parameters={"binary_data_output": whole})
    body, headers = rendered(request, ROUGH)
    binary = {"class_id": bool(whole if own is None else own), "probabilities": bool(whole)}
    length = int(headers.get("Inference-Header-Content-Length", len(body)))
    for output in json.loads(body[:length])["outputs"]:
        assert ("data" in output) != binary[output["name"]]
    assert ("Inference-Header-Content-Length" in headers) == any(binary.values())
    assert headers["Content-Type"] == f"application/{'octet-stream' if any(binary.values()) else 'json'}"
    tensors = reply_tensors(body, headers)
    assert tensors["class_id"].tolist() == [1, 2]
    np.testing.assert_array_equal(tensors["probabilities"], np.array([[0.1, 0.6, 0.3, 0], [0.3, 0.3, 0.3, 0]], np.float32))


@pytest.mark.parametrize("binary", [True, False])
def test_classification_gives_the_best_classes_as_strings(binary: bool) -> None:
    request = asked(named("probabilities", classification=2, binary_data=binary), named("class_id", binary_data=binary))
    tensors = reply_tensors(*rendered(request, FINE))
    assert tensors["probabilities"].tolist() == [
        ["0.624900:1:bee:wasp", "0.250100:2:caf\u00e9"],
        ["0.334000:2:caf\u00e9", "0.333000:0:ant"],
    ]
    assert tensors["class_id"].tolist() == [1, 2]


def test_classification_puts_the_answer_first_and_shows_no_order_among_rounded_ties() -> None:
    tensors = reply_tensors(*rendered(asked(named("probabilities", classification=4)), ROUGH))
    assert tensors["probabilities"][1].tolist() == [
        "0.300000:2:caf\u00e9", "0.300000:0:ant", "0.300000:1:bee:wasp", "0.000000:3:dog",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [5, 2**63, 2**64 - 1])
def test_more_classes_than_there_are_give_all_of_them(count: int) -> None:
    tensors = reply_tensors(*rendered(asked(named("probabilities", classification=count)), FINE))
    assert tensors["probabilities"].shape == (2, 4)


def test_top_n_hides_the_other_probabilities_in_every_form() -> None:
    policy = Policy("anonymous", 2, top_n=2)
    dense = reply_tensors(*rendered(asked(), policy))["probabilities"]
    np.testing.assert_array_equal(dense, np.array([[0, 0.62, 0.25, 0], [0.33, 0, 0.33, 0]], np.float32))
    texts = reply_tensors(*rendered(asked(named("probabilities", classification=4)), policy))["probabilities"]
    assert texts.tolist() == [
        ["0.620000:1:bee:wasp", "0.250000:2:caf\u00e9"],
        ["0.330000:2:caf\u00e9", "0.330000:0:ant"],
    ]


def test_label_only_shows_the_class_and_refuses_probabilities_by_name() -> None:
    policy = Policy("anonymous", 2, label_only=True)
    for request in (asked(), asked({"name": "class_id"}), asked(parameters={"binary_data_output": True})):
        request.check(policy)
        tensors = reply_tensors(*rendered(request, policy))
        assert {name: values.tolist() for name, values in tensors.items()} == {"class_id": [1, 2]}
    for request in (
        asked({"name": "probabilities"}),
        asked(named("probabilities", classification=1)),
        asked({"name": "class_id"}, named("probabilities", binary_data=True)),
    ):
        with pytest.raises(Problem, match="probabilities") as caught:
            request.check(policy)
        assert caught.value.status == 403
        request.check(ROUGH)


@given(
    rows=st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=2, max_size=2),
    decimals=st.integers(0, 6),
    top_n=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_every_form_tells_the_same(rows: list[list[float]], decimals: int, top_n: int) -> None:
    protected = Policy("anonymous", decimals, top_n).protect(np.array(rows, np.float32))
    forms = [
        reply_tensors(*render_infer(request, protected, LABELS, "v"))
        for request in (asked(), asked(parameters={"binary_data_output": True}))
    ]
    for form in forms:
        np.testing.assert_array_equal(form["probabilities"], forms[0]["probabilities"])
        np.testing.assert_array_equal(form["class_id"], forms[0]["class_id"])
    texts = reply_tensors(*render_infer(asked(named("probabilities", classification=4)), protected, LABELS, "v"))
    for row, best, strings in zip(forms[0]["probabilities"], forms[0]["class_id"], texts["probabilities"], strict=True):
        told = {int(index): np.float32(value) for value, index, _ in (text.split(":", 2) for text in strings)}
        assert list(told)[0] == best  # noqa: RUF015 (an empty reply must fail)
        assert list(told.values()) == sorted(told.values(), reverse=True)
        for index, value in enumerate(row):
            assert told.get(index, 0) == value


def test_a_problem_is_an_error_in_exactly_json() -> None:
    response = problem_response(quota_exceeded("minute", 3))
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "3"
    assert list(json.loads(bytes(response.body))) == ["error"]
