"""The scheduler: what all front ends of one device share. Queue, quotas, answers given before, and the way to the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from model.checkpoint import EMBEDDED, read_header
from service.admission import Admission, Ticket
from service.answers import AnswerCache, digest
from service.batcher import Batcher
from service.identity import Caller
from service.metrics import Metrics
from service.problems import engine_down
from service.quota import Level
from service.quota_tiers import TierQuotas
from service.serving import Serving, VersionedEngine
from service.settings import Settings
from service.turnstile import Turnstile
from service.watch import Suspect, Watch

if TYPE_CHECKING:
    from service.watch.shared import Shared

log = logging.getLogger(__name__)

LONGEST_BATCH_S = 10.0
"""Beyond its deadline a request stays with the engine for no longer than this, unless the engine hangs."""


class Scheduler:
    """Admits requests and answers them; one per device, in the process that talks to the engine.

    Args:
        settings: Limits of the queue, quotas, the answer cache.
        engine: Runs the batches, until :meth:`change_engine`.
        metrics: Counts.
    """

    def __init__(self, settings: Settings, engine: VersionedEngine, metrics: Metrics) -> None:
        self._metrics = metrics
        self._serving = Serving(engine)
        self._turnstile = Turnstile(settings.request_deadline_ms / 1000 + LONGEST_BATCH_S)
        self._batcher = Batcher(
            self._serving, settings.max_batch_size, settings.max_queue_delay_ms / 1000, settings.max_queue_images, metrics
        )
        metrics.queue_capacity.set(settings.max_queue_images)
        self._quotas = TierQuotas(settings, metrics)
        self._admission = Admission(self._batcher, self._quotas.limiters, metrics)
        self._answers = AnswerCache(settings.answer_cache_images)
        self._watch = Watch(settings, metrics, time.monotonic, shared=_shared(settings, self._quotas, metrics))
        self._watch.model_changed(_is_embedded(engine), engine.version)
        self._runner: asyncio.Task[None] | None = None
        self._is_ready = False

    def check_up(self) -> None:
        """Raise ``Problem`` 503 unless batches are being run."""
        if self._runner is None or self._runner.done():
            raise engine_down()

    def check_room(self) -> None:
        """Raise ``Problem`` 503 if not even one image can be admitted now."""
        self._batcher.check_room(1)

    async def start(self) -> None:
        """Connect to the quotas' store, if there is one, and begin to run batches."""
        await self._quotas.start()
        await self._watch.start()
        self._runner = asyncio.create_task(self._batcher.run())
        self._runner.add_done_callback(self._over)
        self._set_ready(True)

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted, as far as the scheduler knows."""
        return self._is_ready

    @property
    def version(self) -> str:
        """The version of the model that answers now."""
        return self._serving.engine.version

    async def change_engine(self, engine: VersionedEngine) -> VersionedEngine:
        """Answer with another engine from now on; returns the one before, which nobody uses any more. One caller at a time.

        Requests on their way are answered by the old engine, whole; what comes meanwhile waits for the new one, and what was
        answered before is forgotten, so that nobody gets an answer of weights that are gone.

        Raises:
            TimeoutError: A request stays with the engine in use, which goes on: the engine hangs.
        """
        is_embedded = _is_embedded(engine)
        async with self._turnstile.closed():
            before, self._serving.engine = self._serving.engine, engine
            self._answers = AnswerCache(self._answers.capacity)
            self._watch.model_changed(is_embedded, engine.version)
        return before

    def load(self) -> dict[str, int]:
        """Return how much there is to do: queue places held, and requests that are with the engine or wait for it."""
        requests = self._turnstile.inside + self._turnstile.waiting
        return {"queue_images": self._batcher.queued_images, "requests_in_flight": requests}

    def turn_unready(self) -> None:
        """Tell the operator's metrics that the service is about to stop."""
        self._set_ready(False)

    async def drain(self) -> None:
        """Refuse new requests and return when every accepted one has its answer."""
        await self._batcher.drain()
        await self._quotas.finish()
        await self._watch.finish()

    def stop(self) -> None:
        """Run no more batches."""
        if self._runner is not None:
            self._runner.cancel()
        self._watch.stop()
        self._quotas.stop()

    async def admit(self, caller: Caller, images: int) -> Ticket:
        """Hold places and charge quota; raises ``Problem`` 413, 429 or 503, and then nothing is held."""
        return await self._admission.admit(caller, images, await self.policy_of(caller))

    async def answer(self, ticket: Ticket, images: np.ndarray, deadline: float) -> np.ndarray:
        """Return exact probabilities ``(N, C)`` for ``images`` ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``.

        The ticket's policy is the one that they have to pass, which may have become that of suspects since it was admitted.

        Raises:
            Problem: 429 an attack's images, 503 the engine failed, 504 the deadline (monotonic seconds) passed.
        """
        look = await self._watch.before(ticket.caller, images)
        rows = await self._answer_by_one_engine(ticket, images, deadline)
        await self._watch.after(ticket.caller, images, rows, look)
        ticket.policy = await self.policy_of(ticket.caller)
        return rows

    async def _answer_by_one_engine(self, ticket: Ticket, images: np.ndarray, deadline: float) -> np.ndarray:
        """Answer with one model's weights, all images alike, and note on the ticket which model that was."""
        await self._turnstile.enter(deadline)
        try:
            ticket.version = self.version
            return await self._answer_inside(ticket, images, deadline)
        finally:
            self._turnstile.leave()

    async def _answer_inside(self, ticket: Ticket, images: np.ndarray, deadline: float) -> np.ndarray:
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
        return await self._admission.levels(caller, await self.policy_of(caller))

    async def policy_of(self, caller: Caller) -> str:
        """Return the name of the policy that a caller's answers pass now."""
        return (await self._watch.treat(caller)).tier

    async def suspects(self) -> list[Suspect]:
        """Return every suspicion in force, the one renewed last first."""
        return await self._watch.suspects()

    async def forgive(self, caller: str) -> bool:
        """Forget a caller's suspicions, by the caller's id; returns whether there was one in force."""
        return await self._watch.forgive(caller)

    def _set_ready(self, ready: bool) -> None:
        self._is_ready = ready
        self._metrics.ready.set(int(ready))

    def _over(self, runner: asyncio.Task[None]) -> None:
        self.turn_unready()
        if not runner.cancelled() and (error := runner.exception()):
            log.critical("the batch loop died: nothing is answered any more", exc_info=error)


def _shared(settings: Settings, quotas: TierQuotas, metrics: Metrics) -> Shared | None:
    """Return what connects the watch with other replicas', if there may be any."""
    if quotas.store is None or not settings.watches():
        return None
    from service.watch.shared import Shared  # needs the store's client, which is not always installed

    return Shared(quotas.store, settings, metrics)


def _is_embedded(engine: VersionedEngine) -> bool:
    """Tell whether an engine's weights are a checkpoint's inside the package, whatever file they came from."""
    return any(read_header(path).weights_sha256.startswith(engine.version) for path in EMBEDDED.values())
