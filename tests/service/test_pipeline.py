"""The pipeline: what is worth a thread of its own, and what a request that asks for too much costs."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.types import Message

from service.body import Body, BodyReader
from service.decode import Decoder
from service.identity import Caller, Identifier
from service.metrics import Metrics
from service.pipeline import INLINE_BYTES, Pipeline, _take_apart
from service.policy import Policy
from service.problems import Problem, overloaded
from service.quota import Level
from service.v2.request import parse_infer
from tests.service.v2.messages import HEIGHT, LIMITS, WIDTH, pictures, tensor

LARGE = 10 * INLINE_BYTES


@pytest.mark.parametrize(
    ("size", "text_bytes", "inline"),
    [
        (INLINE_BYTES, None, True),
        (INLINE_BYTES + 1, None, False),
        (LARGE, None, False),
        (LARGE, 0, True),
        (LARGE, INLINE_BYTES, True),
        (LARGE, INLINE_BYTES + 1, False),
        (100, 10**19, True),  # a header may say anything
    ],
)
async def test_only_much_text_is_taken_apart_beside_the_event_loop(size: int, text_bytes: int | None, inline: bool) -> None:
    seen: list[tuple[int, threading.Thread]] = []

    def parse(data: bytearray) -> Any:
        seen.append((len(data), threading.current_thread()))

    await _take_apart(Body(BodyReader(LARGE, LARGE, 60), bytearray(size)), parse, text_bytes)
    ((read, thread),) = seen
    assert read == size
    assert (thread is threading.current_thread()) == inline


@dataclass
class OneTicket:
    """A scheduler that protects every answer with one policy, and remembers what became of its tickets."""

    policy: str
    version: str = "v"
    levels_left: list[Level] = field(default_factory=list)
    admitted: int = 0
    refunds: list[bool] = field(default_factory=list)
    is_full: bool = False

    def check_room(self) -> None:
        if self.is_full:
            raise overloaded("full")

    async def admit(self, caller: Caller, images: int) -> Any:
        self.admitted += images
        return Ticket(self.policy)

    async def answer(self, ticket: Any, images: np.ndarray, deadline: float) -> np.ndarray:
        return np.tile(np.float32([0.75, 0.25]), (len(images), 1))

    def settle(self, ticket: Any, refund: bool) -> None:
        self.refunds.append(refund)

    async def levels(self, caller: Caller) -> list[Level]:
        return self.levels_left


@dataclass
class Ticket:
    policy: str
    version: str = "v"
    levels: list[Level] = field(default_factory=list)


def request(body: bytes) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("192.0.2.1", 1), "state": {}}
    return Request(scope, receive)


def pipeline_of(scheduler: OneTicket, pool: ThreadPoolExecutor, anonymous_is_hidden: bool) -> Pipeline:
    return Pipeline(
        identifier=Identifier(None, anonymous=True),
        reader=BodyReader(10**6, 10**6, 60),
        scheduler=scheduler,
        decoder=Decoder(HEIGHT, WIDTH, 10**6, 10**6),
        decode_pool=pool,
        policies={
            "anonymous": Policy("anonymous", 2, label_only=anonymous_is_hidden),
            "suspect": Policy("suspect", 2, label_only=True),
        },
        labels=("ant", "bee"),
        deadline_s=60,
        metrics=Metrics(),
        voters=0,
    )


async def test_a_full_queue_is_told_before_the_body_is_waited_for() -> None:
    asked_for = request(b"")

    async def receive() -> Message:
        raise AssertionError("the body was asked for")

    asked_for._receive = receive
    with ThreadPoolExecutor(1) as pool, pytest.raises(Problem, match="full") as caught:
        await pipeline_of(OneTicket("anonymous", is_full=True), pool, False).run(
            asked_for, lambda data: parse_infer(data, None, LIMITS)
        )
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers


@pytest.mark.parametrize(
    ("anonymous_is_hidden", "policy", "cost"), [(True, "anonymous", []), (False, "suspect", [True]), (False, "anonymous", None)]
)
async def test_asking_for_what_the_policy_hides_is_a_403_that_costs_nothing(
    anonymous_is_hidden: bool, policy: str, cost: list[bool] | None
) -> None:
    scheduler = OneTicket(policy)
    body = {"inputs": [tensor(pictures(2))], "outputs": [{"name": "probabilities"}]}
    with ThreadPoolExecutor(1) as pool:
        pipeline = pipeline_of(scheduler, pool, anonymous_is_hidden)
        answering = pipeline.run(request(json.dumps(body).encode()), lambda data: parse_infer(data, None, LIMITS))
        if cost is None:
            assert (await answering).protected.scores is not None
            assert scheduler.refunds == [False]
            return
        with pytest.raises(Problem, match="probabilities") as caught:
            await answering
    assert caught.value.status == 403
    assert scheduler.refunds == cost
    assert scheduler.admitted == 2 * len(cost)
