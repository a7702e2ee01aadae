"""Who is suspected, and for how long."""

from __future__ import annotations

from service.watch.suspects import Suspect, Suspects


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_suspicion_ends_in_time_unless_it_is_renewed() -> None:
    clock = Clock()
    suspects = Suspects(60.0, 10, clock)
    assert suspects.suspect("ann", "distances", 3)
    clock.now += 59
    assert suspects.is_suspected("ann", "distances")
    assert not suspects.suspect("ann", "distances", 2), "renewed, not new"
    clock.now += 59
    assert suspects.list() == [Suspect("ann", "distances", since_s=118.0, until_s=1.0, images=5)]
    assert not suspects.is_suspected("ann", "near-duplicates")
    clock.now += 1
    assert not suspects.is_suspected("ann", "distances")
    assert suspects.list() == []
    assert suspects.suspect("ann", "distances", 1), "new again"
    assert suspects.list() == [Suspect("ann", "distances", since_s=0.0, until_s=60.0, images=1)]


def test_that_a_suspicion_has_ended_is_told_once() -> None:
    clock = Clock()
    suspects = Suspects(60.0, 10, clock)
    assert not suspects.has_ended("ann", "distances", clock.now), "there was none"
    suspects.suspect("ann", "distances", 1)
    assert not suspects.has_ended("ann", "distances", clock.now)
    clock.now += 60
    assert not suspects.has_ended("ann", "near-duplicates", clock.now)
    assert suspects.has_ended("ann", "distances", clock.now)
    assert not suspects.has_ended("ann", "distances", clock.now)


def test_forgiving_drops_all_of_one_caller() -> None:
    clock = Clock()
    suspects = Suspects(60.0, 10, clock)
    for caller, detector in (("ann", "distances"), ("ann", "near-duplicates"), ("bob", "distances")):
        suspects.suspect(caller, detector, 1)
    assert suspects.forgive("ann")
    assert [(each.caller, each.detector) for each in suspects.list()] == [("bob", "distances")]
    assert not suspects.forgive("ann")
    clock.now += 60
    assert not suspects.forgive("bob"), "it was over already"


def test_the_oldest_suspicion_goes_when_there_are_too_many() -> None:
    suspects = Suspects(60.0, 2, Clock())
    for caller in ("ann", "bob", "ann", "cid"):
        suspects.suspect(caller, "distances", 1)
    assert [each.caller for each in suspects.list()] == ["cid", "ann"]
