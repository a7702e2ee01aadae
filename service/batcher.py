"""The batcher: joins the images of many requests into batches for one engine, and takes the answers apart again.

Knows nothing of torch or HTTP: an engine is anything that turns images into probabilities.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from service.problems import Problem, deadline_passed, draining, engine_failed, overloaded

RATE_WINDOWS = 10
"""The arrival rate is averaged over this many delay windows."""


class Engine(Protocol):
    """What runs the batches."""

    @property
    def lanes(self) -> int:
        """How many batches may run at a time, each with its share of the device."""
        ...

    async def up(self) -> None:
        """Return when the engine can take a batch; one that died is being restarted."""
        ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        """Return probabilities ``(B, C)`` for images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``.

        Args:
            images: The batch.
            alone: No other batch runs until this one is done: it may have the whole device.
        """
        ...


class Clock(Protocol):
    """What the batcher needs of time."""

    def time(self) -> float:
        """Return monotonic seconds."""
        ...

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        """Call ``callback(*args)`` at ``when``."""
        ...


class LoopClock:
    """The clock of whatever event loop runs."""

    def time(self) -> float:
        """Return monotonic seconds, the same in every process of a machine."""
        return time.monotonic()

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        """Call ``callback(*args)`` at ``when``."""
        return asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), callback, *args)


class Observer(Protocol):
    """What the batcher reports: metrics implement it."""

    def waited(self, seconds: float) -> None:
        """One request's first image left the queue after ``seconds``."""
        ...

    def batch_formed(self, images: int) -> None:
        """A batch of ``images`` went to the engine."""
        ...

    def queue_changed(self, images: int) -> None:
        """``images`` queue places are held now."""
        ...


@dataclass
class Places:
    """Queue places held for a request; released once, when its images leave the queue or the request fails."""

    images: int
    left_queue: float | None = None  # the clock's time when the first image went to the engine


@dataclass(eq=False)
class _Request:
    images: np.ndarray  # (N, 3, H, W) uint8, or float32 in [0, 1]
    places: Places
    answer: asyncio.Future[np.ndarray]
    enqueued: float
    taken: int = 0  # images that went into a batch
    missing: int = 0  # images without a result
    rows: np.ndarray | None = None  # (N, C)
    timer: asyncio.TimerHandle | None = field(default=None)


class Batcher:
    """One queue in front of one engine.

    An idle engine starts at once, and while it is busy the next batch forms. A batch that follows another closely stays open
    for ``max_queue_delay_s`` after the engine became free, or until it is full, but only while images arrive so fast that this
    is likely to double it: below that load a window costs every caller its length and gains nothing.

    Args:
        engine: Runs the batches; as many at a time as it has lanes. A request that finds the engine idle and nobody else
            waiting runs alone, which is soonest done; several are spread over the lanes, and each lane goes on by itself.
        max_batch_size: Most images of a batch; larger requests are split.
        max_queue_delay_s: Longest delay window.
        max_queue_images: Queue places.
        observer: Told of waits, batches and the queue.
        clock: Time.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch_size: int,
        max_queue_delay_s: float,
        max_queue_images: int,
        observer: Observer,
        clock: Clock | None = None,
    ) -> None:
        self._engine = engine
        self._max_batch = max_batch_size
        self._delay = max_queue_delay_s
        self._max_queue = max_queue_images
        self._observer = observer
        self._clock: Clock = clock or LoopClock()
        self._queue: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._lane_free = asyncio.Event()
        self._lane_free.set()
        self._running: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._places_held = 0
        self._waiting = 0  # images in the queue
        self._unanswered = 0
        self._free_since = float("-inf")
        self._rate = 0.0  # images/s, as of the last arrival
        self._last_arrival = self._clock.time()
        self._draining = False

    @property
    def queued_images(self) -> int:
        """Queue places held now."""
        return self._places_held

    def check_room(self, images: int) -> None:
        """Raise ``Problem`` 503 if the queue has no places for so many images, or the service is shutting down."""
        if self._draining:
            raise draining()
        if self._places_held + images > self._max_queue:
            raise overloaded(f"{self._places_held} images are waiting and the queue holds {self._max_queue}; try again")

    def reserve(self, images: int) -> Places:
        """Hold queue places for a request before its images are decoded.

        Raises:
            Problem: 503, the queue is full or the service is shutting down; 413, the request would never fit.
        """
        if images > self._max_queue:
            raise Problem(413, f"{images} images in one request; the queue holds {self._max_queue}", "too-large")
        self.check_room(images)
        self._hold(images)
        return Places(images)

    def release(self, places: Places) -> None:
        """Give places back; a second time does nothing."""
        if places.images:
            self._hold(-places.images)
            places.images = 0

    async def submit(self, images: np.ndarray, places: Places, deadline: float) -> np.ndarray:
        """Return the probabilities ``(N, C)`` of ``images`` ``(N, 3, H, W)``, in order.

        Cancelling the caller drops what has not entered a batch yet and leaves everybody else alone.

        Args:
            images: uint8, or float32 in ``[0, 1]``; validated.
            places: From :meth:`reserve`, for as many images.
            deadline: The clock's time after which a request that is still waiting fails.

        Raises:
            Problem: 504, the deadline passed while waiting; 503, the engine failed.
        """
        now = self._clock.time()
        if now >= deadline:
            self.release(places)
            raise deadline_passed()
        request = _Request(images, places, asyncio.get_running_loop().create_future(), now, missing=len(images))
        request.timer = self._clock.call_at(deadline, self._expire, request)
        self._queue.append(request)
        self._waiting += len(images)
        self._rate = self._rate_at(now) + len(images) / (RATE_WINDOWS * self._delay) if self._delay else 0.0
        self._last_arrival = now
        self._unanswered += 1
        self._quiet.clear()
        self._arrived.set()
        if self._waiting >= self._max_batch:
            self._full.set()
        try:
            return await request.answer
        finally:
            request.timer.cancel()
            self._drop(request)
            self._unanswered -= 1
            if self._unanswered == 0:
                self._quiet.set()

    async def run(self) -> None:
        """Form batches and run them, for ever; cancel the task to stop."""
        try:
            while True:
                await self._arrived.wait()
                await self._lane_free.wait()
                await self._engine.up()
                await self._hold_open()
                self._start_batch()
        finally:
            for task in self._running:
                task.cancel()

    async def drain(self) -> None:
        """Refuse new requests and return when every accepted one has its answer."""
        self._draining = True
        await self._quiet.wait()

    async def _hold_open(self) -> None:
        """Wait out the delay window if it is likely to double the batch."""
        now, closes = self._clock.time(), self._free_since + self._delay
        if now >= closes or self._waiting >= min(self._max_batch, self._rate_at(now) * self._delay):
            return
        self._full.clear()
        timer = self._clock.call_at(closes, self._full.set)
        try:
            await self._full.wait()
        finally:
            timer.cancel()

    def _start_batch(self) -> None:
        """Run a free lane's share of what waits; a free lane is certain."""
        lanes = self._engine.lanes
        idle = not self._running
        alone = lanes == 1 or (idle and len(self._queue) == 1)
        # A busy lane will want its share of what waits, too.
        room = self._max_batch if alone else min(-(-self._max_batch // lanes), -(-self._waiting // lanes))
        batch = self._take_batch(room)
        if not batch:
            return
        task = asyncio.create_task(self._run_batch(batch, alone))
        self._running.add(task)
        task.add_done_callback(self._batch_over)
        if alone or len(self._running) >= lanes:  # more, if another engine has taken the place of one with more lanes
            self._lane_free.clear()

    def _batch_over(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._free_since = self._clock.time()
        if len(self._running) < self._engine.lanes:
            self._lane_free.set()

    def _take_batch(self, room: int) -> list[tuple[_Request, int, int]]:
        """Take slices ``(request, start, stop)`` from the queue's head, ``room`` images at most."""
        batch: list[tuple[_Request, int, int]] = []
        now = self._clock.time()
        while self._queue and room:
            request = self._queue[0]
            if request.answer.done():  # cancelled in this very tick
                self._drop(request)
                continue
            if request.taken == 0:
                request.places.left_queue = now
                self._observer.waited(now - request.enqueued)
            start, stop = request.taken, min(len(request.images), request.taken + room)
            batch.append((request, start, stop))
            request.taken = stop
            room -= stop - start
            self._waiting -= stop - start
            self._hold(start - stop)
            request.places.images -= stop - start
            if stop == len(request.images):
                self._queue.popleft()
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _run_batch(self, batch: list[tuple[_Request, int, int]], alone: bool) -> None:
        try:
            images = _join([request.images[start:stop] for request, start, stop in batch])  # (B, 3, H, W)
            self._observer.batch_formed(len(images))
            rows = await self._engine.classify(images, alone)  # (B, C)
            if len(rows) != len(images):
                raise RuntimeError(f"the engine answered {len(rows)} rows to {len(images)} images")
        except Exception:  # the engine logs its own failures; every caller of this batch gets an answer
            for request, _, _ in batch:
                if not request.answer.done():
                    request.answer.set_exception(engine_failed())
            return
        position = 0
        for request, start, stop in batch:
            if request.rows is None:
                request.rows = np.empty((len(request.images), rows.shape[1]), rows.dtype)
            request.rows[start:stop] = rows[position : position + stop - start]
            position += stop - start
            request.missing -= stop - start
            if request.missing == 0 and not request.answer.done():
                request.answer.set_result(request.rows)

    def _expire(self, request: _Request) -> None:
        """Fail a request that is still waiting; one whose images are all with the engine gets its answer."""
        if request.taken < len(request.images) and not request.answer.done():
            request.answer.set_exception(deadline_passed())
            self._drop(request)

    def _drop(self, request: _Request) -> None:
        """Take a request out of the queue, if it is there, and give its places back."""
        self.release(request.places)
        if request.taken < len(request.images):
            with contextlib.suppress(ValueError):
                self._queue.remove(request)
                self._waiting -= len(request.images) - request.taken
            if not self._queue:
                self._arrived.clear()

    def _hold(self, images: int) -> None:
        self._places_held += images
        self._observer.queue_changed(self._places_held)

    def _rate_at(self, now: float) -> float:
        """Return how many images a second arrive, those of long ago counting less and less."""
        if not self._delay:
            return 0.0
        return self._rate * math.exp((self._last_arrival - now) / (RATE_WINDOWS * self._delay))


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Return one array of parts that are uint8, or float32 in ``[0, 1]`` as soon as one of them is."""
    if len(parts) == 1:
        return parts[0]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(np.float32) / 255 if part.dtype == np.uint8 else part for part in parts]
    return np.concatenate(parts)
