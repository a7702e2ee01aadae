"""Reloading, step by step: a real scheduler whose engines the test holds and lets go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import read_header
from service.identity import Caller
from service.metrics import Metrics
from service.problems import Problem
from service.reload import Reloader
from service.scheduler import Scheduler
from service.serving import ModelFacts
from service.settings import Settings
from service.snapshot import Snapshot
from tests.service.conftest import PATIENCE_S

ANN = Caller("192.0.2.1", "trusted")


class HeldEngine:
    """Answers every image with its own number, as soon as the test lets it."""

    lanes, is_up, facts = 1, True, ModelFacts("", "", "", "")

    def __init__(self, number: int) -> None:
        self.version, self._number = f"version {number}", number
        self.free = asyncio.Event()
        self.batches = 0
        self.is_stopped = False

    async def up(self) -> None: ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        self.batches += 1
        await self.free.wait()
        return np.full((len(images), 2), self._number, np.float32)

    async def stop(self) -> None:
        self.is_stopped = True


class Held:
    """A scheduler and the garage of its engines; ``ready`` says when a new one is loaded and warm."""

    def __init__(self) -> None:
        self.engine, self.next = HeldEngine(1), HeldEngine(2)
        settings = Settings(max_batch_size=2, max_queue_delay_ms=0, limits="off")
        self.scheduler = Scheduler(settings, self.engine, Metrics())
        self.ready = asyncio.Event()

    async def make(self, snapshot: Snapshot) -> HeldEngine:
        snapshot.close()
        await self.ready.wait()
        return self.next

    async def changed(self, engine: HeldEngine) -> None:
        self.engine = engine

    async def ask(self, *values: int) -> tuple[str, list[float]]:
        """The version and the first number of each row."""
        ticket = await self.scheduler.admit(ANN, len(values))
        images = np.zeros((len(values), 3, 8, 8), np.uint8)
        images[:, 0, 0, 0] = values
        try:
            rows = await self.scheduler.answer(ticket, images, time.monotonic() + PATIENCE_S)
        finally:
            self.scheduler.settle(ticket, False)
        return ticket.version, rows[:, 0].tolist()


@asynccontextmanager
async def held() -> AsyncIterator[Held]:
    each = Held()
    await each.scheduler.start()
    yield each
    each.scheduler.stop()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_of_many_batches_is_answered_by_one_engine_and_the_next_request_by_the_other() -> None:
    async with held() as each:
        first = asyncio.create_task(each.ask(1, 2, 3, 4, 5))
        await settle()
        assert each.engine.batches == 1
        changing = asyncio.create_task(each.scheduler.change_engine(each.next))
        await settle()
        second = asyncio.create_task(each.ask(6))
        await settle()
        assert not changing.done()
        each.engine.free.set()
        assert await first == ("version 1", [1] * 5)
        assert await changing is each.engine
        each.next.free.set()
        assert await second == ("version 2", [2])
        assert each.engine.batches == 3


async def test_answers_of_the_engine_before_are_not_given_again_even_those_that_were_on_their_way() -> None:
    async with held() as each:
        each.engine.free.set()
        each.next.free.set()
        assert await each.ask(1) == ("version 1", [1])
        each.engine.free.clear()
        late = asyncio.create_task(each.ask(2))
        await settle()
        changing = asyncio.create_task(each.scheduler.change_engine(each.next))
        await settle()
        each.engine.free.set()
        await changing
        assert await late == ("version 1", [1])
        assert await each.ask(1, 2, 3) == ("version 2", [2, 2, 2])


async def test_one_reload_at_a_time_and_the_second_is_told_so(checkpoint: Path) -> None:
    async with held() as each:
        before = each.engine
        reloader = Reloader(str(checkpoint), read_header(checkpoint), each.scheduler, each)
        first = asyncio.create_task(reloader.reload(None))
        await settle()
        with pytest.raises(Problem) as caught:
            await reloader.reload(None)
        assert (caught.value.status, caught.value.reason) == (409, "reload-in-progress")
        each.ready.set()
        outcome = await first
        assert (outcome.outcome, outcome.previous, outcome.version) == ("done", "version 1", "version 2")
        assert before.is_stopped
        assert not each.next.is_stopped
        assert reloader.last == outcome
        each.next.free.set()
        assert await each.ask(1) == ("version 2", [2])
