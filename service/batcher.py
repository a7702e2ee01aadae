"""The batcher: joins the images of many requests into batches for one engine, and takes the answers apart again.

Knows nothing of torch or HTTP: an engine is any coroutine function from images to probabilities.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from service.problems import Problem, deadline_passed, draining, engine_failed, overloaded

Engine = Callable[[np.ndarray], Awaitable[np.ndarray]]


class Clock(Protocol):
    """What the batcher needs of time; an asyncio event loop has it."""

    def time(self) -> float:
        """Return monotonic seconds."""
        ...

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        """Call ``callback(*args)`` at ``when``."""
        ...


class Observer(Protocol):
    """What the batcher reports: metrics implement it."""

    def waited(self, seconds: float) -> None:
        """One request's first image left the queue after ``seconds``."""
        ...

    def batch_formed(self, images: int) -> None:
        """A batch of ``images`` went to the engine."""
        ...


@dataclass
class Places:
    """Queue places held for a request; released once, when its images leave the queue or the request fails."""

    images: int


@dataclass(eq=False)
class _Request:
    images: np.ndarray  # (N, 3, H, W) uint8
    places: Places
    answer: asyncio.Future[np.ndarray]
    enqueued: float
    taken: int = 0  # images that went into a batch
    missing: int = 0  # images without a result
    rows: np.ndarray | None = None  # (N, C)
    timer: asyncio.TimerHandle | None = field(default=None)


class Batcher:
    """One queue in front of one engine.

    An idle engine starts at once. A batch that follows another closely stays open for ``max_queue_delay_s`` after the engine
    became free, or until it is full, whatever arrives in between: callers who were just answered tend to come back together.

    Args:
        engine: Images ``(B, 3, H, W)`` uint8 to probabilities ``(B, C)``; only one call runs at a time.
        max_batch_size: Most images of a batch; larger requests are split.
        max_queue_delay_s: Length of the delay window.
        max_queue_images: Queue places.
        observer: Told of waits and batches.
        clock: Time; the running event loop by default.
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
        self._clock: Clock = clock or asyncio.get_running_loop()
        self._queue: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._places_held = 0
        self._unanswered = 0
        self._free_since = float("-inf")
        self._draining = False

    @property
    def queued_images(self) -> int:
        """Queue places held now."""
        return self._places_held

    def reserve(self, images: int) -> Places:
        """Hold queue places for a request before its images are decoded.

        Raises:
            Problem: 503, the queue is full or the service is shutting down; 413, the request would never fit.
        """
        if self._draining:
            raise draining()
        if images > self._max_queue:
            raise Problem(413, f"{images} images in one request; the queue holds {self._max_queue}", "too-large")
        if self._places_held + images > self._max_queue:
            raise overloaded(f"{self._places_held} images are waiting and the queue holds {self._max_queue}; try again")
        self._places_held += images
        return Places(images)

    def release(self, places: Places) -> None:
        """Give places back; a second time does nothing."""
        self._places_held -= places.images
        places.images = 0

    async def submit(self, images: np.ndarray, places: Places, deadline: float) -> np.ndarray:
        """Return the probabilities ``(N, C)`` of ``images`` ``(N, 3, H, W)``, in order.

        Cancelling the caller drops what has not entered a batch yet and leaves everybody else alone.

        Args:
            images: uint8, validated.
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
        self._unanswered += 1
        self._quiet.clear()
        self._arrived.set()
        if self._places_held >= self._max_batch and self._waiting_images() >= self._max_batch:
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
        while True:
            await self._arrived.wait()
            await self._hold_open()
            batch = self._take_batch()
            if batch:
                await self._run_batch(batch)
                self._free_since = self._clock.time()

    async def drain(self) -> None:
        """Refuse new requests and return when every accepted one has its answer."""
        self._draining = True
        await self._quiet.wait()

    async def _hold_open(self) -> None:
        """Wait out the delay window unless the engine was idle for longer or the batch is full."""
        closes = self._free_since + self._delay
        if self._clock.time() >= closes or self._waiting_images() >= self._max_batch:
            return
        self._full.clear()
        timer = self._clock.call_at(closes, self._full.set)
        try:
            await self._full.wait()
        finally:
            timer.cancel()

    def _take_batch(self) -> list[tuple[_Request, int, int]]:
        """Take slices ``(request, start, stop)`` from the queue's head, one batch at most."""
        batch: list[tuple[_Request, int, int]] = []
        room = self._max_batch
        now = self._clock.time()
        while self._queue and room:
            request = self._queue[0]
            if request.answer.done():  # cancelled in this very tick
                self._drop(request)
                continue
            if request.taken == 0:
                self._observer.waited(now - request.enqueued)
            start, stop = request.taken, min(len(request.images), request.taken + room)
            batch.append((request, start, stop))
            request.taken = stop
            room -= stop - start
            self._places_held -= stop - start
            request.places.images -= stop - start
            if stop == len(request.images):
                self._queue.popleft()
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _run_batch(self, batch: list[tuple[_Request, int, int]]) -> None:
        try:
            images = np.concatenate([request.images[start:stop] for request, start, stop in batch])  # (B, 3, H, W)
            self._observer.batch_formed(len(images))
            rows = await self._engine(images)  # (B, C)
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
            if not self._queue:
                self._arrived.clear()

    def _waiting_images(self) -> int:
        return sum(len(request.images) - request.taken for request in self._queue)
