"""Admission, with a real queue and a real limiter whose clock stands still."""

from __future__ import annotations

import numpy as np
import pytest

from service.admission import Admission
from service.batcher import Batcher
from service.identity import Caller
from service.metrics import Metrics
from service.problems import Problem
from service.quota import Limiter, MemoryLimiter, parse_windows


class NoEngine:
    lanes = 1

    async def up(self) -> None: ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        raise AssertionError("nothing is classified here")


ANN, BOB = Caller("192.0.2.1", "anonymous"), Caller("192.0.2.2", "anonymous")


class Desk:
    """An admission and all that it stands on."""

    def __init__(self, limits: str | None, places: int = 10, suspects: str | None = None) -> None:
        self.metrics = Metrics()
        self.batcher = Batcher(NoEngine(), 4, 0.0, places, self.metrics)
        limiters: dict[str, Limiter] = {}
        if limits is not None:
            limiters["anonymous"] = MemoryLimiter(parse_windows(limits), 100, lambda: 1000.0)
        if suspects is not None:
            limiters["suspect"] = MemoryLimiter(parse_windows(suspects), 100, lambda: 1000.0)
        self.admission = Admission(self.batcher, limiters, self.metrics)

    async def left(self, caller: Caller = ANN) -> int:
        (level,) = await self.admission.levels(caller, caller.tier)
        return level.remaining


async def test_an_answered_request_stays_charged_and_gives_its_places_back() -> None:
    desk = Desk("5/minute")
    ticket = await desk.admission.admit(ANN, 3, ANN.tier)
    assert desk.batcher.queued_images == 3
    assert [level.remaining for level in ticket.levels] == [2]
    desk.admission.settle(ticket, refund=False)
    assert desk.batcher.queued_images == 0
    assert await desk.left() == 2
    assert await desk.left(BOB) == 5


async def test_a_failed_request_is_refunded_once_and_gives_its_places_back() -> None:
    desk = Desk("5/minute")
    kept, failed = await desk.admission.admit(ANN, 1, ANN.tier), await desk.admission.admit(ANN, 3, ANN.tier)
    for _ in range(2):
        desk.admission.settle(failed, refund=True)
    assert await desk.left() == 4
    assert desk.batcher.queued_images == 1
    desk.admission.settle(kept, refund=False)
    assert desk.batcher.queued_images == 0


async def test_a_request_over_quota_is_a_429_that_says_when_to_come_back_and_holds_nothing() -> None:
    desk = Desk("5/minute")
    desk.admission.settle(await desk.admission.admit(ANN, 4, ANN.tier), refund=False)
    with pytest.raises(Problem) as refusal:
        await desk.admission.admit(ANN, 2, ANN.tier)
    assert refusal.value.status == 429
    assert refusal.value.headers["Retry-After"] == "60"
    assert "minute" in refusal.value.detail
    assert desk.batcher.queued_images == 0
    assert await desk.left() == 1
    denied = desk.metrics.registry.get_sample_value("palisade_quota_denied_total", {"tier": "anonymous", "window": "minute"})
    assert denied == 1


async def test_a_request_that_the_quota_could_never_grant_is_a_413_and_holds_nothing() -> None:
    desk = Desk("5/minute")
    with pytest.raises(Problem, match="5 per minute") as refusal:
        await desk.admission.admit(ANN, 6, ANN.tier)
    assert refusal.value.status == 413
    assert desk.batcher.queued_images == 0
    assert await desk.left() == 5


async def test_a_quota_that_is_used_up_for_good_is_a_429_that_asks_nobody_to_come_back() -> None:
    desk = Desk("9/minute;5/lifetime")
    desk.admission.settle(await desk.admission.admit(ANN, 5, ANN.tier), refund=False)
    with pytest.raises(Problem, match="for good") as refusal:
        await desk.admission.admit(ANN, 1, ANN.tier)
    assert (refusal.value.status, refusal.value.headers) == (429, {})
    with pytest.raises(Problem, match="5 in all") as too_large:
        await desk.admission.admit(BOB, 6, BOB.tier)
    assert too_large.value.status == 413
    assert desk.batcher.queued_images == 0


async def test_a_full_queue_is_a_503_that_charges_nothing() -> None:
    desk = Desk("50/minute", places=4)
    await desk.admission.admit(ANN, 3, ANN.tier)
    with pytest.raises(Problem) as refusal:
        await desk.admission.admit(BOB, 2, BOB.tier)
    assert refusal.value.status == 503
    assert "Retry-After" in refusal.value.headers
    assert await desk.left(BOB) == 50
    assert desk.batcher.queued_images == 3


async def test_a_tier_without_a_limiter_is_limited_by_the_queue_alone() -> None:
    desk = Desk("5/minute")
    friend = Caller("key:0123abcd", "trusted")
    for _ in range(20):
        desk.admission.settle(await desk.admission.admit(friend, 10, friend.tier), refund=False)
    assert await desk.admission.levels(friend, friend.tier) == []
    assert await desk.left() == 5


async def test_being_suspect_is_worth_no_second_budget() -> None:
    desk = Desk("20/minute;9/day", suspects="4/minute;8/day")

    async def asked_until_refused(policy: str) -> int:
        images = 0
        while True:
            try:
                desk.admission.settle(await desk.admission.admit(ANN, 1, policy), refund=False)
            except Problem:
                return images
            images += 1

    assert await asked_until_refused("suspect") == 4
    assert await asked_until_refused("anonymous") == 5, "forgiven: what a suspect was answered is in its tier's day"
    assert await asked_until_refused("suspect") == 0
    left = [(level.window.name, level.remaining) for level in await desk.admission.levels(ANN, "suspect")]
    assert left == [("minute", 0), ("day", 0)]
    assert await asked_until_refused("anonymous") == 0


async def test_a_suspect_whose_tier_has_nothing_left_is_charged_nothing() -> None:
    desk = Desk("3/day", suspects="4/minute")
    desk.admission.settle(await desk.admission.admit(ANN, 3, "anonymous"), refund=False)
    with pytest.raises(Problem) as refusal:
        await desk.admission.admit(ANN, 1, "suspect")
    assert refusal.value.headers["Retry-After"] == "86400"
    assert desk.batcher.queued_images == 0
    left = [(level.window.name, level.remaining) for level in await desk.admission.levels(ANN, "suspect")]
    assert left == [("minute", 4), ("day", 0)]
    denied = desk.metrics.registry.get_sample_value("palisade_quota_denied_total", {"tier": "anonymous", "window": "day"})
    assert denied == 1


async def test_a_suspects_failed_request_is_refunded_to_both_quotas() -> None:
    desk = Desk("9/minute", suspects="4/minute")
    ticket = await desk.admission.admit(ANN, 3, "suspect")
    assert [level.remaining for level in ticket.levels] == [1], "the tighter of the two"
    desk.admission.settle(ticket, refund=True)
    assert await desk.left() == 9
    assert [level.remaining for level in await desk.admission.levels(ANN, "suspect")] == [4]


@pytest.mark.parametrize(("limits", "suspects"), [("5/day", "5/minute"), ("5/minute", "5/day")])
async def test_a_suspect_whom_both_quotas_refuse_is_told_when_both_have_room(limits: str, suspects: str) -> None:
    desk = Desk(limits, suspects=suspects)
    desk.admission.settle(await desk.admission.admit(ANN, 4, "suspect"), refund=False)
    with pytest.raises(Problem) as refusal:
        await desk.admission.admit(ANN, 2, "suspect")
    assert refusal.value.headers["Retry-After"] == "86400"
    assert "day" in refusal.value.detail
