"""Metadata and statistics: what clients learn of the model, and what a policy keeps from them."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service.metrics import FOLDER, Metrics
from service.v2.metadata import ModelCard, configuration, describe_model, describe_server
from service.v2.routes import Counted
from service.v2.statistics import statistics
from tests.service.conftest import PATIENCE_S, SharedEngine, serve_in_process
from tests.service.watch.pictures import photos
from tests.service.watch.test_watched_service import OPEN, Unsure, infer

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


async def test_a_suspect_sees_the_outputs_that_it_gets(engine: SharedEngine) -> None:
    settings = {**OPEN, "watch_off_distribution": "on", "watch_horizon_images": 10, "watch_false_alarms": 0.5}
    stub: Any = Unsure(engine)
    async with serve_in_process(stub, **settings) as served, served.client() as client:

        async def outputs() -> tuple[list[str], list[str]]:
            model = (await client.get("/v2/models/palisade")).json()["outputs"]
            config = (await client.get("/v2/models/palisade/config")).json()["output"]
            return [each["name"] for each in model], [each["name"] for each in config]

        assert await outputs() == (["probabilities", "class_id"],) * 2
        assert (await infer(client, photos(60, seed=3))).status_code == 200
        assert await outputs() == (["class_id"],) * 2


class Slow(Collector):
    """Metrics that take as long to read as the test wants."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.reads = 0
        self.gave_up = False

    def collect(self) -> Iterator[Metric]:
        self.reads += 1
        self.begun.set()
        self.gave_up |= not self.go_on.wait(PATIENCE_S)
        yield from ()


async def test_reading_the_counts_holds_nobody_up_and_is_done_once_for_all_who_ask(engine: SharedEngine) -> None:
    slow = Slow()
    async with serve_in_process(engine) as served, served.client() as client:
        slow.go_on.set()
        served._metrics.registry.register(slow)
        slow.reads = 0
        slow.go_on.clear()
        slow.begun.clear()
        asked = [asyncio.create_task(client.get("/v2/models/palisade/stats")) for _ in range(10)]
        await served.eventually(slow.begun.is_set)
        assert (await client.get("/healthz")).status_code == 200
        slow.go_on.set()
        replies = await asyncio.gather(*asked)
    assert not slow.gave_up, "the rest of the service went on meanwhile"
    assert {reply.status_code for reply in replies} == {200}
    assert slow.reads == 1


async def test_the_files_of_many_processes_are_not_read_for_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, registry = Slow(), CollectorRegistry()
    slow.go_on.set()
    registry.register(slow)
    slow.reads = 0
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("service.v2.routes.KEPT_S", 1000.0)
    counted = Counted(registry)
    assert await counted.of("a") == await counted.of("a")
    assert slow.reads == 1
    assert (await counted.of("b"))["model_stats"][0]["version"] == "b", "another model is told at once"
    monkeypatch.delenv(FOLDER)
    exact = Counted(registry)
    slow.reads = 0
    await exact.of("a")
    await exact.of("a")
    assert slow.reads == 2
