"""Admission, with a real queue and a real limiter whose clock stands still."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from starlette.requests import ClientDisconnect

from service.admission import Admission, caller_of
from service.batcher import Batcher
from service.metrics import Metrics
from service.policy import Policy
from service.problems import Problem
from service.quota import Limiter, parse_windows


async def no_engine(images: np.ndarray) -> np.ndarray:
    raise AssertionError("nothing is classified here")


class Desk:
    """An admission and all that it stands on."""

    def __init__(self, limits: str | None, places: int = 10) -> None:
        self.metrics = Metrics()
        self.batcher = Batcher(no_engine, 4, 0.0, places, self.metrics, asyncio.get_running_loop())
        limiter = None if limits is None else Limiter(parse_windows(limits), 100, lambda: 1000.0)
        self.admission = Admission(self.batcher, limiter, Policy("anonymous", 2), self.metrics)

    def left(self, caller: str = "192.0.2.1") -> int:
        (level,) = self.admission.levels(caller)
        return level.remaining


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix:", "unknown"),
        ("192.0.2.1, 198.51.100.7", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_caller_is_an_ipv4_address_or_an_ipv6_network(address: str | None, caller: str) -> None:
    assert caller_of(address) == caller


async def test_an_answered_request_stays_charged_and_gives_its_places_back() -> None:
    desk = Desk("5/minute")
    with desk.admission.admit("192.0.2.1", 3):
        assert desk.batcher.queued_images == 3
    assert desk.batcher.queued_images == 0
    assert desk.left() == 2
    assert desk.left("192.0.2.2") == 5


@pytest.mark.parametrize("failure", [Problem(400, "a bad image", "bad-input"), RuntimeError("a bug")])
async def test_a_failed_request_is_refunded_and_gives_its_places_back(failure: Exception) -> None:
    desk = Desk("5/minute")
    with pytest.raises(type(failure)), desk.admission.admit("192.0.2.1", 3):
        raise failure
    assert desk.left() == 5
    assert desk.batcher.queued_images == 0


async def test_a_client_that_goes_away_stays_charged_and_gives_its_places_back() -> None:
    desk = Desk("5/minute")
    with pytest.raises(ClientDisconnect), desk.admission.admit("192.0.2.1", 3):
        raise ClientDisconnect
    assert desk.left() == 2
    assert desk.batcher.queued_images == 0


async def test_a_request_over_quota_is_a_429_that_says_when_to_come_back_and_holds_nothing() -> None:
    desk = Desk("5/minute")
    with desk.admission.admit("192.0.2.1", 4):
        pass
    with pytest.raises(Problem) as refusal, desk.admission.admit("192.0.2.1", 2):
        pytest.fail("it was admitted")
    assert refusal.value.status == 429
    assert refusal.value.headers["Retry-After"] == "60"
    assert "minute" in refusal.value.detail
    assert desk.batcher.queued_images == 0
    assert desk.left() == 1
    denied = desk.metrics.registry.get_sample_value("palisade_quota_denied_total", {"tier": "anonymous", "window": "minute"})
    assert denied == 1


async def test_a_request_that_the_quota_could_never_grant_is_a_413_and_holds_nothing() -> None:
    desk = Desk("5/minute")
    with pytest.raises(Problem, match="5 per minute") as refusal, desk.admission.admit("192.0.2.1", 6):
        pytest.fail("it was admitted")
    assert refusal.value.status == 413
    assert desk.batcher.queued_images == 0
    assert desk.left() == 5


async def test_a_full_queue_is_a_503_that_charges_nothing() -> None:
    desk = Desk("50/minute", places=4)
    with desk.admission.admit("192.0.2.1", 3):
        with pytest.raises(Problem) as refusal, desk.admission.admit("192.0.2.2", 2):
            pytest.fail("it was admitted")
        assert refusal.value.status == 503
        assert "Retry-After" in refusal.value.headers
        assert desk.left("192.0.2.2") == 50
        assert desk.batcher.queued_images == 3


async def test_without_a_limiter_only_the_queue_limits() -> None:
    desk = Desk(None)
    for _ in range(20):
        with desk.admission.admit("192.0.2.1", 10):
            pass
    assert desk.admission.levels("192.0.2.1") == []
