"""The scheduler as a front end sees it: in another process, at the other end of a wire, with pixels in shared memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from service.admission import Ticket
from service.identity import Caller
from service.problems import Problem, engine_down, engine_failed, overloaded
from service.quota import Level, Window
from service.scheduler import Scheduler
from service.settings import Settings
from service.slab import Slab
from service.wire import Wire

log = logging.getLogger(__name__)


def slots_of(settings: Settings) -> int:
    """Return how many images a front end may have on their way: all that the queue takes, and two batches beyond it."""
    return settings.max_queue_images + 2 * settings.max_batch_size


@dataclass
class RemoteTicket:
    """An admitted request, by the number that the scheduler's process knows it by; the answer brings version and policy."""

    number: int
    levels: list[Level]
    policy: str
    version: str = ""
    left_queue: float | None = None


class RemoteScheduler:
    """Asks the scheduler's process; the same contract as :class:`service.scheduler.Scheduler`.

    Args:
        open_wire: Opens the wire, given what to do with messages and when it closes.
        slab: Shared with the scheduler's process.
        slots: The slab's.
        on_leave: Called when this front end is to send its callers elsewhere, and go on meanwhile.
        on_drain: Called when this front end is to finish what it has and stop.
        version: The model's version, until another is told.

    Attributes:
        version: Of the model that answers now.
    """

    def __init__(
        self,
        open_wire: Callable[[Wire], Any],
        slab: Slab,
        slots: int,
        on_leave: Callable[[], None],
        on_drain: Callable[[], None],
        version: str = "",
    ) -> None:
        self.version = version
        self._open_wire = open_wire
        self._slab = slab
        self._free = list(range(slots))
        self._on_leave = on_leave
        self._on_drain = on_drain
        self._up = False
        self._is_lost = False
        self._wire = Wire(self._told, self._lost)
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    async def start(self) -> None:
        """Open the wire and say so."""
        await self._open_wire(self._wire)
        self._wire.send(["hello", 0])

    def turn_unready(self) -> None:
        """Do nothing: the scheduler's process tells whether the service is ready."""

    async def drain(self) -> None:
        """Return at once: the HTTP server waits for its own requests."""

    def stop(self) -> None:
        """Close the wire."""
        self._wire.close()

    def check_up(self) -> None:
        """Raise ``Problem`` 503 unless the engine is up."""
        if not self._up:
            raise engine_down()

    def check_room(self) -> None:
        """Do nothing: the scheduler's process knows."""

    async def admit(self, caller: Caller, images: int) -> RemoteTicket:
        """Hold places and charge quota; raises ``Problem`` 413, 429 or 503, and then nothing is held."""
        number = self._number()
        try:
            policy, levels = await self._ask(number, "admit", caller.id, caller.tier, images)
        except asyncio.CancelledError:
            self._wire.send(["settle", number, False])
            raise
        return RemoteTicket(number, [_level(values) for values in levels], policy)

    async def answer(self, ticket: RemoteTicket, images: np.ndarray, deadline: float) -> np.ndarray:
        """Return exact probabilities ``(N, C)`` for ``images`` ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``.

        Raises:
            Problem: 503 the engine failed or there is no memory, 504 the deadline (monotonic seconds) passed.
        """
        if self._is_lost:
            raise engine_failed()
        if len(self._free) < len(images):
            raise overloaded("too many images are on their way to the model; try again")
        slots = [self._free.pop() for _ in range(len(images))]
        number = self._number()
        reply = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        self._wire.send(["answer", number, ticket.number, slots, self._slab.write(slots, images), deadline])
        try:
            ticket.version, ticket.policy, ticket.left_queue = await asyncio.shield(reply)
            return self._slab.read_answers(slots)
        except asyncio.CancelledError:
            self._wire.send(["drop", number])
            raise
        finally:
            # The scheduler answers every request, even one that was dropped, so that nobody else's pixels can come into slots
            # that it may still read or write. Nor before the answers are read: the next ones may come at any moment.
            reply.add_done_callback(lambda _: self._free.extend(slots))

    def settle(self, ticket: RemoteTicket, refund: bool) -> None:
        """End an admitted request; with ``refund`` its caller is charged nothing."""
        self._wire.send(["settle", ticket.number, refund])

    async def levels(self, caller: Caller) -> list[Level]:
        """Return what is left of a caller's quota."""
        return [_level(values) for values in await self._ask(self._number(), "levels", caller.id, caller.tier)]

    async def policy_of(self, caller: Caller) -> str:
        """Return the name of the policy that a caller's answers pass now."""
        policy: str = await self._ask(self._number(), "policy", caller.id, caller.tier)
        return policy

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _ask(self, number: int, what: str, *rest: object) -> Any:
        if self._is_lost:  # nobody would ever answer
            raise engine_failed()
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._wire.send([what, number, *rest])
        return await reply

    def _told(self, message: Any) -> None:
        what, *rest = message
        if what == "up":
            (self._up,) = rest
        elif what == "version":
            (self.version,) = rest
            self._wire.send(["knows", 0, self.version])
        elif what == "leave":
            self._on_leave()
        elif what == "drain":
            self._on_drain()
        else:
            number, payload = rest
            reply = self._waiting.pop(number)
            if reply.done():  # cancelled
                return
            if what == "problem":
                reply.set_exception(Problem(**payload))
                reply.exception()  # a dropped one's is nobody's
            else:
                reply.set_result(payload)

    def _lost(self) -> None:
        """Fail everything; without its scheduler a front end is of no use."""
        self._up, self._is_lost = False, True
        waiting, self._waiting = self._waiting, {}
        for reply in waiting.values():
            if not reply.done():
                reply.set_exception(engine_failed())
                reply.exception()
        self._on_drain()


class RemoteCaller:
    """The scheduler's side of one front end's wire.

    Args:
        scheduler: Asked in the front end's name.
        slab: Shared with the front end.
        on_close: Called when the front end is gone.

    Attributes:
        is_open: Set when the front end has opened its end.
        knows: Set when the front end knows the version that it was told last, or is gone.
    """

    def __init__(self, scheduler: Scheduler, slab: Slab, on_close: Callable[[], None]) -> None:
        self.is_open = asyncio.Event()
        self.knows = asyncio.Event()
        self._told_version = ""
        self._scheduler = scheduler
        self._slab = slab
        self._on_close = on_close
        self._tickets: dict[int, Ticket] = {}
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self.wire = Wire(self._told, self._lost)

    def tell_up(self, up: bool) -> None:
        """Say whether the engine is up."""
        self.wire.send(["up", up])

    def tell_version(self, version: str) -> None:
        """Say which model answers from now on."""
        self.knows.clear()
        self._told_version = version
        self.wire.send(["version", version])

    def tell_leave(self) -> None:
        """Say that callers should go elsewhere."""
        self.wire.send(["leave"])

    def tell_drain(self) -> None:
        """Say that it is time to stop."""
        self.wire.send(["drain"])

    def _told(self, message: Any) -> None:
        what, number, *rest = message
        if what == "settle":
            (refund,) = rest
            if task := self._tasks.get(number):  # it left before it was admitted
                task.cancel()
            if ticket := self._tickets.pop(number, None):
                self._scheduler.settle(ticket, refund)
        elif what == "hello":
            self.is_open.set()
        elif what == "knows":
            if rest == [self._told_version]:
                self.knows.set()
        elif what == "drop":
            if task := self._tasks.get(number):
                task.cancel()
        else:
            work: dict[str, Callable[..., Coroutine[Any, Any, Any]]]
            work = {"admit": self._admit, "answer": self._answer, "levels": self._levels, "policy": self._policy}
            task = self._tasks[number] = asyncio.ensure_future(work[what](number, *rest))
            task.add_done_callback(partial(self._reply, number))

    def _reply(self, number: int, task: asyncio.Task[Any]) -> None:
        """Answer every message that asks something, in whatever way it ended."""
        del self._tasks[number]
        if task.cancelled():
            self.wire.send(["done", number, None])
        elif (error := task.exception()) is None:
            self.wire.send(["done", number, task.result()])
        else:
            if not isinstance(error, Problem):
                log.error("the scheduler failed", exc_info=error)
            problem = error if isinstance(error, Problem) else engine_failed()
            self.wire.send(["problem", number, asdict(problem)])

    async def _admit(self, number: int, caller: str, tier: str, images: int) -> list[Any]:
        ticket = self._tickets[number] = await self._scheduler.admit(Caller(caller, tier), images)
        return [ticket.policy, [_values(level) for level in ticket.levels]]

    async def _answer(self, number: int, ticket: int, slots: list[int], kind: str, deadline: float) -> list[str | float | None]:
        del number
        admitted = self._tickets[ticket]
        rows = await self._scheduler.answer(admitted, self._slab.read(slots, kind), deadline)
        self._slab.write_answers(slots, rows)
        return [admitted.version, admitted.policy, admitted.left_queue]

    async def _policy(self, number: int, caller: str, tier: str) -> str:
        del number
        return await self._scheduler.policy_of(Caller(caller, tier))

    async def _levels(self, number: int, caller: str, tier: str) -> list[Any]:
        del number
        return [_values(level) for level in await self._scheduler.levels(Caller(caller, tier))]

    def _lost(self) -> None:
        """Let go of all that the front end held; what it had charged stays charged."""
        for task in list(self._tasks.values()):
            task.cancel()
        for ticket in self._tickets.values():
            self._scheduler.settle(ticket, False)
        self._tickets.clear()
        del self._slab  # frees the memory now, not when the garbage collector comes by; nobody is left to use it
        self.is_open.set()  # nobody should wait for it any more
        self.knows.set()
        self._on_close()


def _values(level: Level) -> list[Any]:
    return [level.window.name, level.window.quota, level.window.seconds, level.remaining, level.reset_s]


def _level(values: list[Any]) -> Level:
    name, quota, seconds, remaining, reset_s = values
    return Level(Window(name, quota, seconds), remaining, reset_s)
