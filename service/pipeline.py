"""One request's way: identify, read, admit, decode, queue, protect. The same for every protocol."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from starlette.requests import Request

from service.body import Body, BodyReader
from service.decode import Decoder
from service.identity import Caller, Identifier
from service.metrics import Metrics
from service.policy import Policy, Protected
from service.problems import Problem, deadline_passed, no_such_version
from service.quota import Level, rate_limit_headers

INLINE_BYTES = 65_536
"""Bodies with no more text than this are taken apart on the event loop: quicker than handing them to a thread."""


class Parcel(Protocol):
    """A body taken apart, whatever protocol it came by, with nothing decoded yet."""

    @property
    def images(self) -> int:
        """How many images it holds."""
        ...

    @property
    def deadline_s(self) -> float | None:
        """How long the caller wants to wait, if it said so."""
        ...

    def check(self, policy: Policy) -> None:
        """Raise ``Problem`` 403 when it asks for what the policy hides."""
        ...

    def is_cheap(self) -> bool:
        """Tell whether decoding takes less time than handing it to a thread does."""
        ...

    def decode(self, decoder: Decoder, expired: Callable[[], bool]) -> np.ndarray:
        """Return the images ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``; may run on any thread."""
        ...


class Admitted(Protocol):
    """A request that holds places and quota until it is settled."""

    levels: list[Level]
    policy: str
    version: str

    @property
    def left_queue(self) -> float | None:
        """When its first image left the queue, in monotonic seconds; ``None`` if it never did."""
        ...


class Scheduling(Protocol):
    """What the pipeline asks of a scheduler, in this process or another; see :class:`service.scheduler.Scheduler`."""

    @property
    def version(self) -> str:
        """The version of the model that answers now."""
        ...

    def check_room(self) -> None:
        """Raise ``Problem`` 503 if it is known already that no image can be admitted now."""
        ...

    async def admit(self, caller: Caller, images: int) -> Any:
        """Hold places and charge quota; returns an :class:`Admitted`."""
        ...

    async def answer(self, ticket: Any, images: np.ndarray, deadline: float) -> np.ndarray:
        """Return exact probabilities ``(N, C)``, all by one model; the ticket then has its version and their policy."""
        ...

    def settle(self, ticket: Any, refund: bool) -> None:
        """End an admitted request."""
        ...

    async def levels(self, caller: Caller) -> list[Level]:
        """Return what is left of a caller's quota."""
        ...

    async def policy_of(self, caller: Caller) -> str:
        """Return the name of the policy that a caller's answers pass now."""
        ...


@dataclass(frozen=True)
class Answered:
    """What a protocol may tell its caller.

    Attributes:
        protected: The answers.
        policy: The policy that they passed.
        headers: What is left of the quota.
        version: Of the model that computed the answers.
    """

    protected: Protected
    policy: Policy
    headers: dict[str, str]
    version: str


@dataclass(frozen=True)
class Pipeline:
    """The parts that a request passes, in this order.

    Attributes:
        identifier: Says who is asking.
        reader: Reads the body within limits.
        scheduler: Holds queue places, charges quota and leads to the engine.
        decoder: Turns images into the model's pixels.
        decode_pool: Threads that decode what is not cheap.
        policies: What of an answer leaves, by tier.
        labels: Class names.
        deadline_s: How long a request may take to reach the engine.
        metrics: Counts.
        voters: How many experts vote, each trained on a partition of its own; 0 if they do not vote.
    """

    identifier: Identifier
    reader: BodyReader
    scheduler: Scheduling
    decoder: Decoder
    decode_pool: ThreadPoolExecutor
    policies: Mapping[str, Policy]
    labels: tuple[str, ...]
    deadline_s: float
    metrics: Metrics
    voters: int

    @property
    def version(self) -> str:
        """The version of the model that answers now; that of an answer is in :class:`Answered`."""
        return self.scheduler.version

    async def run(
        self,
        request: Request,
        parse: Callable[[bytearray], Parcel],
        version: str | None = None,
        text_bytes: int | None = None,
    ) -> Answered:
        """Answer one request.

        Args:
            request: Its body is not read yet.
            parse: Takes the body apart; may run on a thread.
            version: The only model that may answer, if the caller names one.
            text_bytes: How many of the body's bytes ``parse`` has to understand, where it only cuts the others into pieces;
                ``None`` for all of them.

        Raises:
            Problem: See docs/http-api.md for every status.
            ClientDisconnect: The client has gone before its body arrived.
        """
        started = time.monotonic()
        caller = self.identify(request)
        self.scheduler.check_room()  # under overload every refusal takes time from an answer, so it is the first thing asked
        body = await self.reader.read(request)
        try:
            parcel = await _take_apart(body, parse, text_bytes)
            request.scope["state"]["images"] = parcel.images
            parcel.check(self.policies[caller.tier])  # before it costs anything
            deadline = started + min(self.deadline_s, parcel.deadline_s or self.deadline_s)
            ticket: Admitted = await self.scheduler.admit(caller, parcel.images)
            rows = await self._answer(parcel, ticket, deadline, version)  # (N, C)
        except Problem as problem:
            problem.headers = {**rate_limit_headers(await self.scheduler.levels(caller)), **problem.headers}
            raise
        finally:
            body.close()
        policy = self.policies[ticket.policy]
        protected = policy.protect(rows, self.voters)
        self.metrics.answered(self.labels, protected.best)
        return Answered(protected, policy, rate_limit_headers(ticket.levels), ticket.version)

    def identify(self, request: Request) -> Caller:
        """Return who is asking; raises ``Problem`` 401 or 403."""
        caller = self.identifier.identify(request.scope)
        request.scope["state"]["tier"] = caller.tier
        return caller

    async def quota_of(self, caller: Caller) -> list[Level]:
        """Return what is left of a caller's quota."""
        return await self.scheduler.levels(caller)

    async def policy_of(self, caller: Caller) -> Policy:
        """Return the policy that a caller's answers pass now."""
        return self.policies[await self.scheduler.policy_of(caller)]

    async def _answer(self, parcel: Parcel, ticket: Admitted, deadline: float, version: str | None) -> np.ndarray:
        """Decode and classify; the quota is refunded on failure, but not when the client has gone: it may have cost time."""
        refund = False
        try:
            parcel.check(self.policies[ticket.policy])
            images = await self._decode(parcel, deadline)  # (N, 3, H, W)
            rows = await self.scheduler.answer(ticket, images, deadline)
            parcel.check(self.policies[ticket.policy])  # its caller may have become suspect since
            if version not in (None, ticket.version):  # it was replaced while the request was on its way
                raise no_such_version(version, ticket.version)
            return rows
        except Exception:
            refund = True
            raise
        finally:
            self.scheduler.settle(ticket, refund)

    async def _decode(self, parcel: Parcel, deadline: float) -> np.ndarray:
        started = time.perf_counter()
        if parcel.is_cheap():
            images = parcel.decode(self.decoder, lambda: time.monotonic() > deadline)
        else:
            gone = threading.Event()  # stops a decoding that nobody waits for
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    images = await loop.run_in_executor(self.decode_pool, parcel.decode, self.decoder, gone.is_set)
            except TimeoutError:
                raise deadline_passed() from None
            finally:
                gone.set()
        self.metrics.decode.observe(time.perf_counter() - started)
        return images


async def _take_apart(body: Body, parse: Callable[[bytearray], Parcel], text_bytes: int | None) -> Parcel:
    data = body.take()
    if len(data) <= INLINE_BYTES or (text_bytes is not None and text_bytes <= INLINE_BYTES):
        return parse(data)
    # Taking megabytes of hostile multipart apart can take seconds, in which others must be answered.
    return await asyncio.to_thread(parse, data)
