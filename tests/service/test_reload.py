"""Reloading, step by step: a real scheduler whose engines the test holds and lets go."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import EMBEDDED, read_header
from service.garage import ThreadGarage
from service.identity import Caller
from service.metrics import Metrics
from service.problems import Problem
from service.reload import Reloader
from service.scheduler import Scheduler
from service.serving import ModelFacts
from service.settings import Settings
from service.snapshot import Snapshot
from tests.service.conftest import PATIENCE_S
from tests.service.watch.pictures import photos

ANN = Caller("192.0.2.1", "trusted")


class HeldEngine:
    """Answers every image with its own number, as soon as the test lets it."""

    lanes, is_up, facts = 1, True, ModelFacts("", "", "", "")

    def __init__(self, number: int) -> None:
        self.version, self._number = f"version {number}", number
        self.free = asyncio.Event()
        self.alive = asyncio.Event()
        self.alive.set()
        self.batches = 0
        self.is_stopped = False

    async def up(self) -> None:
        await self.alive.wait()

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        self.batches += 1
        await self.free.wait()
        return np.full((len(images), 2), self._number, np.float32)

    async def stop(self) -> None:
        self.is_stopped = True
        self.alive.set()


class Held:
    """A scheduler and the garage of its engines; ``ready`` says when a new one is loaded and warm, ``told`` when all know."""

    def __init__(self, **settings: Any) -> None:
        self.engine, self.next = HeldEngine(1), HeldEngine(2)
        chosen = Settings(**{"max_batch_size": 2, "max_queue_delay_ms": 0, "limits": "off", **settings})
        self.scheduler = Scheduler(chosen, self.engine, Metrics())
        self.ready, self.made, self.told = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.told.set()
        self.bug: Exception | None = None

    async def make(self, snapshot: Snapshot) -> HeldEngine:
        snapshot.close()
        await self.ready.wait()
        self.made.set()
        if self.bug:
            raise self.bug
        return self.next

    async def changed(self, engine: HeldEngine) -> None:
        self.engine = engine
        await self.told.wait()

    def reloader(self, checkpoint: Path) -> Reloader:
        return Reloader(str(checkpoint), read_header(checkpoint), self.scheduler, self)

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
async def held(**settings: Any) -> AsyncIterator[Held]:
    each = Held(**settings)
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "vote, 9 of them"), ({"aggregation": "gate"}, "are weighed by a gate"), ({"num_experts": 7}, "vote, 7 of them")],
    ids=["the same weights without certificates", "gate", "voters"],
)
async def test_a_certified_vote_is_not_replaced_by_what_callers_can_tell_from_it(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    vote = {"aggregation": "vote", "num_experts": 9}
    certified = save_untrained(tmp_path / "certified.safetensors", vote, {"partitions": 9})
    other = save_untrained(tmp_path / "other.safetensors", vote | changes, {})
    if not changes:
        assert read_header(certified).weights_sha256 == read_header(other).weights_sha256
    async with held() as each:
        before, reloader = each.engine, each.reloader(certified)
        each.ready.set()
        with pytest.raises(Problem) as caught:
            await reloader.reload(str(other))
        assert (caught.value.status, caught.value.reason) == (409, "does-not-fit")
        assert f"its experts {words}, those of the model in use vote, 9 of them, with certificates;" in caught.value.detail
        assert str(other) in caught.value.detail
        assert each.engine is before
        assert not before.is_stopped
        assert (await reloader.reload(None)).outcome == "done"


def save_untrained(path: Path, architecture: dict[str, Any], data: dict[str, Any]) -> Path:
    """Write a mixture whose weights are always the same, as far as the architecture is."""
    import torch

    from model.architecture import Architecture
    from model.checkpoint import Header, save_checkpoint
    from model.mixture import Mixture

    torch.manual_seed(0)
    mixture = Mixture(Architecture(width=2, num_classes=3, gate_width=2, height=8, input_width=8, **architecture))
    save_checkpoint(path, mixture, Header(mixture.architecture, ("ant", "bee", "cat"), "", data=data))
    return path


async def test_one_reload_at_a_time_and_the_second_is_told_so(checkpoint: Path) -> None:
    async with held() as each:
        before = each.engine
        reloader = each.reloader(checkpoint)
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


async def test_a_request_that_the_engine_never_answers_holds_nobody_else_up_for_ever(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.scheduler.LONGEST_BATCH_S", 0.0)
    async with held(request_deadline_ms=20) as each:
        stuck = asyncio.create_task(each.ask(1))
        await settle()
        assert each.engine.batches == 1
        each.ready.set()
        reloader = each.reloader(checkpoint)
        with pytest.raises(Problem) as caught:
            await asyncio.wait_for(reloader.reload(None), PATIENCE_S)
        assert (caught.value.status, caught.value.reason) == (503, "reload-failed")
        assert each.next.is_stopped
        assert not each.engine.is_stopped
        assert not reloader.is_busy
        assert reloader.last is not None
        assert (reloader.last.outcome, reloader.last.version) == ("refused", "version 1")
        each.engine.free.set()
        assert await stuck == ("version 1", [1])
        assert await each.ask(2) == ("version 1", [1])


async def test_an_engine_that_died_before_its_turn_does_not_get_it(checkpoint: Path) -> None:
    async with held() as each:
        each.ready.set()
        each.engine.free.set()
        each.next.is_up = False
        with pytest.raises(Problem) as caught:
            await each.reloader(checkpoint).reload(None)
        assert (caught.value.status, caught.value.reason) == (503, "reload-failed")
        assert each.next.is_stopped
        assert await each.ask(1) == ("version 1", [1])


async def test_a_reload_that_is_given_up_leaves_no_engine(checkpoint: Path) -> None:
    async with held() as each:
        stuck = asyncio.create_task(each.ask(1))
        each.ready.set()
        reloading = asyncio.create_task(each.reloader(checkpoint).reload(None))
        await each.made.wait()
        await settle()
        reloading.cancel()
        await asyncio.wait([reloading])
        assert reloading.cancelled()
        assert each.next.is_stopped
        each.engine.free.set()
        assert await stuck == ("version 1", [1])


async def test_what_waits_for_a_dead_engine_goes_to_the_new_one_before_all_know_of_it(checkpoint: Path) -> None:
    async with held() as each:
        each.ready.set()
        each.told.clear()
        each.next.free.set()
        each.engine.alive.clear()
        lost = asyncio.create_task(each.ask(1))
        await settle()  # the batcher waits for the dead engine
        lost.cancel()  # and whoever asked has gone
        await asyncio.wait([lost])
        reloading = asyncio.create_task(each.reloader(checkpoint).reload(None))
        async with asyncio.timeout(PATIENCE_S):
            while each.scheduler.version != "version 2":  # noqa: ASYNC110 (it sets no event)
                await asyncio.sleep(0.001)
            assert await each.ask(2) == ("version 2", [2])
        assert not reloading.done()
        each.told.set()
        assert (await reloading).outcome == "done"


async def test_an_error_that_nobody_foresaw_is_the_last_reload_too(checkpoint: Path) -> None:
    async with held() as each:
        each.ready.set()
        each.bug = LookupError("a bug")
        reloader = each.reloader(checkpoint)
        with pytest.raises(LookupError):
            await reloader.reload(None)
        assert reloader.last is not None
        assert (reloader.last.outcome, reloader.last.version) == ("failed", "version 1")
        assert not reloader.is_busy


async def test_a_service_that_is_about_to_stop_loads_nothing(checkpoint: Path) -> None:
    async with held() as each:
        each.ready.set()
        each.scheduler.turn_unready()
        with pytest.raises(Problem) as caught:
            await each.reloader(checkpoint).reload(None)
        assert (caught.value.status, caught.value.reason) == (503, "draining")


async def test_another_model_is_judged_as_its_weights_say(checkpoint: Path) -> None:
    """The calibration of ``off-distribution`` is the embedded checkpoint's, whatever the file is called."""

    async def is_suspected(each: Held, images: int) -> bool:
        """Whether somebody is once that many answers more were unsure; 73 prove it."""
        watch, pictures = each.scheduler._watch, photos(images, next(seeds))
        unsure = np.where(np.arange(10) == np.arange(images)[:, None] % 10, 0.19, 0.09).astype(np.float32)
        await watch.after(ANN, pictures, unsure, await watch.before(ANN, pictures))
        return bool(await each.scheduler.suspects())

    seeds = itertools.count()
    async with held(limits="on", watch_distances="off") as each:
        assert not await is_suspected(each, 120), "an unknown model"
        each.next.version = read_header(EMBEDDED["compact"]).weights_sha256[:12]
        await each.scheduler.change_engine(each.next)
        assert not await is_suspected(each, 60)
        await each.scheduler.change_engine(each.next)
        assert not await is_suspected(each, 60), "what was seen of the model before is no evidence"
        assert await is_suspected(each, 60), "120 answers of the embedded one"
        assert await each.scheduler.forgive(ANN.id)
        await each.scheduler.change_engine(each.engine)
        assert not await is_suspected(each, 120), "an unknown one again"


async def test_a_thread_that_loads_for_nobody_keeps_the_bytes_it_reads(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    seen: list[Any] = []

    class SlowEngine:
        def __init__(self, settings: Settings, _: Metrics) -> None:
            begun.set()
            go_on.wait(PATIENCE_S)
            seen.append(read_header(settings.checkpoint) == read_header(checkpoint))

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setattr("service.garage.Engine", SlowEngine)
    snapshot = Snapshot(str(checkpoint))
    engine: Any = HeldEngine(1)
    making = asyncio.create_task(ThreadGarage(Settings(), Metrics(), engine).make(snapshot))
    await asyncio.to_thread(begun.wait, PATIENCE_S)
    making.cancel()
    await asyncio.wait([making])
    go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while len(seen) < 2:  # noqa: ASYNC110 (another thread's doing)
            await asyncio.sleep(0.001)
    assert seen == [True, "closed"]
    assert snapshot.file == -1
