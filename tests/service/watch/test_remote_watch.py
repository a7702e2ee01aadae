"""What front ends in other processes learn of suspicions."""

from __future__ import annotations

import numpy as np
import pytest

from service.identity import Caller
from service.problems import Problem
from tests.service.test_remote import Pair, in_time
from tests.service.watch.pictures import photos

KEY = Caller("key:ann", "standard")


async def test_a_front_end_learns_the_policy_and_quota_of_a_suspect() -> None:
    async with Pair() as pair:
        ticket = await pair.remote.admit(KEY, 1)
        assert ticket.policy == await pair.remote.policy_of(KEY) == "standard"
        pair.remote.settle(ticket, False)
        pair.scheduler._watch._suspects.suspect(KEY.id, "distances", 1)  # 200 queries, cut short
        ticket = await pair.remote.admit(KEY, 1)
        assert ticket.policy == await pair.remote.policy_of(KEY) == "suspect"
        assert [level.window.quota for level in ticket.levels] == [10, 200]
        pair.remote.settle(ticket, False)
        assert await pair.scheduler.forgive(KEY.id)
        assert await pair.remote.policy_of(KEY) == "standard"


async def test_a_request_on_its_way_is_answered_by_the_policy_of_a_suspect_too() -> None:
    async with Pair() as pair:
        ticket = await pair.remote.admit(KEY, 1)
        pair.scheduler._watch._suspects.suspect(KEY.id, "distances", 1)  # other requests' answers
        await pair.remote.answer(ticket, photos(1, seed=1, side=8), in_time())
        assert ticket.policy == "suspect"
        pair.remote.settle(ticket, False)


async def test_a_search_is_refused_through_a_front_end() -> None:
    steps = np.repeat(photos(1, seed=1, side=8), 130, axis=0)
    steps[:, 0, 0, 0] = np.arange(130)
    async with Pair(places=200) as pair:
        ticket = await pair.remote.admit(KEY, 130)
        with pytest.raises(Problem) as caught:
            await pair.remote.answer(ticket, steps, in_time())
        pair.remote.settle(ticket, True)
        assert (caught.value.status, caught.value.reason) == (429, "abnormal-usage-detected")
        assert [suspect.caller for suspect in await pair.scheduler.suspects()] == ["key:ann"]
        assert pair.engine.batches == []
