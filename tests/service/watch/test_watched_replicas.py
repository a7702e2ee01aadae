"""Two services behind one Redis: what a caller meets whose requests are spread over them, and what the operator sees."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import PATIENCE_S, InProcess, SharedEngine, serve_in_process
from tests.service.redis_server import RedisServer, needs_redis, redis_server
from tests.service.watch.pictures import photos
from tests.service.watch.test_watched_service import OPEN, Unsure, infer, steps

pytestmark = needs_redis


def settings_for(server: RedisServer) -> dict[str, Any]:
    return {
        **OPEN,
        "limiter_store": server.url,
        "limiter_secret": "pepper-and-salt",
        "limiter_timeout_ms": 5000,
        "limiter_fail": "open",
        "watch_sequence_images": 20,
        "tier_anonymous_limits": "500/day",
    }


async def search(clients: list[httpx.AsyncClient], images: np.ndarray) -> int:
    """Send images one by one, to each service in turn; returns how many were answered before one was refused."""
    for index in range(len(images)):
        reply = await infer(clients[index % len(clients)], images[index : index + 1])
        assert reply.status_code in (200, 429)
        if reply.status_code == 429:
            assert "nearly equal images" in reply.json()["error"]
            return index
    return len(images)


async def test_replicas_refuse_suspect_and_forgive_together_and_each_alone_without_the_store(
    engine: SharedEngine, tmp_path_factory: Any
) -> None:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        chosen = settings_for(server)
        async with (
            serve_in_process(engine, **chosen) as one, serve_in_process(engine, **chosen) as other,
            one.client() as first, other.client() as second,
        ):  # fmt: skip
            async with one.client("192.0.2.2") as neighbour:
                at_one = await search([neighbour], steps(40))
            assert abs(await search([first, second], steps(40)) - at_one) <= 1
            for served in (one, other):
                await until_listed(served, ("192.0.2.1", "near-duplicates"))
            scheduler: Any = other.service._scheduler
            assert await scheduler.forgive("192.0.2.1")
            await until_listed(one, ("192.0.2.1", "near-duplicates"), listed=False)
            assert await search([first, second], steps(12)) == 12

            server.kill()
            async with one.client("192.0.2.3") as third, other.client("192.0.2.3") as fourth:
                apart = await search([third, fourth], steps(90))
                assert at_one + 5 < apart <= 2 * at_one + 2, "each counts for itself"
            assert one.metric("palisade_limiter_fallback_total", decision="unshared") >= 5
            assert one.metric("palisade_limiter_store_up") == 0


async def test_a_suspect_at_one_replica_gets_labels_and_the_suspects_quota_at_the_other(
    engine: SharedEngine, tmp_path_factory: Any
) -> None:
    strange = photos(60, seed=3)
    stub: Any = Unsure(engine)
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        chosen = {
            **settings_for(server),
            "watch_off_distribution": "on",
            "watch_horizon_images": 10,
            "watch_false_alarms": 0.5,
            "suspect_limits": "9/hour",
        }
        async with (
            serve_in_process(stub, **chosen) as one, serve_in_process(stub, **chosen) as other,
            one.client() as first, other.client() as second,
        ):  # fmt: skip
            assert (await second.get("/v1/model")).json()["policy"]["tier"] == "anonymous"
            assert [output["name"] for output in (await infer(first, strange)).json()["outputs"]] == ["class_id"]
            await until_listed(other, ("192.0.2.1", "off-distribution"))
            view = (await second.get("/v1/model")).json()
            assert view["policy"]["tier"] == "suspect"
            assert [(level["window"], level["remaining"]) for level in view["quota"]] == [("hour", 9), ("day", 440)]
            reply = await infer(second, photos(2, seed=4))
            assert [output["name"] for output in reply.json()["outputs"]] == ["class_id"]
            assert reply.headers["RateLimit"].startswith('"hour";r=7')


@pytest.mark.parametrize(
    ("off", "shares"),
    [
        ({}, True),
        ({"watch_near_duplicates": "off", "watch_off_distribution": "off", "watch_distances": "off"}, False),
        ({"tier_anonymous_watch": "off", "tier_standard_watch": "off", "tier_trusted_watch": "off"}, False),
    ],
)
async def test_where_nothing_is_watched_the_store_has_quotas_only(
    engine: SharedEngine, tmp_path_factory: Any, off: dict[str, str], shares: bool
) -> None:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        chosen = {**settings_for(server), **off, "limiter_secret": ""}
        async with serve_in_process(engine, **chosen) as served, served.client() as client:
            assert (await infer(client, photos(1, seed=1))).status_code == 200
            client_of_store: Any = server.client
            assert bool(client_of_store.keys("palisade:watch*")) is shares
            assert client_of_store.keys("palisade:quota:*")


async def until_listed(served: InProcess, suspicion: tuple[str, str], listed: bool = True) -> None:
    """Wait until a service lists a suspicion, or does not."""
    scheduler: Any = served.service._scheduler
    async with asyncio.timeout(PATIENCE_S):
        while (suspicion in [(each.caller, each.detector) for each in await scheduler.suspects()]) != listed:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
