"""The watch in a running service: what callers meet, and what the operator sees."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from tests.service.conftest import SharedEngine, serve_in_process
from tests.service.v2.messages import message, tensor
from tests.service.watch.pictures import levels, photos

OPEN: dict[str, Any] = {
    "limits": "on",
    "tier_anonymous_limits": "",
    "watch_distances": "off",
    "max_images_per_request": 64,
}


class Unsure:
    """An engine that is never sure, and names another class for another picture."""

    version = "0123456789ab"
    lanes = 1

    def __init__(self, real: SharedEngine) -> None:
        self.header = real.header

    async def up(self) -> None: ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        del alone
        labels = images.reshape(len(images), -1).sum(axis=1, dtype=np.int64) % 10
        return np.where(np.arange(10) == labels[:, None], 0.19, 0.09).astype(np.float32)


async def infer(client: httpx.AsyncClient, images: np.ndarray) -> httpx.Response:
    return await client.post("/v2/models/palisade/infer", content=bytes(message({"inputs": [tensor(images)]})[0]))


def steps(count: int) -> np.ndarray:
    """One picture with one value more and more changed: steps of a search."""
    images = np.repeat(photos(1, seed=1), count, axis=0).astype(np.int16)
    for index, image in enumerate(images):
        image[0, index % 32, index // 32] += 9
    return levels(images)


async def test_a_search_is_refused_charged_nothing_and_forgiven(engine: SharedEngine) -> None:
    settings = {**OPEN, "tier_anonymous_limits": "40/day", "watch_sequence_images": 20}
    async with serve_in_process(engine, **settings) as served, served.client() as client:
        assert (await infer(client, steps(20))).status_code == 200
        refused = await infer(client, steps(30)[20:])
        assert refused.status_code == 429
        assert refused.json()["error"].startswith("image")
        assert "nearly equal images" in refused.json()["error"]
        assert int(refused.headers["Retry-After"]) == 3600
        assert "r=20" in refused.headers["RateLimit"], "a refused request is charged nothing"
        assert served.metric("palisade_suspicious_total", detector="near-duplicates") >= 1
        assert served.metric("palisade_rejected_total", reason="abnormal-usage-detected") == 1
        assert (await infer(client, photos(4, seed=2))).status_code == 200
        scheduler: Any = served.service._scheduler
        (suspect,) = await scheduler.suspects()
        assert (suspect.caller, suspect.detector) == ("192.0.2.1", "near-duplicates")
        assert await scheduler.forgive("192.0.2.1")
        assert (await infer(client, steps(30)[20:])).status_code == 200


async def test_a_suspect_gets_labels_and_a_smaller_quota(engine: SharedEngine) -> None:
    settings = {
        **OPEN,
        "watch_off_distribution": "on",
        "watch_horizon_images": 10,
        "watch_false_alarms": 0.5,
        "suspect_limits": "9/hour",
    }
    strange = photos(60, seed=3)
    stub: Any = Unsure(engine)
    async with serve_in_process(stub, **settings) as served, served.client() as client:
        first = await infer(client, strange[:5])
        assert {output["name"] for output in first.json()["outputs"]} == {"probabilities", "class_id"}
        second = await infer(client, strange)
        assert {output["name"] for output in second.json()["outputs"]} == {"class_id"}, "no more from the moment on"
        assert served.metric("palisade_suspicious_total", detector="off-distribution") > 0
        again = await infer(client, strange[:3])
        assert [output["name"] for output in again.json()["outputs"]] == ["class_id"]
        assert again.json()["outputs"][0]["data"] == first.json()["outputs"][1]["data"][:3], "the labels are true"
        assert again.headers["RateLimit-Policy"] == '"hour";q=9;w=3600'
        assert (await infer(client, strange[:7])).status_code == 429
        view = (await client.get("/v1/model")).json()
        assert view["policy"] == {"tier": "suspect", "decimals": 1, "top_n": 1, "label_only": True}
        assert view["quota"][0]["limit"] == 9
        async with served.client("192.0.2.2") as other:
            assert len((await infer(other, strange[:1])).json()["outputs"]) == 2, "nobody else is concerned"


async def test_scores_that_were_asked_for_by_name_are_refused_from_the_moment_of_suspicion_on(engine: SharedEngine) -> None:
    settings = {**OPEN, "watch_off_distribution": "on", "watch_horizon_images": 10, "watch_false_alarms": 0.5}
    stub: Any = Unsure(engine)
    asked = {"inputs": [tensor(photos(60, seed=3))], "outputs": [{"name": "probabilities"}]}
    async with serve_in_process(stub, **settings) as served, served.client() as client:
        reply = await client.post("/v2/models/palisade/infer", content=bytes(message(asked)[0]))
        assert reply.status_code == 403
        assert "0.19" not in reply.text
