"""The batcher, with a fake engine and a fake clock."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import Batcher
from service.problems import Problem


class FakeClock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Callable[..., Any], tuple[Any, ...], _Handle]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> _Handle:
        handle = _Handle()
        heapq.heappush(self._timers, (when, next(self._order), callback, args, handle))
        return handle

    async def advance(self, seconds: float) -> None:
        """Move on, fire what is due in order, and let every task run until it waits."""
        target = self.now + seconds
        await settle()
        while self._timers and self._timers[0][0] <= target:
            self.now, _, callback, args, handle = heapq.heappop(self._timers)
            if not handle.cancelled:
                callback(*args)
            await settle()
        self.now = target


class _Handle:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class FakeEngine:
    """Answers every image with its own first pixel, when the test lets it."""

    def __init__(self, automatic: bool = True, lanes: int = 1) -> None:
        self.lanes = lanes
        self.batches: list[list[int]] = []
        self.alone: list[bool] = []
        self.busy = self.stopped = 0
        self.disturbed = False  # something ran beside a batch that was to be alone
        self.fail_next = False
        self.forgetful = False
        self.running = asyncio.Event()
        self.running.set()
        self._automatic = automatic
        self._go = asyncio.Semaphore(0)
        self._loners = 0

    async def up(self) -> None:
        await self.running.wait()

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        self.alone.append(alone)
        self.batches.append(images[:, 0, 0, 0].tolist())
        self.disturbed |= bool(self._loners) or (alone and self.busy > 0)
        self.busy += 1
        self._loners += alone
        try:
            return await self._answer(images)
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        finally:
            self.busy -= 1
            self._loners -= alone

    async def _answer(self, images: np.ndarray) -> np.ndarray:
        if not self._automatic:
            await self._go.acquire()
        await asyncio.sleep(0)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory")
        answers = np.stack([images[:, 0, 0, 0], images[:, 0, 0, 0] + 1], axis=1).astype(np.float32)
        return answers[:-1] if self.forgetful else answers

    async def finish(self) -> None:
        self._go.release()
        await settle()


class NoObserver:
    def waited(self, seconds: float) -> None: ...

    def batch_formed(self, images: int) -> None: ...

    def queue_changed(self, images: int) -> None: ...


class Bench:
    """A batcher with its fakes, running."""

    def __init__(
        self, *, batch: int = 4, delay: float = 0.0, queue: int = 1000, automatic: bool = True, lanes: int = 1
    ) -> None:
        self.clock, self.engine = FakeClock(), FakeEngine(automatic, lanes)
        self.batcher = Batcher(self.engine, batch, delay, queue, NoObserver(), self.clock)
        self.runner: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Bench:
        self.runner = asyncio.create_task(self.batcher.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.runner is not None
        assert not self.runner.done(), "the batch loop died"
        self.runner.cancel()

    def send(self, *values: int, timeout: float = 100.0) -> asyncio.Task[np.ndarray]:
        images = np.zeros((len(values), 3, 2, 2), np.uint8)
        images[:, 0, 0, 0] = values
        places = self.batcher.reserve(len(values))
        return asyncio.create_task(self.batcher.submit(images, places, self.clock.now + timeout))


def values(answer: np.ndarray) -> list[int]:
    return answer[:, 0].astype(int).tolist()


async def test_an_idle_engine_starts_at_once() -> None:
    async with Bench(delay=5.0) as bench:
        answer = bench.send(7)
        await settle()  # no time passes
        assert values(await answer) == [7]


async def test_while_the_engine_is_busy_the_next_batch_forms() -> None:
    async with Bench(automatic=False) as bench:
        tasks = [bench.send(1)]
        await settle()
        tasks += [bench.send(2), bench.send(3), bench.send(4)]
        await settle()
        assert bench.engine.batches == [[1]]
        await bench.engine.finish()
        assert bench.engine.batches == [[1], [2, 3, 4]]
        await bench.engine.finish()
        assert [values(await task) for task in tasks] == [[1], [2], [3], [4]]


async def test_a_large_request_is_split_and_rejoined_in_order() -> None:
    async with Bench(batch=4) as bench:
        answer = bench.send(*range(11))
        assert values(await answer) == list(range(11))
        assert [len(batch) for batch in bench.engine.batches] == [4, 4, 3]


async def under_load(bench: Bench, images: int) -> None:
    """Answer ``images`` images that arrive in one moment, so that many more are to be expected."""
    await bench.send(*range(images))
    bench.engine.batches.clear()


async def test_under_load_a_batch_stays_open_for_the_window_after_the_one_before() -> None:
    async with Bench(batch=8, delay=1.0) as bench:
        await under_load(bench, 80)  # 8 a window
        for value in (1, 2, 3):
            bench.send(value)
            await bench.clock.advance(0.3)
            assert bench.engine.batches == []
        await bench.clock.advance(0.2)
        assert bench.engine.batches == [[1, 2, 3]]


async def test_a_full_batch_does_not_wait_for_the_delay_window() -> None:
    async with Bench(batch=3, delay=1.0) as bench:
        await under_load(bench, 81)
        bench.send(1, 2)
        await settle()
        assert bench.engine.batches == []
        bench.send(3)
        await settle()
        assert bench.engine.batches == [[1, 2, 3]]


async def test_a_window_that_would_not_double_the_batch_is_not_waited_out() -> None:
    async with Bench(batch=8, delay=1.0) as bench:
        await under_load(bench, 40)  # 4 a window
        bench.send(*range(5))
        await settle()
        assert bench.engine.batches == [[0, 1, 2, 3, 4]]
        await bench.clock.advance(60.0)  # the load is over
        bench.engine.batches.clear()
        for value in (1, 2, 3):  # one at a time, each right after the answer to the one before
            await bench.send(value)
        assert bench.engine.batches == [[1], [2], [3]]


async def test_images_wait_in_the_queue_while_the_engine_is_down_and_keep_their_deadlines() -> None:
    async with Bench() as bench:
        bench.engine.running.clear()
        patient, hasty = bench.send(1), bench.send(2, timeout=1.0)
        await bench.clock.advance(2.0)
        with pytest.raises(Problem) as late:
            await hasty
        assert late.value.status == 504
        bench.engine.running.set()
        assert values(await patient) == [1]
        assert bench.engine.batches == [[1]]


async def test_a_batch_of_both_kinds_of_pixels_is_brought_to_one_scale() -> None:
    async with Bench(automatic=False) as bench:
        first = bench.send(0)
        await settle()
        grey = np.full((1, 3, 2, 2), 0.5, np.float32)
        bright = np.full((1, 3, 2, 2), 51, np.uint8)
        tasks = [
            asyncio.create_task(bench.batcher.submit(images, bench.batcher.reserve(1), 100.0)) for images in (bright, grey)
        ]
        await settle()
        await bench.engine.finish()
        await bench.engine.finish()
        await first
        assert bench.engine.batches[1] == pytest.approx([0.2, 0.5])
        assert [float((await task)[0, 0]) for task in tasks] == pytest.approx([0.2, 0.5])


async def test_an_engine_idle_for_longer_than_the_window_starts_at_once() -> None:
    async with Bench(delay=1.0) as bench:
        await bench.send(0)
        await bench.clock.advance(1.5)
        bench.send(1)
        await settle()
        assert bench.engine.batches == [[0], [1]]


async def test_a_full_queue_refuses_at_once_and_frees_places_as_batches_leave() -> None:
    async with Bench(batch=2, queue=3, automatic=False) as bench:
        bench.send(0)
        await settle()  # with the engine: no place held
        tasks = [bench.send(1, 2), bench.send(3)]
        await settle()
        with pytest.raises(Problem, match="queue holds 3") as refusal:
            bench.send(4)
        assert refusal.value.status == 503
        assert refusal.value.headers["Retry-After"]
        await bench.engine.finish()  # (1, 2) go to the engine
        tasks.append(bench.send(5))
        for _ in range(3):
            await bench.engine.finish()
        assert [values(await task) for task in tasks] == [[1, 2], [3], [5]]
        assert bench.batcher.queued_images == 0


async def test_a_request_larger_than_the_queue_is_refused_for_good() -> None:
    async with Bench(queue=3) as bench:
        with pytest.raises(Problem) as refusal:
            bench.send(1, 2, 3, 4)
        assert refusal.value.status == 413


async def test_a_cancelled_caller_leaves_its_batch_mates_alone() -> None:
    async with Bench(automatic=False) as bench:
        first, second, third = bench.send(1), bench.send(2), bench.send(3)
        await settle()
        second.cancel()  # its image is with the engine
        await bench.engine.finish()
        assert values(await first) == [1]
        assert values(await third) == [3]
        assert values(await _answered(bench, 4)) == [4]


async def _answered(bench: Bench, value: int) -> np.ndarray:
    task = bench.send(value)
    await settle()
    await bench.engine.finish()
    return await task


async def test_a_cancelled_caller_in_the_queue_never_reaches_the_engine() -> None:
    async with Bench(automatic=False) as bench:
        first = bench.send(1)
        await settle()
        gone, kept = bench.send(2), bench.send(3)
        await settle()
        gone.cancel()
        await settle()
        assert bench.batcher.queued_images == 1
        await bench.engine.finish()
        await bench.engine.finish()
        assert values(await first) == [1]
        assert values(await kept) == [3]
        assert bench.engine.batches == [[1], [3]]


async def test_an_expired_request_fails_in_the_queue_and_never_reaches_the_engine() -> None:
    async with Bench(automatic=False) as bench:
        first = bench.send(1)
        await settle()
        late, patient = bench.send(2, timeout=1.0), bench.send(3, timeout=9.0)
        await bench.clock.advance(2.0)  # the engine is still busy
        with pytest.raises(Problem) as refusal:
            await late
        assert refusal.value.status == 504
        await bench.engine.finish()
        await bench.engine.finish()
        assert values(await first) == [1]
        assert values(await patient) == [3]
        assert bench.engine.batches == [[1], [3]]


async def test_a_request_whose_deadline_is_past_is_refused_and_holds_no_place() -> None:
    async with Bench() as bench:
        with pytest.raises(Problem) as refusal:
            await bench.send(1, timeout=0.0)
        assert refusal.value.status == 504
        assert bench.batcher.queued_images == 0
        assert bench.engine.batches == []


async def test_a_failing_engine_fails_its_batch_only() -> None:
    async with Bench(batch=2, automatic=False) as bench:
        doomed = [bench.send(1), bench.send(2)]
        await settle()
        fine = bench.send(3)
        bench.engine.fail_next = True
        await bench.engine.finish()
        for task in doomed:
            with pytest.raises(Problem) as refusal:
                await task
            assert refusal.value.status == 503
        await bench.engine.finish()
        assert values(await fine) == [3]


async def test_an_engine_that_answers_too_little_fails_its_batch_and_not_the_loop() -> None:
    async with Bench() as bench:
        bench.engine.forgetful = True
        with pytest.raises(Problem) as refusal:
            await bench.send(1, 2)
        assert refusal.value.status == 503
        bench.engine.forgetful = False
        assert values(await bench.send(3)) == [3]


async def test_a_split_request_that_fails_in_part_does_not_send_the_rest() -> None:
    async with Bench(batch=2, automatic=False) as bench:
        doomed = bench.send(1, 2, 3, 4)
        await settle()
        bench.engine.fail_next = True
        await bench.engine.finish()
        with pytest.raises(Problem):
            await doomed
        assert bench.batcher.queued_images == 0
        assert values(await _answered(bench, 9)) == [9]
        assert [3, 4] not in bench.engine.batches


async def test_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async with Bench(batch=1, automatic=False) as bench:
        accepted = [bench.send(1), bench.send(2), bench.send(3)]
        await settle()
        drained = asyncio.create_task(bench.batcher.drain())
        await settle()
        with pytest.raises(Problem) as refusal:
            bench.send(4)
        assert refusal.value.status == 503
        assert not drained.done()
        for _ in range(3):
            await bench.engine.finish()
        await drained
        assert [values(await task) for task in accepted] == [[1], [2], [3]]


async def test_a_request_that_finds_the_engine_idle_and_nobody_else_waiting_runs_alone_and_nothing_beside_it() -> None:
    async with Bench(batch=8, automatic=False, lanes=2) as bench:
        first = bench.send(0, 1)
        await settle()
        others = [bench.send(2, 3, 4), bench.send(5, 6, 7)]
        await settle()
        assert bench.engine.batches == [[0, 1]]
        assert bench.engine.alone == [True]
        await bench.engine.finish()
        assert values(await first) == [0, 1]
        assert bench.engine.batches[1:] == [[2, 3, 4], [5, 6]], "the other lane is not left idle now"
        assert bench.engine.alone[1:] == [False, False]
        for _ in range(3):
            await bench.engine.finish()
        assert [values(await other) for other in others] == [[2, 3, 4], [5, 6, 7]]


async def test_a_large_request_that_nobody_shares_the_engine_with_runs_in_full_batches() -> None:
    async with Bench(batch=7, automatic=False, lanes=2) as bench:
        answer = bench.send(*range(20))
        await settle()
        for _ in range(3):
            await bench.engine.finish()
        assert [len(batch) for batch in bench.engine.batches] == [7, 7, 6]
        assert bench.engine.alone == [True, True, True]
        assert values(await answer) == list(range(20))


@pytest.mark.parametrize(("lanes", "first"), [(1, [12]), (2, [6, 3]), (3, [4, 3, 2]), (4, [3, 3, 2, 1])])
async def test_many_images_are_spread_over_the_lanes(lanes: int, first: list[int]) -> None:
    async with Bench(batch=12, automatic=False, lanes=lanes) as bench:
        answers = [bench.send(*range(5)), bench.send(*range(5, 12))]
        await settle()
        assert [len(batch) for batch in bench.engine.batches] == first
        assert bench.engine.alone == [lanes == 1] * lanes
        for _ in range(12):
            await bench.engine.finish()
        assert [values(await answer) for answer in answers] == [[*range(5)], [*range(5, 12)]]


async def test_a_lane_takes_no_more_than_its_share_of_a_batch() -> None:
    async with Bench(batch=7, automatic=False, lanes=2) as bench:
        answers = [bench.send(*range(13)), bench.send(*range(13, 20))]
        await settle()
        assert [len(batch) for batch in bench.engine.batches] == [4, 4]  # half of seven, rounded up
        for _ in range(20):
            await bench.engine.finish()
        assert [values(await answer) for answer in answers] == [[*range(13)], [*range(13, 20)]]
        assert max(len(batch) for batch in bench.engine.batches) == 4


async def test_a_lane_that_comes_free_takes_its_share_while_another_is_busy() -> None:
    async with Bench(batch=8, automatic=False, lanes=2) as bench:
        tasks = [bench.send(*range(4)), bench.send(4)]
        await settle()
        assert bench.engine.batches == [[0, 1, 2], [3]]
        tasks.append(bench.send(5, 6))
        await settle()
        assert len(bench.engine.batches) == 2, "both lanes are busy"
        await bench.engine.finish()
        assert bench.engine.batches[2:] == [[4, 5]]
        assert bench.engine.alone == [False, False, False]
        for _ in range(3):
            await bench.engine.finish()
        assert [values(await task) for task in tasks] == [[0, 1, 2, 3], [4], [5, 6]]
        last = bench.send(9)  # idle again
        await settle()
        assert bench.engine.alone[-1]
        await bench.engine.finish()
        assert values(await last) == [9]


async def test_a_batch_that_fails_leaves_the_other_lane_alone() -> None:
    async with Bench(batch=4, automatic=False, lanes=2) as bench:
        first, second = bench.send(1, 2), bench.send(3, 4)
        await settle()
        assert bench.engine.batches[0] == [1, 2]
        bench.engine.fail_next = True
        await bench.engine.finish()
        with pytest.raises(Problem) as refusal:
            await first
        assert refusal.value.status == 503
        for _ in range(2):
            await bench.engine.finish()
        assert values(await second) == [3, 4]


@pytest.mark.parametrize("lanes", [1, 2])
async def test_a_batcher_that_is_stopped_stops_its_batches(lanes: int) -> None:
    bench = Bench(batch=3, automatic=False, lanes=lanes)
    async with bench:
        asked = [bench.send(*range(3)), bench.send(*range(3))]
        await settle()
        assert len(bench.engine.batches) == lanes
    await settle()
    assert bench.engine.stopped == lanes
    for each in asked:
        each.cancel()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 7)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("finish"), st.just(0)),
        st.tuples(st.just("fail"), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 30)),
    ),
    max_size=60,
)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@given(steps=steps, batch=st.integers(1, 8), delay=st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=100, deadline=None)
def test_every_answer_belongs_to_its_caller_under_any_interleaving(
    steps: list[tuple[str, int]], batch: int, delay: float, lanes: int
) -> None:
    asyncio.run(_interleave(steps, batch, delay, lanes))


async def end(bench: Bench, tasks: list[asyncio.Task[np.ndarray]]) -> None:
    """Let the engine finish and time pass until every task is done, and what was cancelled while the engine had it."""
    for _ in range(200):
        await bench.engine.finish()
        await bench.clock.advance(1.0)
        if all(task.done() for task in tasks) and not bench.engine.busy:
            return


async def _interleave(steps: list[tuple[str, int]], batch: int, delay: float, lanes: int) -> None:
    async with Bench(batch=batch, delay=delay, queue=20, automatic=False, lanes=lanes) as bench:
        sent: list[tuple[list[int], asyncio.Task[np.ndarray]]] = []
        number = itertools.count()
        for action, amount in steps:
            if action == "send":
                mine = [next(number) % 256 for _ in range(amount)]
                try:
                    sent.append((mine, bench.send(*mine, timeout=20.0)))
                except Problem as problem:
                    assert problem.status == 503  # noqa: PT017 (the refusal is one of two right outcomes)
            elif action == "cancel" and sent:
                sent[amount % len(sent)][1].cancel()
            elif action == "finish":
                await bench.engine.finish()
            elif action == "fail":
                bench.engine.fail_next = True
            elif action == "wait":
                await bench.clock.advance(amount / 10)
            await settle()
            assert 0 <= bench.batcher.queued_images <= 20
            assert bench.engine.busy <= lanes
            assert not bench.engine.disturbed
        await end(bench, [task for _, task in sent])
        for mine, task in sent:
            assert task.done(), "a request was never answered"
            if not task.cancelled() and task.exception() is None:
                assert values(task.result()) == mine
        assert bench.batcher.queued_images == 0
        assert all(len(images) <= batch for images in bench.engine.batches)


async def test_an_engine_with_fewer_lanes_than_the_one_before_gets_no_more_batches_than_it_has() -> None:
    async with Bench(batch=4, automatic=False, lanes=3) as bench:
        gone = [bench.send(1), bench.send(2), bench.send(3), bench.send(4)]
        await settle()
        lost = bench.engine.busy
        assert lost >= 2
        for task in gone:
            task.cancel()
        await settle()
        before, bench.engine = bench.engine, FakeEngine(automatic=False, lanes=2)
        bench.batcher._engine = bench.engine  # as a reload does when nobody waits any more
        tasks = [bench.send(*range(8)) for _ in range(3)]
        await settle()
        most = bench.engine.busy
        for _ in range(lost):
            await before.finish()
            most = max(most, bench.engine.busy)
        assert most == 2
        while not all(task.done() for task in tasks):
            await bench.engine.finish()
            most = max(most, bench.engine.busy)
        assert [values(await task) for task in tasks] == [list(range(8))] * 3
        assert most == 2
