"""The scheduler from afar: a real scheduler and both ends of a real socket pair in one event loop, with a fake engine."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from model.architecture import Architecture
from service.identity import Caller
from service.metrics import Metrics
from service.problems import Problem
from service.remote import RemoteCaller, RemoteScheduler, slots_of
from service.scheduler import Scheduler
from service.settings import Settings
from service.slab import Slab
from tests.service.conftest import PATIENCE_S

TINY = Architecture(width=1, num_classes=2, height=8, input_width=8)
ANN = Caller("192.0.2.1", "anonymous")


class FirstPixelEngine:
    """Answers every image with its own first pixel and that plus one, unless the test holds it."""

    lanes, version = 1, "first"

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []
        self.free = asyncio.Event()
        self.free.set()
        self.broken = False

    async def up(self) -> None: ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        self.batches.append(images)
        await self.free.wait()
        if self.broken:
            raise RuntimeError("out of memory")
        first = images[:, 0, 0, 0].astype(np.float32)  # (B,)
        return np.stack([first, first + 1], axis=1)


class HastySlab(Slab):
    """Shared with a scheduler that answers so fast that the answers are there as soon as the images are."""

    def write(self, slots: list[int] | slice, images: np.ndarray) -> str:
        self.write_answers(slots, np.full((len(images), 2), -1, np.float32))
        return super().write(slots, images)


class Pair:
    """Both ends, running; ``remote`` is the front end's."""

    def __init__(self, slots: int | None = None, limits: str = "", places: int = 6) -> None:
        chosen = Settings(
            max_batch_size=4, max_queue_delay_ms=0, max_queue_images=places, answer_cache_images=0,
            tier_anonymous_watch="off",  # one-coloured pictures are all alike
            tier_anonymous_limits=limits,  # type: ignore[arg-type]  # as the environment has it
        )  # fmt: skip
        self.engine, self._metrics = FirstPixelEngine(), Metrics()
        self.scheduler = Scheduler(chosen, self.engine, self._metrics)
        slots = slots or slots_of(chosen)
        memory = Slab.make_file(slots, TINY)
        self._ours, theirs = socket.socketpair()
        self.closed, self.leaving, self.drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.caller = RemoteCaller(self.scheduler, Slab(memory, slots, TINY), self.closed.set)
        slab = HastySlab(memory, slots, TINY)
        self.remote = RemoteScheduler(lambda wire: wire.open(theirs), slab, slots, self.leaving.set, self.drained.set)
        os.close(memory)

    async def __aenter__(self) -> Pair:
        await self.scheduler.start()
        await self.caller.wire.open(self._ours)
        await self.remote.start()
        await self.caller.is_open.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.remote.stop()
        await self.closed.wait()
        await self.drained.wait()
        self.scheduler.stop()

    @property
    def places(self) -> float | None:
        """Queue places held, as an operator sees them."""
        return self._metrics.registry.get_sample_value("palisade_queue_images")

    async def ask(self, *values: int) -> list[int]:
        """What a request does from its admission on; returns the first pixels that came back."""
        ticket = await self.remote.admit(ANN, len(values))
        try:
            rows = await self.remote.answer(ticket, pictures(*values), in_time())
        finally:
            self.remote.settle(ticket, False)
        np.testing.assert_array_equal(rows[:, 1], rows[:, 0] + 1)
        return rows[:, 0].astype(int).tolist()

    async def left(self) -> int:
        (level,) = await self.scheduler.levels(ANN)
        return level.remaining


def pictures(*values: float, kind: type = np.uint8) -> np.ndarray:
    images = np.zeros((len(values), 3, 8, 8), kind)
    images[:, 0, 0, 0] = values
    return images


def in_time() -> float:
    return time.monotonic() + PATIENCE_S


async def until(condition: Callable[[], Any]) -> None:
    """Let both ends work until something has happened."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (the condition is the tested code's, which sets no event)
            await asyncio.sleep(0)


async def test_answers_are_read_before_their_slots_are_used_again() -> None:
    async with Pair(places=64) as pair:

        async def ask_on(first: int) -> list[list[int]]:
            return [await pair.ask(first + turn) for turn in range(8)]

        answers = await asyncio.gather(*(ask_on(8 * task) for task in range(20)))
        assert answers == [[[8 * task + turn] for turn in range(8)] for task in range(20)]


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
async def test_pixels_reach_the_engine_as_they_were_and_answers_come_back_in_order(kind: type) -> None:
    async with Pair() as pair:
        images = (np.random.default_rng(0).random((5, 3, 8, 8)) * (255 if kind is np.uint8 else 1)).astype(kind)
        ticket = await pair.remote.admit(ANN, 5)
        rows = await pair.remote.answer(ticket, images, in_time())
        pair.remote.settle(ticket, False)
        seen = np.concatenate(pair.engine.batches)
        assert seen.dtype == kind
        np.testing.assert_array_equal(seen, images)
        np.testing.assert_array_equal(rows[:, 0], images[:, 0, 0, 0].astype(np.float32))
        assert rows.dtype == np.float32


async def test_what_is_left_of_a_quota_is_told_with_the_admission_and_when_asked() -> None:
    async with Pair(limits="5/minute;20/day") as pair:
        ticket = await pair.remote.admit(ANN, 3)
        asked = await pair.remote.levels(ANN)
        for levels in (ticket.levels, asked):
            assert [(level.window.name, level.window.quota, level.remaining) for level in levels] == [
                ("minute", 5, 2),
                ("day", 20, 17),
            ]
            assert 0 < levels[0].reset_s <= 60


async def refusal(asking: Any) -> Problem:
    with pytest.raises(Problem) as refused:
        await asking
    return refused.value


async def test_refusals_keep_their_status_their_words_and_their_headers() -> None:
    async with Pair(limits="4/day") as pair:
        never = await refusal(pair.remote.admit(ANN, 5))
        assert (never.status, never.reason, never.headers) == (413, "too-large", {})
        assert never.detail == "5 images in one request, but the quota is 4 per day: send fewer"
        held = await pair.remote.admit(ANN, 3)
        over = await refusal(pair.remote.admit(ANN, 2))
        assert (over.status, over.reason) == (429, "quota-exceeded")
        assert "images per day is used up" in over.detail
        assert 86000 < int(over.headers["Retry-After"]) <= 86400
        assert pair.places == 3
        full = await refusal(pair.remote.admit(Caller("192.0.2.2", "anonymous"), 4))
        assert (full.status, full.reason, full.headers) == (503, "overloaded", {"Retry-After": "1"})
        assert full.detail == "3 images are waiting and the queue holds 6; try again"
        pair.remote.settle(held, True)
        await until(lambda: pair.places == 0)
        assert await pair.left() == 4


async def test_failures_on_the_way_to_an_answer_keep_their_status_too() -> None:
    async with Pair() as pair:
        ticket = await pair.remote.admit(ANN, 1)
        late = await refusal(pair.remote.answer(ticket, pictures(1), time.monotonic() - 1))
        assert (late.status, late.reason) == (504, "deadline-passed")
        pair.remote.settle(ticket, True)
        pair.engine.broken = True
        failed = await refusal(pair.ask(1))
        assert (failed.status, failed.reason, failed.headers) == (503, "engine-failed", {"Retry-After": "1"})
        pair.engine.broken = False
        assert await pair.ask(2) == [2]
        await until(lambda: pair.places == 0)


async def test_a_thousand_cancelled_requests_leave_no_place_and_no_slot_behind() -> None:
    async with Pair() as pair:
        for number in range(250):
            mine = [[number % 60 * 4 + index] * (1 + index % 2) for index in range(4)]
            tasks = [asyncio.create_task(pair.ask(*values)) for values in mine]
            for _ in range(number % 23):  # at whatever point of their way
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            for values, answer in zip(mine, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
                assert answer == values or isinstance(answer, asyncio.CancelledError)
            await until(lambda: pair.places == 0)
        pair.engine.free.clear()
        six = asyncio.create_task(pair.ask(1, 2, 3, 4, 5, 6))  # one batch, and two in the queue
        await until(lambda: pair.places == 2)
        four = asyncio.create_task(pair.ask(7, 8, 9, 10))
        await until(lambda: pair.places == 6)
        pair.engine.free.set()
        assert await six == [1, 2, 3, 4, 5, 6]
        assert await four == [7, 8, 9, 10]


async def test_every_slot_can_be_used_again_after_cancellations() -> None:
    async with Pair(slots=6) as pair:
        pair.engine.free.clear()
        with_engine = asyncio.create_task(pair.ask(1, 2))
        await until(lambda: pair.engine.batches)
        waiting = asyncio.create_task(pair.ask(3, 4, 5, 6))
        await until(lambda: pair.places == 4)
        for task in (with_engine, waiting):
            task.cancel()
        await asyncio.gather(with_engine, waiting, return_exceptions=True)
        await until(lambda: pair.places == 0)
        pair.engine.free.set()
        assert await pair.ask(11, 12, 13, 14, 15, 16) == [11, 12, 13, 14, 15, 16]
        assert not any(3 in batch[:, 0, 0, 0] for batch in pair.engine.batches), "nobody waits for it any more"


async def test_a_slot_is_not_used_again_before_the_scheduler_has_let_go_of_it() -> None:
    async with Pair(slots=1) as pair:
        first, second = await pair.remote.admit(ANN, 1), await pair.remote.admit(ANN, 1)
        left = asyncio.create_task(pair.remote.answer(first, pictures(1), in_time()))
        await asyncio.sleep(0)  # its message is on its way
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        refused = await refusal(pair.remote.answer(second, pictures(2), in_time()))
        assert (refused.status, refused.headers) == (503, {"Retry-After": "1"})
        pair.remote.settle(first, False)
        await until(lambda: pair.places == 1)
        await pair.remote.levels(ANN)  # by now it has answered everything from before
        assert (await pair.remote.answer(second, pictures(3), in_time()))[0, 0] == 3
        pair.remote.settle(second, False)


async def test_a_request_that_leaves_before_it_was_admitted_holds_nothing() -> None:
    async with Pair(limits="100/day") as pair:
        for turns in range(8):
            leaving = asyncio.create_task(pair.remote.admit(ANN, 5))
            for _ in range(turns):
                await asyncio.sleep(0)
            leaving.cancel()
            (ticket,) = await asyncio.gather(leaving, return_exceptions=True)
            if not isinstance(ticket, BaseException):
                pair.remote.settle(ticket, False)
            await pair.remote.levels(ANN)
            await until(lambda: pair.places == 0)
        assert await pair.ask(1, 2, 3, 4, 5, 6) == [1, 2, 3, 4, 5, 6]


async def test_a_front_end_that_dies_gives_its_places_back_and_stays_charged() -> None:
    async with Pair(limits="20/day") as pair:
        pair.engine.free.clear()
        running = asyncio.create_task(pair.ask(1, 2))
        await until(lambda: pair.engine.batches)
        waiting = asyncio.create_task(pair.ask(3))
        await pair.remote.admit(ANN, 4)  # and nothing asked yet
        await until(lambda: pair.places == 5)
        pair.remote.stop()
        await pair.closed.wait()
        await until(lambda: pair.places == 0)
        assert await pair.left() == 20 - 2 - 1 - 4
        for task in (running, waiting):
            assert (await refusal(task)).status == 503
        pair.engine.free.set()  # others are still served
        ticket = await pair.scheduler.admit(ANN, 1)
        assert (await pair.scheduler.answer(ticket, pictures(9), in_time()))[0, 0] == 9
        assert not any(3 in batch[:, 0, 0, 0] for batch in pair.engine.batches)


async def test_a_front_end_whose_scheduler_dies_refuses_what_it_has_and_what_still_comes_and_stops() -> None:
    async with Pair() as pair:
        pair.caller.tell_up(True)
        pair.engine.free.clear()
        running = asyncio.create_task(pair.ask(1))
        await until(lambda: pair.engine.batches)
        ticket = await pair.remote.admit(ANN, 1)
        pair.caller.wire.close()
        refusals = [await refusal(running)]
        assert pair.drained.is_set()
        refusals.append(await refusal(pair.remote.levels(ANN)))
        refusals.append(await refusal(pair.remote.admit(ANN, 1)))
        refusals.append(await refusal(pair.remote.answer(ticket, pictures(1), in_time())))
        with pytest.raises(Problem) as down:
            pair.remote.check_up()
        for problem in (*refusals, down.value):
            assert problem.status == 503
            assert problem.headers["Retry-After"]


async def test_a_front_end_is_up_when_it_is_told_so() -> None:
    async with Pair() as pair:
        for up in (False, True, False):
            pair.caller.tell_up(up)
            await pair.remote.levels(ANN)  # comes after it
            if up:
                pair.remote.check_up()
            else:
                with pytest.raises(Problem, match="being loaded again"):
                    pair.remote.check_up()


async def test_a_front_end_that_is_told_to_stop_still_answers_what_it_has() -> None:
    async with Pair() as pair:
        pair.engine.free.clear()
        accepted = asyncio.create_task(pair.ask(1))
        await until(lambda: pair.engine.batches)
        pair.caller.tell_drain()
        await pair.drained.wait()
        pair.engine.free.set()
        assert await accepted == [1]


async def test_a_front_end_that_is_told_to_leave_goes_on() -> None:
    async with Pair() as pair:
        pair.caller.tell_leave()
        await pair.leaving.wait()
        assert not pair.drained.is_set()
        assert await pair.ask(1) == [1]
