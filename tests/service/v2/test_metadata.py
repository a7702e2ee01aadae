"""Metadata and statistics: what clients learn of the model, and what a policy keeps from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from service.metrics import Metrics
from service.v2.metadata import ModelCard, configuration, describe_model, describe_server
from service.v2.statistics import statistics

CARD = ModelCard(version="abc", classes=10, height=32, width=40, max_images=128, max_queue_delay_us=2000, label_only=False)
HIDDEN = dataclasses.replace(CARD, label_only=True)


def test_the_model_is_described_as_the_protocol_says() -> None:
    assert describe_model(CARD) == {
        "name": "palisade",
        "versions": ["abc"],
        "platform": "palisade",
        "inputs": [
            {"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 40]},
            {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "class_id", "datatype": "INT64", "shape": [-1]},
        ],
    }


def test_the_configuration_tells_of_the_same_tensors_without_the_batch() -> None:
    told = configuration(CARD)
    assert {one["name"]: (one["data_type"], one["dims"]) for one in told["input"]} == {
        "images": ("TYPE_FP32", [3, 32, 40]),
        "image_bytes": ("TYPE_STRING", [1]),
    }
    assert {one["name"]: (one["data_type"], one["dims"]) for one in told["output"]} == {
        "probabilities": ("TYPE_FP32", [10]),
        "class_id": ("TYPE_INT64", [1]),
    }
    assert told["max_batch_size"] == 128
    assert told["dynamic_batching"]["max_queue_delay_microseconds"] == 2000


@pytest.mark.parametrize("describe", [describe_model, configuration])
def test_under_label_only_there_seem_to_be_no_probabilities(describe) -> None:  # type: ignore[no-untyped-def]
    assert "probabilities" in str(describe(CARD))
    assert "probabilities" not in str(describe(HIDDEN))
    assert "class_id" in str(describe(HIDDEN))


def test_the_server_says_which_extensions_it_has() -> None:
    server = describe_server()
    assert server["name"] == "palisade"
    assert {"binary_tensor_data", "classification"} <= set(server["extensions"])


def test_statistics_add_up_what_was_counted() -> None:
    metrics = Metrics()
    empty = statistics(metrics.registry, "abc")["model_stats"][0]
    assert empty["inference_count"] == empty["execution_count"] == 0
    infer = "/v2/models/{model}/infer"
    metrics.request_over(infer, 200, 0.5, None)
    metrics.request_over(infer.replace("/infer", "/versions/{version}/infer"), 200, 0.25, None)
    metrics.request_over(infer, 429, 0.0, "quota-exceeded")
    metrics.request_over("/v1/classify", 200, 9.0, None)
    metrics.answered(("cat", "dog"), np.array([0, 1, 1]))
    for images, seconds in ((2, 0.125), (1, 0.25)):
        metrics.batch_formed(images)
        metrics.batch_done(seconds, np.full((images, 2), 0.5))
        metrics.waited(0.0625)
    metrics.decode.observe(0.5)
    (model,) = statistics(metrics.registry, "abc")["model_stats"]
    assert (model["name"], model["version"]) == ("palisade", "abc")
    assert (model["inference_count"], model["execution_count"]) == (3, 2)
    stats = model["inference_stats"]
    assert stats["success"] == {"count": 2, "ns": 750_000_000}
    assert stats["fail"]["count"] == 1
    assert stats["queue"] == {"count": 2, "ns": 125_000_000}
    assert stats["compute_input"] == {"count": 1, "ns": 500_000_000}
    assert stats["compute_infer"] == {"count": 2, "ns": 375_000_000}
    assert stats["compute_output"] == {"count": 0, "ns": 0}
