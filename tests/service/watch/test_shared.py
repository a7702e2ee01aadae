"""Watches of several replicas, which share what they notice through a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.identity import Caller
from service.metrics import Metrics
from service.quota_store import Store
from service.settings import Settings
from service.watch import Watch
from service.watch.shared import Shared
from tests.service.conftest import PATIENCE_S
from tests.service.redis_server import RedisServer, needs_redis, redis_server
from tests.service.test_quota_outage import until
from tests.service.watch.pictures import photos
from tests.service.watch.test_watch import ANN, BOB, World, needed_images, search, sure, unsure

pytestmark = needs_redis

SECRET = "pepper-and-salt"
LIMIT = 30
ADDRESS = Caller("192.0.2.77", "anonymous")
EVE_TOO = Caller("eve-too", "anonymous")


class Replica(World):
    """A watch that shares, with a clock that the test moves and the store's time between replicas."""

    def __init__(self, server: RedisServer, **settings: Any) -> None:
        chosen = Settings(**{"watch_sequence_images": LIMIT, "limiter_secret": SECRET, **settings})
        self.now = 5000.0
        self.metrics = Metrics()
        self.store = Store(server.url, PATIENCE_S, lambda up: None)
        self.shared = Shared(self.store, chosen, self.metrics)
        self.watch = Watch(chosen, self.metrics, lambda: self.now, shared=self.shared)

    async def hear(self) -> None:
        """Be told what the background would be told soon, once what was begun is done."""
        await self.told()
        await self.shared.follow()

    async def told(self) -> None:
        """Wait until others can know what was noticed here."""
        await self.shared.flush()
        while self.shared._tasks:
            await asyncio.wait(self.shared._tasks)

    def unshared(self) -> float:
        return self.metrics.registry.get_sample_value("palisade_limiter_fallback_total", {"decision": "unshared"}) or 0.0


@asynccontextmanager
async def replicas(server: RedisServer, count: int, **settings: Any) -> AsyncIterator[list[Replica]]:
    running = [Replica(server, **settings) for _ in range(count)]
    for each in running:
        await each.store.start()
        await each.watch.start()
    yield running
    for each in running:
        await each.watch.finish()
        each.store.stop()
        assert each.store._heart is not None
        await asyncio.wait([each.store._heart])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    """A server without any key."""
    running.client.flushall()
    return running


def alone(secret: bytes, **settings: Any) -> World:
    """A watch that shares nothing, with the same key of fingerprints."""
    world = World(watch_sequence_images=LIMIT, **settings)
    world.watch = Watch(Settings(watch_sequence_images=LIMIT, **settings), world.metrics, lambda: world.now, secret)
    return world


async def ask_in_turn(worlds: list[Replica], caller: Caller, images: np.ndarray, rows: np.ndarray | None = None) -> int:
    """Send images one by one, to each replica in turn; returns how many were answered before one was refused."""
    for index in range(len(images)):
        row = None if rows is None else rows[index : index + 1]
        world = worlds[index % len(worlds)]
        if not await world.ask(caller, images[index : index + 1], row):
            return index
        await world.hear()
    return len(images)


@pytest.mark.parametrize("count", [2, 3])
async def test_a_search_that_a_load_balancer_spreads_is_refused_as_early_as_at_one(server: RedisServer, count: int) -> None:
    async with replicas(server, count, watch_distances="off") as worlds:
        steps = search(60)
        answered = await ask_in_turn(worlds, ADDRESS, steps)
        assert answered == await alone(worlds[0].shared.secret, watch_distances="off").ask(ADDRESS, steps)
        assert LIMIT - 2 <= answered <= LIMIT + 4
        for world in worlds:
            assert await world.ask(ADDRESS, search(61)[60:]) == 0, "refused everywhere from then on"
            assert await world.ask(BOB, photos(3, seed=4)) == 3


async def test_images_that_arrive_at_several_replicas_at_once_are_all_counted(server: RedisServer) -> None:
    async with replicas(server, 3, watch_distances="off") as worlds:
        steps = search(LIMIT + 20)
        looks = (worlds[index % 2].watch.before(ANN, steps[index : index + 1]) for index in range(LIMIT - 4))
        await asyncio.gather(*looks)
        assert await worlds[2].ask(ANN, steps[LIMIT - 4 :]) <= 8


async def test_a_thief_at_two_replicas_is_suspect_at_all_by_the_evidence_of_both(server: RedisServer) -> None:
    async with replicas(server, 3, watch_distances="off") as worlds:
        needed = needed_images()
        images, rows = photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)])
        await ask_in_turn(worlds[:2], ADDRESS, images[:-1], rows[:-1])
        for world in worlds:
            await world.hear()
            assert await world.watch.treat(ADDRESS) == ADDRESS
        await worlds[0].ask(ADDRESS, images[-1:], rows[-1:])
        for world in worlds:
            await world.hear()
            assert await world.watch.treat(ADDRESS) == Caller(ADDRESS.id, "suspect")
            assert await world.suspected() == [(ADDRESS.id, "off-distribution")]
            assert (await world.watch.suspects())[0].images == 1
        assert [world.counted("off-distribution") for world in worlds] == [1, 0, 0], "counted by the one that was asked"


async def test_the_answer_after_others_evidence_is_a_suspects_at_once(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        needed = needed_images()
        await one.ask(ANN, photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)]))
        await one.told()
        await other.watch.before(ANN, photos(1, seed=3))
        assert await other.watch.treat(ANN) == Caller("ann", "suspect")


async def test_distances_that_were_found_elsewhere_count(server: RedisServer) -> None:
    async with replicas(server, 2) as worlds:
        seeds = photos(150, seed=6)
        sign = np.random.default_rng(6).choice([-25, 25], (*seeds.shape[:2], 8, 8)).repeat(4, axis=2).repeat(4, axis=3)
        made = np.clip(seeds + sign, 0, 255).astype(np.uint8)
        rows = np.stack([sure(label) for label in range(150)])
        await ask_in_turn(worlds, BOB, np.concatenate([seeds, made]), np.concatenate([rows, rows]))
        for world in worlds:
            await world.hear()
            assert await world.suspected() == [("bob", "distances")]


async def test_an_image_is_judged_once_whichever_replica_it_comes_to(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as worlds:
        count = needed_images() // 2 + 1
        images, rows = photos(count, seed=2), np.stack([unsure(index) for index in range(count)])
        for world in worlds:
            await world.ask(ANN, images, rows)
            await world.hear()
        for world in worlds:
            assert await world.suspected() == []


async def test_who_is_forgiven_at_one_is_forgiven_everywhere(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        needed = needed_images()
        images, rows = photos(needed + 9, seed=2), np.stack([unsure(index) for index in range(needed + 9)])
        assert await ask_in_turn([one, other], ANN, search(60)) < 60
        await ask_in_turn([one, other], ANN, images[:needed], rows[:needed])
        assert await other.watch.forgive("ann")
        await one.hear()
        for world in (one, other):
            assert await world.suspected() == []
            assert await world.watch.treat(ANN) == ANN
        assert await ask_in_turn([one, other], ANN, images[needed:], rows[needed:]) == 9
        assert await ask_in_turn([one, other], ANN, search(20)) == 20
        for world in (one, other):
            await world.hear()
            assert await world.suspected() == [], "nothing is held against it any more"
        assert not await one.watch.forgive("ann")


async def test_a_replica_that_never_met_a_suspect_lists_and_forgives_it_by_what_the_store_calls_it(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        await one.ask(ADDRESS, search(60))
        await one.hear()
        await other.hear()
        ((name, detector),) = await other.suspected()
        assert detector == "near-duplicates"
        assert name.startswith("hash:")
        assert ADDRESS.id not in name
        assert not await other.watch.forgive("hash:" + "0" * 32)
        assert await other.watch.forgive(name)
        await one.hear()
        assert await one.suspected() == []
        assert await one.ask(ADDRESS, search(20)) == 20


async def test_a_service_that_was_restarted_goes_on_where_it_was(server: RedisServer) -> None:
    needed = needed_images()
    images, rows = photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)])
    async with replicas(server, 1, watch_distances="off") as (before,):
        await before.ask(ADDRESS, images, rows)
        assert await before.ask(BOB, search(LIMIT - 5)) == LIMIT - 5
        await before.ask(ANN, images[:-1], rows[:-1])
    async with replicas(server, 1, watch_distances="off") as (after,):
        assert await after.watch.treat(ADDRESS) == Caller(ADDRESS.id, "suspect")
        assert await after.ask(BOB, search(60)[LIMIT - 5 :]) <= 9
        await after.ask(ANN, images[-1:], rows[-1:])
        assert await after.watch.treat(ANN) == Caller("ann", "suspect")


async def test_who_makes_a_replica_forget_them_goes_on_where_they_were(server: RedisServer) -> None:
    async with replicas(server, 1, watch_distances="off", watch_max_callers=4) as (world,):
        steps = search(60)
        assert await world.ask(ADDRESS, steps[: LIMIT - 5]) == LIMIT - 5
        for number in range(5):
            assert await world.ask(Caller(f"198.51.100.{number}", "anonymous"), photos(1, seed=4)) == 1
        assert await world.ask(ADDRESS, steps[LIMIT - 5 :]) <= 9


async def test_answers_of_a_model_are_weighed_where_the_same_one_answers(server: RedisServer) -> None:
    async with replicas(server, 3, watch_distances="off") as (one, same, updated):
        needed = needed_images()
        for world, version in ((one, "0a"), (same, "0a"), (updated, "0b")):
            world.watch.model_changed(True, version)
        images, rows = photos(needed + 1, seed=2), np.stack([unsure(index) for index in range(needed + 1)])
        await one.ask(ANN, images[: needed - 1], rows[: needed - 1])
        await one.told()
        await updated.ask(ANN, images[needed:], rows[needed:])
        assert not await updated.watch.is_suspect("ann")
        await same.ask(ANN, images[needed - 1 : needed], rows[needed - 1 : needed])
        assert await same.watch.is_suspect("ann")


def make_older(server: RedisServer, seconds: int) -> None:
    """Let what lies in the store have been written earlier."""
    client: Any = server.client
    for key in client.keys("palisade:watch:2:*") + client.keys("palisade:suspicions:2"):
        for field, value in client.hgetall(key).items():
            at, colon, entry = value.partition(b":")
            if colon:
                client.hset(key, field, b"%d:%b" % (int(at) - 1_000_000 * seconds, entry))


async def test_evidence_that_led_to_a_suspicion_which_is_over_renews_it_nowhere(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        count = needed_images() + 4
        images, rows = photos(count + 5, seed=2), np.stack([unsure(index) for index in range(count + 5)])
        await one.ask(ANN, images[:count], rows[:count])
        await one.told()
        await other.watch.before(ANN, photos(1, seed=3))
        make_older(server, 7200)
        for world in (one, other):
            assert await world.watch.is_suspect("ann")
            world.now += 7200
        await one.ask(ANN, images[count:], rows[count:])
        await one.told()
        async with replicas(server, 1, watch_distances="off") as (late,):
            for world in (one, other, late):
                await world.watch.before(ANN, photos(1, seed=3))
                await world.hear()
                assert not await world.watch.is_suspect("ann")


async def test_without_the_store_each_replica_goes_on_alone_and_says_so(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with replicas(server, 2, watch_distances="off") as (one, other):
            assert await ask_in_turn([one, other], ANN, search(10)) == 10
            server.kill()
            answered = await one.ask(ANN, search(60)[10:])
            assert LIMIT - 14 <= answered <= LIMIT - 4, "what both had seen counts on"
            assert await one.suspected() == [("ann", "near-duplicates")]
            assert one.unshared() >= answered
            assert await one.watch.forgive("ann")
            assert await one.ask(ANN, search(20)) == 20
            server.start()  # empty
            for world in (one, other):
                await until(lambda world=world: world.store.is_up)  # type: ignore[misc]
                await world.hear()
            assert await ask_in_turn([one, other], BOB, search(60)) <= LIMIT + 4


async def test_who_is_forgiven_while_the_store_is_down_stays_so_when_it_is_back_with_its_data(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with replicas(server, 2, watch_distances="off") as (one, other):
            needed = needed_images()
            images, rows = photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)])
            await ask_in_turn([one, other], ANN, images, rows)
            assert await ask_in_turn([one, other], ANN, search(60)) < 60
            await one.hear()
            one.store._timeout_s = 0.2
            with server.frozen():
                await one.watch.before(BOB, photos(1, seed=3))
                assert not one.store.is_up
                assert await one.watch.forgive("ann")
                assert await one.ask(ANN, search(5)) == 5
            one.store._timeout_s = PATIENCE_S
            await until(lambda: one.store.is_up)
            assert await one.ask(ANN, search(20)[5:]) == 15
            for world in (one, other):
                await world.hear()
                assert await world.suspected() == []
            assert await other.ask(ANN, search(8, seed=1)) == 8
            async with replicas(server, 1, watch_distances="off") as (late,):
                assert await late.ask(ANN, photos(3, seed=4)) == 3
                assert await late.suspected() == []


async def test_what_could_not_be_told_in_an_outage_is_told_after_it(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with replicas(server, 2, watch_distances="off") as (one, other):
            needed = needed_images()
            images, rows = photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)])
            server.kill()
            await one.ask(ANN, images[:-1], rows[:-1])
            await one.ask(ADDRESS, search(60))
            await one.told()
            server.start()
            for world in (one, other):
                await until(lambda world=world: world.store.is_up)  # type: ignore[misc]
            await one.hear()
            await other.hear()
            assert [detector for _, detector in await other.suspected()] == ["near-duplicates"]
            assert len(await one.suspected()) == 1
            await other.ask(ANN, images[-1:], rows[-1:])
            assert await other.watch.is_suspect("ann")


async def test_a_store_that_comes_back_as_it_was_earlier_hides_nothing_that_is_told_from_then_on(server: RedisServer) -> None:
    client: Any = server.client
    async with replicas(server, 3, watch_distances="off") as (one, other, third):
        steps = search(60)
        await one.ask(BOB, search(60, seed=7))
        await ask_in_turn([one, other, third], ANN, steps[:6])
        copies = {key: client.dump(key) for key in client.keys("palisade:watch:2:*") + client.keys("palisade:suspicions:2")}
        await ask_in_turn([one, other], ANN, photos(60, seed=4))
        await one.ask(EVE_TOO, search(60, seed=8))
        for world in (one, other, third):
            await world.hear()
        await third.watch.before(ANN, photos(1, seed=5))
        for key, copy in copies.items():
            client.restore(key, 3_600_000, copy, replace=True)
        await one.ask(ANN, steps[6:14])
        await other.ask(ANN, steps[14 : LIMIT - 4])
        for world in (other, third):
            assert await world.ask(ANN, steps[LIMIT - 4 : LIMIT + 8]) < 12
        needed = needed_images()
        await third.ask(ADDRESS, photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)]))
        for world in (third, one, other):
            await world.hear()
            await world.hear()
            assert await world.watch.is_suspect(ADDRESS.id)


async def test_answers_that_an_older_copy_of_the_store_still_has_are_not_weighed_again(server: RedisServer) -> None:
    client: Any = server.client
    async with replicas(server, 2, watch_distances="off", watch_recent_images=8) as (one, other):
        count = needed_images() // 2 + 1
        await ask_in_turn([one], ANN, photos(count, seed=2), np.stack([unsure(index) for index in range(count)]))
        await other.watch.before(ANN, photos(1, seed=3))
        (journal,) = client.keys("palisade:watch:2:*")
        copy = client.dump(journal)
        await other.ask(ANN, photos(20, seed=4))
        client.restore(journal, 3_600_000, copy, replace=True)
        for world in (other, one):
            await world.watch.before(ANN, photos(1, seed=5))
            assert not await world.watch.is_suspect("ann")


async def test_what_lies_in_the_store_is_bounded_and_has_no_address_in_it(server: RedisServer) -> None:
    async with replicas(server, 1, watch_recent_images=8, watch_memory_minutes=10) as (world,):
        await world.ask(ADDRESS, photos(100, seed=5))
        await world.ask(ADDRESS, search(60))
        await world.hear()
        client: Any = server.client
        (journal,) = client.keys("palisade:watch:2:*")
        assert client.hlen(journal) == 4 * 8 + 2
        assert 0 < client.pttl(journal) <= 10 * 60_000
        assert max(len(value) for value in client.hvals(journal)) < 400
        assert 0 < client.pttl("palisade:suspicions:2") <= 25 * 3_600_000
        everything = str([(key, client.hgetall(key)) for key in client.keys("*")])
        for secret in (ADDRESS.id, SECRET, repr(world.shared.secret)[2:-1]):
            assert secret not in everything


async def test_without_a_secret_of_the_operators_replicas_agree_on_one(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with replicas(server, 1, watch_distances="off", limiter_secret="") as (one,):
            server.kill()
            late = Replica(server, watch_distances="off", limiter_secret="")
            await late.store.start()
            await late.watch.start()
            assert await late.ask(ANN, search(5)) == 5, "it has one of its own until then"
            server.start()
            for world in (one, late):
                await until(lambda world=world: world.store.is_up)  # type: ignore[misc]
                await world.hear()
            assert one.shared.secret == late.shared.secret
            assert await ask_in_turn([one, late], BOB, search(60)) <= LIMIT + 4
            await late.watch.finish()
            late.store.stop()
            assert late.store._heart is not None
            await asyncio.wait([late.store._heart])


async def test_entries_of_another_form_are_passed_over(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        await one.ask(ANN, search(3))
        await one.hear()
        client: Any = server.client
        (journal,) = client.keys("palisade:watch:2:*")
        client.hset(journal, "2", b"junk")
        client.hset(journal, "3", b"1:" + b"12345678" + b"Znew")
        client.hset("palisade:suspicions:2", mapping={"epoch": "1", "count": "2", "1": b"1:12345678N", "2": b""})
        await other.hear()
        assert await ask_in_turn([one, other], ANN, search(60)[3:]) <= LIMIT + 4


async def test_what_nobody_thought_of_costs_no_answer_and_sharing_goes_on(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        with monkeypatch.context() as broken:
            broken.setattr(one.watch, "_heed", None)
            broken.setattr(one.watch, "_replay", None)
            broken.setattr(one.shared, "_heed", None)
            await ask_in_turn([other], ANN, search(60))
            await until(lambda: one.unshared() >= 1)
            assert await one.ask(ANN, photos(3, seed=4)) == 3
            assert await one.ask(BOB, search(12)) == 12
        assert "goes on alone" in caplog.text
        await other.ask(ADDRESS, search(60))
        await other.told()
        await until(lambda: len(one.watch._suspects.list()) == 1)
        assert await other.ask(BOB, search(60)[12:]) <= LIMIT - 6


@pytest.mark.parametrize("fault", ["type", "count"])
async def test_a_key_that_cannot_be_read_costs_neither_quotas_their_store_nor_the_watch_more_than_its_journal(
    server: RedisServer, fault: str
) -> None:
    ups: list[bool] = []
    client: Any = server.client
    async with replicas(server, 2, watch_distances="off") as (one, other):
        await ask_in_turn([one, other], ANN, search(9))
        one.store._on_change = ups.append
        (journal,) = client.keys("palisade:watch:2:*")
        for key in (journal, "palisade:suspicions:2"):
            if fault == "type":
                client.set(key, "abc")
            else:
                client.hset(key, mapping={"epoch": "1", "count": "abc"})
        assert await one.ask(ANN, search(12)[9:]) == 3
        assert one.unshared() >= 1
        await one.hear()
        await one.ask(BOB, search(60))
        for world in (one, other):
            await world.hear()
            await world.hear()
            assert [detector for _, detector in await world.suspected()] == ["near-duplicates"]
        assert await ask_in_turn([one, other], ANN, search(60)[12:]) <= LIMIT - 6
        assert ups == []


async def test_many_images_at_once_are_shared_whole_by_a_store_that_was_new_meanwhile(server: RedisServer) -> None:
    async with replicas(server, 2, watch_distances="off") as (one, other):
        needed = needed_images()
        images, rows = photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)])
        await one.ask_together(ANN, images, rows)
        server.client.script_flush()
        await one.hear()
        await other.watch.before(ANN, images)
        assert await other.watch.is_suspect("ann")
