"""Quotas while their store is killed, frozen or read-only: a real Redis, and a clock that stands still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.metrics import Metrics
from service.quota import BudgetUnknownError, Charge, QuotaExceededError, RequestTooLargeError, parse_windows
from service.quota_outage import OutageLimiter
from service.quota_redis import RedisLimiter
from service.quota_store import Store
from tests.service.conftest import PATIENCE_S
from tests.service.redis_server import RedisServer, needs_redis, redis_server
from tests.service.test_quota import FakeClock, at_once

pytestmark = needs_redis


class Desk:
    """A limiter, what it stands on and what an operator sees of it."""

    def __init__(self, server: RedisServer, limits: str, fail_open: bool, timeout_s: float) -> None:
        self.metrics = Metrics()
        self.clock = FakeClock()
        self.store = Store(server.url, timeout_s, lambda up: self.metrics.limiter_store_up.set(int(up)))
        shared = RedisLimiter(self.store, "anonymous", parse_windows(limits), b"", self.clock)
        self.limiter = OutageLimiter(shared, 100, fail_open, self.metrics, self.clock)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"palisade_limiter_{name}", labels) or 0.0

    def without_store(self, decision: str) -> float:
        return self.metric("fallback_total", decision=decision)

    async def becomes(self, up: int) -> None:
        await until(lambda: self.metric("store_up") == up)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (the condition is the tested code's, which sets no event)
            await asyncio.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def desk_at(
    server: RedisServer, limits: str = "5/minute;8/day", fail_open: bool = True, timeout_s: float = PATIENCE_S
) -> AsyncIterator[Desk]:
    desk = Desk(server, limits, fail_open, timeout_s)
    await desk.store.start()
    assert desk.metric("store_up") == 1
    yield desk
    desk.store.stop()
    assert desk.store._heart is not None
    await asyncio.wait([desk.store._heart])


async def remaining(desk: Desk, caller: str = "a") -> list[int]:
    return [level.remaining for level in await desk.limiter.levels(caller)]


async def test_without_the_store_short_windows_are_counted_here_and_long_ones_waived(server: RedisServer) -> None:
    async with desk_at(server, "5/minute;8/day;9/lifetime") as desk:
        lost = await desk.limiter.charge("a", 5)
        server.kill()
        charge = await desk.limiter.charge("a", 4)  # more than the day had left
        assert desk.metric("store_up") == 0
        assert [(level.window.name, level.remaining) for level in charge.levels] == [("minute", 1)]
        assert await remaining(desk) == [1]
        with pytest.raises(QuotaExceededError) as refusal:
            await desk.limiter.charge("a", 2)
        assert refusal.value.level.window.name == "minute"
        with pytest.raises(RequestTooLargeError):
            await desk.limiter.charge("a", 6)
        desk.limiter.refund(charge)
        desk.limiter.refund(lost)  # nobody knows of it any more
        assert await remaining(desk) == [5]
        assert [desk.without_store(decision) for decision in ("granted", "refused", "closed")] == [1, 1, 0]
        server.start()  # empty
        await desk.becomes(1)
        assert await remaining(desk) == [5, 8, 9]
        await desk.limiter.charge("a", 3)
        assert await remaining(desk) == [2, 5, 6]
        assert desk.without_store("granted") == 1


async def test_failing_closed_means_that_nobody_may_use_a_budget_that_is_not_counted(server: RedisServer) -> None:
    async with desk_at(server, fail_open=False) as desk:
        server.kill()
        with pytest.raises(BudgetUnknownError):
            await desk.limiter.charge("a", 1)
        assert desk.without_store("closed") == 1
        server.start()
        await desk.becomes(1)
        assert (await desk.limiter.charge("a", 1)).levels[1].remaining == 7


async def test_failing_closed_leaves_a_tier_alone_that_has_short_windows_only(server: RedisServer) -> None:
    async with desk_at(server, "3/second;5/minute", fail_open=False) as desk:
        server.kill()
        assert [level.remaining for level in (await desk.limiter.charge("a", 3)).levels] == [0, 2]
        with pytest.raises(QuotaExceededError):
            await desk.limiter.charge("a", 1)
        desk.clock.now += 1
        await desk.limiter.charge("a", 2)


async def test_only_those_who_meet_the_outage_wait_for_it(server: RedisServer) -> None:
    async with desk_at(server, timeout_s=2.0) as desk:  # for what is to answer; what meets the outage waits it out
        with server.frozen():
            charges = await asyncio.gather(*(desk.limiter.charge(caller, 1) for caller in "abc"))
            assert [charge.levels[0].remaining for charge in charges] == [4, 4, 4]
            for left in (3, 2, 1):
                charge: Charge = at_once(desk.limiter.charge("a", 1))
                assert charge.levels[0].remaining == left
            assert desk.metric("store_up") == 0
        await desk.becomes(1)
        assert len((await desk.limiter.charge("a", 1)).levels) == 2


async def test_an_outage_is_noticed_and_its_end_too_when_nobody_asks(server: RedisServer) -> None:
    async with desk_at(server) as desk:
        server.kill()
        await desk.becomes(0)
        server.start()
        await desk.becomes(1)


async def test_a_store_that_answers_but_does_not_write_is_down(server: RedisServer) -> None:
    async with desk_at(server) as desk:
        server.client.replicaof("127.0.0.1", 1)
        await desk.becomes(0)
        assert server.client.ping()
        assert len((await desk.limiter.charge("a", 1)).levels) == 1
        server.client.replicaof("NO", "ONE")
        await desk.becomes(1)


async def test_a_service_may_start_before_its_store(server: RedisServer) -> None:
    server.kill()
    desk = Desk(server, "5/minute;8/day", True, PATIENCE_S)
    assert desk.metric("store_up") == 0
    await desk.store.start()
    assert len((await desk.limiter.charge("a", 1)).levels) == 1
    server.start()
    await desk.becomes(1)
    assert await remaining(desk) == [5, 8]
    desk.store.stop()
    assert desk.store._heart is not None
    await asyncio.wait([desk.store._heart])


async def test_a_refund_counts_before_the_callers_next_charge(server: RedisServer) -> None:
    async with desk_at(server) as desk:
        for _ in range(20):
            desk.limiter.refund(await desk.limiter.charge("a", 5))
        assert await remaining(desk) == [5, 8]


async def test_a_caller_who_leaves_while_the_store_thinks_harms_nobody(server: RedisServer) -> None:
    async with desk_at(server) as desk:
        with server.frozen():
            leaving = [asyncio.create_task(desk.limiter.charge("a", 1)) for _ in range(40)]  # more than there are connections
            await asyncio.sleep(0)
            for task in leaving[::2]:
                task.cancel()
        await asyncio.wait(leaving)
        assert desk.metric("store_up") == 1
        granted = sum(not task.cancelled() and task.exception() is None for task in leaving)
        assert 1 <= granted <= 5
        assert (await remaining(desk))[0] <= 5 - granted
        assert [(await desk.limiter.charge(caller, 5)).levels[0].remaining for caller in "bcd"] == [0, 0, 0]
