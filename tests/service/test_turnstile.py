from __future__ import annotations

import asyncio
import time

import pytest

from service.problems import Problem
from service.turnstile import Turnstile
from tests.service.conftest import PATIENCE_S


def in_time() -> float:
    return time.monotonic() + PATIENCE_S


async def settle() -> None:
    """Let every task go on until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_change_happens_when_nobody_is_inside_and_who_comes_meanwhile_enters_after_it() -> None:
    turnstile, log = Turnstile(), []

    async def change() -> None:
        async with turnstile.closed():
            log.append("change")

    async def visit() -> None:
        await turnstile.enter(in_time())
        log.append("visit")
        turnstile.leave()

    await turnstile.enter(in_time())
    await turnstile.enter(in_time())
    changing, visiting = asyncio.create_task(change()), None
    await settle()
    visiting = asyncio.create_task(visit())
    await settle()
    turnstile.leave()
    await settle()
    assert (log, turnstile.inside, turnstile.waiting) == ([], 1, 1)
    turnstile.leave()
    await asyncio.gather(changing, visiting)
    assert (log, turnstile.inside, turnstile.waiting) == (["change", "visit"], 0, 0)


async def test_who_is_held_back_beyond_its_deadline_gets_504_and_was_never_inside() -> None:
    turnstile = Turnstile()
    async with turnstile.closed():
        with pytest.raises(Problem) as caught:
            await turnstile.enter(time.monotonic() - 1)
    assert caught.value.status == 504
    assert (turnstile.inside, turnstile.waiting) == (0, 0)


async def test_a_change_that_is_given_up_opens_again() -> None:
    turnstile = Turnstile()
    await turnstile.enter(in_time())

    async def change() -> None:
        async with turnstile.closed():
            raise AssertionError("somebody is inside")

    changing = asyncio.create_task(change())
    await settle()
    changing.cancel()
    await asyncio.wait([changing])
    await turnstile.enter(in_time())
    assert turnstile.inside == 2


async def test_a_change_does_not_wait_for_ever_for_who_stays_inside() -> None:
    turnstile = Turnstile(patience_s=0.001)
    await turnstile.enter(in_time())
    with pytest.raises(TimeoutError):
        async with turnstile.closed():
            raise AssertionError("somebody is inside")
    await turnstile.enter(in_time())
    assert turnstile.inside == 2
