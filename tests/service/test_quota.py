"""Quotas, with a fake clock."""

from __future__ import annotations

import re
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.quota import (
    Charge,
    Level,
    MemoryLimiter,
    QuotaExceededError,
    RequestTooLargeError,
    Window,
    parse_windows,
    rate_limit_headers,
)

T = TypeVar("T")


class FakeClock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing; one that does fails."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise AssertionError("it waited")


def limiter_of(text: str, max_callers: int = 100) -> tuple[MemoryLimiter, FakeClock]:
    clock = FakeClock()
    return MemoryLimiter(parse_windows(text), max_callers, clock), clock


def remaining(limiter: MemoryLimiter, caller: str = "a") -> list[int]:
    return [level.remaining for level in at_once(limiter.levels(caller))]


def test_a_charge_counts_in_every_window() -> None:
    limiter, _ = limiter_of("5/minute;20/day")
    at_once(limiter.charge("a", 3))
    assert remaining(limiter) == [2, 17]


@pytest.mark.parametrize(("limits", "full"), [("5/minute;20/day", "minute"), ("20/minute;5/day", "day")])
def test_a_refused_request_is_charged_nothing_in_any_window(limits: str, full: str) -> None:
    limiter, _ = limiter_of(limits)
    at_once(limiter.charge("a", 4))
    before = remaining(limiter)
    with pytest.raises(QuotaExceededError) as refusal:
        at_once(limiter.charge("a", 2))
    assert refusal.value.level.window.name == full
    assert remaining(limiter) == before
    at_once(limiter.charge("a", 1))  # what is left can still be used


def test_a_window_that_has_just_begun_ends_after_its_length_and_not_a_rounding_later() -> None:
    limiter, clock = limiter_of("5/day")
    clock.now = 48897.61676404129  # plus 86,400 less itself it is a bit more than 86,400
    at_once(limiter.charge("a", 1))
    assert rate_limit_headers(at_once(limiter.levels("a")))["RateLimit"] == '"day";r=4;t=86400'


def test_of_several_full_windows_the_one_that_resets_last_is_named() -> None:
    limiter, clock = limiter_of("5/day;5/minute;5/hour")
    at_once(limiter.charge("a", 5))
    clock.now += 10
    with pytest.raises(QuotaExceededError) as refusal:
        at_once(limiter.charge("a", 1))
    assert refusal.value.level == Level(Window("day", 5, 86400), 0, 86390.0)


def test_a_window_starts_anew_after_its_length_and_not_before() -> None:
    limiter, clock = limiter_of("2/minute;100/day")
    at_once(limiter.charge("a", 2))
    clock.now += 59.9
    with pytest.raises(QuotaExceededError) as refusal:
        at_once(limiter.charge("a", 1))
    assert refusal.value.level.reset_s == pytest.approx(0.1)
    clock.now += 0.1
    at_once(limiter.charge("a", 2))
    assert remaining(limiter) == [0, 96]


def test_a_window_is_counted_from_its_first_image() -> None:
    limiter, clock = limiter_of("2/minute")
    clock.now += 30
    at_once(limiter.charge("a", 1))
    clock.now += 45
    at_once(limiter.charge("a", 1))
    with pytest.raises(QuotaExceededError) as refusal:
        at_once(limiter.charge("a", 1))
    assert refusal.value.level.reset_s == pytest.approx(15)


@pytest.mark.parametrize(("limits", "window"), [("5/minute;20/day", "minute"), ("50/minute;20/day", "day")])
def test_a_request_that_no_window_could_ever_grant_says_so_and_is_charged_nothing(limits: str, window: str) -> None:
    limiter, _ = limiter_of(limits)
    at_once(limiter.charge("a", 1))
    before = remaining(limiter)
    with pytest.raises(RequestTooLargeError) as refusal:
        at_once(limiter.charge("a", 21))
    assert refusal.value.window.name == window
    assert remaining(limiter) == before


def test_a_window_for_life_never_starts_anew() -> None:
    limiter, clock = limiter_of("5/minute;7/lifetime")
    at_once(limiter.charge("a", 5))
    clock.now += 60
    at_once(limiter.charge("a", 2))
    clock.now += 10**9
    with pytest.raises(QuotaExceededError) as refusal:
        at_once(limiter.charge("a", 1))
    assert refusal.value.level == Level(Window("lifetime", 7, None), 0, None)
    with pytest.raises(RequestTooLargeError):
        at_once(limiter.charge("b", 8))
    assert remaining(limiter, "b") == [5, 7]


def test_a_full_window_for_life_is_named_before_one_that_starts_anew() -> None:
    limiter, _ = limiter_of("5/day;5/lifetime;5/minute")
    at_once(limiter.charge("a", 5))
    with pytest.raises(QuotaExceededError) as refusal:
        at_once(limiter.charge("a", 1))
    assert refusal.value.level.window.name == "lifetime"


def test_a_charge_tells_what_is_left_after_it() -> None:
    limiter, clock = limiter_of("5/minute;7/lifetime")
    at_once(limiter.charge("a", 1))
    clock.now += 20
    minute, lifetime = limiter.windows
    assert at_once(limiter.charge("a", 2)).levels == [Level(minute, 2, 40.0), Level(lifetime, 4, None)]


def test_at_most_twice_the_quota_fits_into_a_windows_length() -> None:
    limiter, clock = limiter_of("10/day")
    at_once(limiter.charge("a", 1))  # opens the window
    clock.now += 86399
    at_once(limiter.charge("a", 9))
    clock.now += 1
    at_once(limiter.charge("a", 10))
    clock.now += 86398  # a day after the nine images
    assert remaining(limiter) == [0]


def test_callers_do_not_share_a_quota() -> None:
    limiter, _ = limiter_of("2/minute")
    at_once(limiter.charge("a", 2))
    at_once(limiter.charge("b", 2))
    with pytest.raises(QuotaExceededError):
        at_once(limiter.charge("a", 1))
    assert remaining(limiter, "c") == [2]


def test_a_refund_gives_back_what_was_charged_in_every_window() -> None:
    limiter, _ = limiter_of("5/minute;20/day")
    at_once(limiter.charge("a", 1))
    limiter.refund(at_once(limiter.charge("a", 3)))
    assert remaining(limiter) == [4, 19]


def test_a_refund_never_credits_a_window_that_started_later() -> None:
    limiter, clock = limiter_of("5/minute;20/day")
    late = at_once(limiter.charge("a", 3))
    clock.now += 60
    at_once(limiter.charge("a", 4))
    limiter.refund(late)
    assert remaining(limiter) == [1, 16]


def test_a_refund_to_a_forgotten_caller_changes_nothing() -> None:
    limiter, clock = limiter_of("5/minute", max_callers=1)
    charge = at_once(limiter.charge("a", 3))
    at_once(limiter.charge("b", 1))
    limiter.refund(charge)
    clock.now += 1
    at_once(limiter.charge("a", 5))
    assert remaining(limiter) == [0]


def test_beyond_the_bound_the_caller_that_was_quiet_longest_is_forgotten() -> None:
    limiter, _ = limiter_of("5/minute", max_callers=2)
    at_once(limiter.charge("a", 4))
    at_once(limiter.charge("b", 4))
    at_once(limiter.charge("a", 1))  # now b is quiet for longer
    at_once(limiter.charge("c", 3))
    assert remaining(limiter, "a") == [0]
    assert remaining(limiter, "b") == [5]
    assert remaining(limiter, "c") == [2]


def test_asking_for_levels_charges_nothing_and_remembers_nobody() -> None:
    limiter, _ = limiter_of("5/minute", max_callers=1)
    at_once(limiter.charge("a", 5))
    assert remaining(limiter, "b") == [5]
    assert remaining(limiter, "a") == [0]


def test_without_windows_nobody_is_refused() -> None:
    limiter, _ = limiter_of("")
    limiter.refund(at_once(limiter.charge("a", 10**9)))
    assert at_once(limiter.levels("a")) == []


def test_a_list_of_windows_is_parsed() -> None:
    windows = parse_windows(" 60 / minute ; 2000/day;1/second;7/hour;9/lifetime; ")
    assert [(window.name, window.quota, window.seconds) for window in windows] == [
        ("minute", 60, 60), ("day", 2000, 86400), ("second", 1, 1), ("hour", 7, 3600), ("lifetime", 9, None),
    ]  # fmt: skip
    assert parse_windows("") == ()


@pytest.mark.parametrize(
    "text",
    ["oops", "60", "60/", "/minute", "0/minute", "-1/minute", "1.5/minute", "60/week", "60/minutes", "60 per minute",
     "60/minute,5/day", "٣/minute", "60/minute;x", "1000000000000000/day"],
)  # fmt: skip
def test_a_text_that_is_no_list_of_windows_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="60/minute;500/day"):
        parse_windows(text)


def test_a_unit_may_not_come_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_windows("60/minute;5/minute")


def test_the_headers_say_what_the_quota_is_and_what_is_left_of_it() -> None:
    levels = [Level(Window("minute", 60, 60), 12, 7.2), Level(Window("day", 2000, 86400), 0, 86400.0)]
    assert rate_limit_headers(levels) == {
        "RateLimit-Policy": '"minute";q=60;w=60, "day";q=2000;w=86400',
        "RateLimit": '"minute";r=12;t=8, "day";r=0;t=86400',
    }
    assert rate_limit_headers([Level(Window("lifetime", 9, None), 4, None)]) == {
        "RateLimit-Policy": '"lifetime";q=9',
        "RateLimit": '"lifetime";r=4',
    }
    assert rate_limit_headers([]) == {}


def test_the_headers_never_hold_a_negative_time() -> None:
    headers = rate_limit_headers([Level(Window("second", 1, 1), 0, -0.7)])
    assert re.search(r"t=0\b", headers["RateLimit"])


actions = st.lists(
    st.one_of(
        st.tuples(st.just("charge"), st.integers(1, 12)),
        st.tuples(st.just("refund"), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.integers(1, 100)),
    ),
    max_size=60,
)


@given(actions=actions, minute=st.integers(1, 20), hour=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_a_window_never_grants_more_than_its_quota_and_never_refuses_what_fits(
    actions: list[tuple[str, int]], minute: int, hour: int
) -> None:
    limiter, clock = limiter_of(f"{minute}/minute;{hour}/hour")
    starts: dict[str, float] = {}  # kept by the test: when each window began
    granted: list[tuple[float, Charge]] = []
    for action, amount in actions:
        if action == "wait":
            clock.now += amount
        elif action == "refund" and granted:
            limiter.refund(granted.pop(amount % len(granted))[1])
        elif action == "charge":
            room = []
            for window in limiter.windows:
                start = starts.get(window.name)
                if start is None or clock.now - start >= window.seconds:
                    room.append(window.quota)
                else:
                    room.append(window.quota - sum(c.images for when, c in granted if when >= start))
            try:
                charge = at_once(limiter.charge("a", amount))
            except (QuotaExceededError, RequestTooLargeError):
                assert amount > min(room)
                continue
            assert amount <= min(room)
            granted.append((clock.now, charge))
            for window in limiter.windows:
                start = starts.get(window.name)
                if start is None or clock.now - start >= window.seconds:
                    starts[window.name] = clock.now
