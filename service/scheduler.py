"""The scheduler: what all front ends of one device share. Queue, quotas, answers given before, and the way to the engine."""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np

from service.admission import Admission, Ticket
from service.answers import AnswerCache, digest
from service.batcher import Batcher, Engine
from service.identity import Caller
from service.metrics import Metrics
from service.problems import engine_down
from service.quota import Level, Limiter
from service.settings import Settings

log = logging.getLogger(__name__)


class Scheduler:
    """Admits requests and answers them; one per device, in the process that talks to the engine.

    Args:
        settings: Limits of the queue, quotas, the answer cache.
        engine: Runs the batches.
        metrics: Counts.
    """

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self._metrics = metrics
        self._batcher = Batcher(
            engine, settings.max_batch_size, settings.max_queue_delay_ms / 1000, settings.max_queue_images, metrics
        )
        limiters = {
            tier: Limiter(policy.windows, settings.limiter_max_callers, time.monotonic)
            for tier, policy in settings.policies().items()
            if policy.windows
        }
        self._admission = Admission(self._batcher, limiters, metrics)
        self._answers = AnswerCache(settings.answer_cache_images)
        self._runner: asyncio.Task[None] | None = None

    def check_up(self) -> None:
        """Raise ``Problem`` 503 unless batches are being run."""
        if self._runner is None or self._runner.done():
            raise engine_down()

    async def start(self) -> None:
        """Begin to run batches."""
        self._runner = asyncio.create_task(self._batcher.run())
        self._runner.add_done_callback(self._over)
        self._metrics.ready.set(1)

    def turn_unready(self) -> None:
        """Tell the operator's metrics that the service is about to stop."""
        self._metrics.ready.set(0)

    async def drain(self) -> None:
        """Refuse new requests and return when every accepted one has its answer."""
        await self._batcher.drain()

    def stop(self) -> None:
        """Run no more batches."""
        if self._runner is not None:
            self._runner.cancel()

    async def admit(self, caller: Caller, images: int) -> Ticket:
        """Hold places and charge quota; raises ``Problem`` 413, 429 or 503, and then nothing is held."""
        return self._admission.admit(caller, images)

    async def answer(self, ticket: Ticket, images: np.ndarray, deadline: float) -> np.ndarray:
        """Return exact probabilities ``(N, C)`` for ``images`` ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``.

        Raises:
            Problem: 503 the engine failed, 504 the deadline (monotonic seconds) passed.
        """
        if not self._answers.capacity:
            return await self._batcher.submit(images, ticket.places, deadline)
        keys = [digest(image) for image in images]
        known = [self._answers.get(key) for key in keys]
        new = [index for index, row in enumerate(known) if row is None]
        if new:
            fresh = await self._batcher.submit(images[new], ticket.places, deadline)
            for index, row in zip(new, fresh, strict=True):
                known[index] = self._answers.keep(keys[index], row)
        return np.stack([row for row in known if row is not None])

    def settle(self, ticket: Ticket, refund: bool) -> None:
        """End an admitted request; with ``refund`` its caller is charged nothing."""
        self._admission.settle(ticket, refund)

    async def levels(self, caller: Caller) -> list[Level]:
        """Return what is left of a caller's quota."""
        return self._admission.levels(caller)

    def _over(self, runner: asyncio.Task[None]) -> None:
        self.turn_unready()
        if not runner.cancelled() and (error := runner.exception()):
            log.critical("the batch loop died: nothing is answered any more", exc_info=error)
