"""What the watch notices, what it leaves alone, and what it remembers."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.identity import Caller
from service.metrics import Metrics
from service.problems import Problem
from service.settings import Settings
from service.watch import Watch
from tests.service.watch.pictures import levels, photos

ANN, BOB, EVE = Caller("ann", "anonymous"), Caller("bob", "anonymous"), Caller("eve", "trusted")
CLASSES = 10


class World:
    """A watch with a clock that the test moves."""

    def __init__(self, **settings: Any) -> None:
        self.now = 5000.0
        self.metrics = Metrics()
        self.watch = Watch(Settings(**settings), self.metrics, lambda: self.now, secret=b"secret")

    async def ask(self, caller: Caller, images: np.ndarray, rows: np.ndarray | None = None) -> int:
        """Send images one by one; returns how many were answered before one was refused."""
        for index in range(len(images)):
            row = sure(index)[None] if rows is None else rows[index : index + 1]
            try:
                look = await self.watch.before(caller, images[index : index + 1])
            except Problem:
                return index
            await self.watch.after(caller, images[index : index + 1], row, look)
        return len(images)

    async def ask_together(self, caller: Caller, images: np.ndarray, rows: np.ndarray) -> None:
        """Send images in one request that is answered."""
        await self.watch.after(caller, images, rows, await self.watch.before(caller, images))

    async def suspected(self) -> list[tuple[str, str]]:
        return [(each.caller, each.detector) for each in await self.watch.suspects()]

    def counted(self, detector: str) -> float:
        return self.metrics.registry.get_sample_value("palisade_suspicious_total", {"detector": detector}) or 0.0


def sure(label: int) -> np.ndarray:
    return np.where(np.arange(CLASSES) == label % CLASSES, 0.91, 0.01).astype(np.float32)


def unsure(label: int) -> np.ndarray:
    return np.where(np.arange(CLASSES) == label % CLASSES, 0.19, 0.09).astype(np.float32)


def search(count: int, seed: int = 1) -> np.ndarray:
    """Steps of a search around one picture: a patch of it moves by two levels at random places."""
    chance = np.random.default_rng(seed)
    images = np.repeat(photos(1, seed), count, axis=0).astype(np.int16)
    for image in images:
        top, left = chance.integers(0, 27, 2)
        image[:, top : top + 5, left : left + 5] += chance.integers(-16, 17, (3, 1, 1))
    return levels(images)


async def test_a_search_is_refused_and_nothing_else_of_its_caller_is() -> None:
    world = World(watch_sequence_images=30, watch_distances="off")
    answered = await world.ask(ANN, search(60))
    assert 28 <= answered <= 34  # some steps happen to be repeats
    assert await world.ask(ANN, search(5, seed=1)[:1]) == 1, "a repeat of what was answered"
    assert await world.ask(ANN, photos(20, seed=9)) == 20
    assert await world.ask(BOB, search(20)) == 20
    assert await world.suspected() == [("ann", "near-duplicates")]
    assert world.counted("near-duplicates") == 1
    with pytest.raises(Problem) as caught:
        await world.watch.before(ANN, search(61)[60:])
    assert (caught.value.status, caught.value.reason) == (429, "abnormal-usage-detected")
    assert caught.value.headers["Retry-After"] == "3600"
    assert await world.watch.treat(ANN) == ANN, "refusing is all that a search brings about"


async def test_an_exact_repeat_never_counts() -> None:
    world = World(watch_sequence_images=3, watch_distances="off")
    assert await world.ask(ANN, np.repeat(photos(1, seed=1), 200, axis=0)) == 200
    together = np.repeat(photos(1, seed=1), 128, axis=0)
    assert not (await world.watch.before(ANN, together)).is_new.any(), "nothing of it is new"
    assert await world.suspected() == []


async def test_a_camera_that_moves_may_send_four_times_as_many() -> None:
    frames = [np.roll(photos(1, seed=1)[0], (0, i // 9 % 9, i % 9), axis=(0, 1, 2)) for i in range(81)]
    world = World(watch_sequence_images=10, watch_distances="off")
    assert 36 <= await world.ask(ANN, np.stack(frames)) <= 60


async def test_sequences_fade_and_are_forgiven() -> None:
    world = World(watch_sequence_images=30, watch_memory_minutes=10, watch_distances="off")
    steps = search(200)
    assert await world.ask(ANN, steps[:25]) == 25
    world.now += 3 * 600
    assert await world.ask(ANN, steps[25:50]) == 25, "25 images are 3 after three half-lives"
    refused_at = 50 + await world.ask(ANN, steps[50:])
    assert refused_at < 60
    world.now += 300
    assert await world.ask(ANN, steps[refused_at:]) == 0, "refused for a half-life"
    assert await world.watch.forgive("ann")
    assert await world.ask(ANN, steps[refused_at : refused_at + 20]) == 20
    assert not await world.watch.forgive("ann")


async def test_after_the_time_that_a_refusal_names_one_more_step_is_answered() -> None:
    world = World(watch_sequence_images=30, watch_distances="off")
    steps = search(60)
    refused_at = await world.ask(ANN, steps)
    with pytest.raises(Problem) as caught:
        await world.watch.before(ANN, steps[refused_at : refused_at + 1])
    world.now += int(caught.value.headers["Retry-After"])
    assert await world.ask(ANN, steps[refused_at:]) >= 1


async def test_a_search_is_not_forgotten_for_other_images_in_between() -> None:
    world = World(watch_sequence_images=30, watch_distances="off")
    steps = search(60)
    assert await world.ask(ANN, steps[:25]) == 25
    assert await world.ask(ANN, photos(200, seed=11)) == 200, "more than are remembered"
    assert await world.ask(ANN, steps[25:]) <= 10


async def test_a_full_memory_of_long_runs_still_sees_another_search_begin() -> None:
    world = World(watch_sequence_images=30, watch_recent_images=32, watch_distances="off")
    for seed in range(1, 5):
        assert await world.ask(ANN, search(26, seed)) == 26
    both = np.stack([search(60, 7), search(60, 8)], axis=1).reshape(120, 3, 32, 32)
    assert await world.ask(ANN, both) < 70


async def test_a_refusal_names_the_images() -> None:
    world = World(watch_sequence_images=3, watch_distances="off")
    photo, steps = photos(3, seed=9), search(6)
    with pytest.raises(Problem) as some:
        await world.watch.before(ANN, np.stack([photo[0], *steps[:4], steps[4], photo[1], steps[5]]))
    assert some.value.detail.startswith("images 6, 8: too many nearly equal images")
    assert "send the others without them" in some.value.detail
    with pytest.raises(Problem) as everything:
        await world.watch.before(ANN, steps[5:])
    assert everything.value.detail.startswith("too many nearly equal images")
    assert "others" not in everything.value.detail


def needed_images() -> int:
    """How many images that are all unsure make a suspect."""
    return math.ceil(math.log(10_000 / 1e-6) / math.log(0.85 / 0.62))


@pytest.mark.parametrize("way", ["not answered", "refused", "nearly the same was not answered"])
async def test_an_image_counts_as_a_repeat_only_once_it_was_answered(way: str) -> None:
    """A thief sends each image twice, the first time so that it is remembered and not judged."""
    world = World(watch_distances="off", watch_sequence_images=3)
    count = needed_images()
    images, rows = photos(count, seed=2), np.stack([unsure(index) for index in range(count)])
    refused = search(12)
    await world.ask(ANN, refused)
    for image in images:
        if way == "refused":
            with pytest.raises(Problem):
                await world.watch.before(ANN, np.stack([image, refused[11]]))
        else:
            await world.watch.before(ANN, (image ^ 1 if way.startswith("nearly") else image)[None])
    assert await world.ask(ANN, images, rows) == count
    assert ("ann", "off-distribution") in await world.suspected()


async def test_an_image_is_judged_once_however_often_it_is_in_a_request_and_in_how_many() -> None:
    world = World(watch_horizon_images=10, watch_false_alarms=0.5, watch_distances="off")
    images, rows = photos(12, seed=2), np.stack([unsure(index) for index in range(12)])
    many, theirs = np.tile(images, (10, 1, 1, 1)), np.tile(rows, (10, 1))
    looks = [await world.watch.before(ANN, many) for _ in range(3)]  # three requests at once
    for look in looks:
        assert look.is_new.all()
        await world.watch.after(ANN, many, theirs, look)
    assert world.counted("off-distribution") == 12 - math.floor(math.log(10 / 0.5) / math.log(0.85 / 0.62))
    frames = np.stack([np.roll(photos(1, seed=1)[0], (i // 9, i % 9), axis=(1, 2)) for i in range(81)])
    world = World(watch_distances="off")
    assert needed_images() < 81
    await world.ask_together(ANN, frames, np.stack([unsure(index) for index in range(81)]))
    assert await world.suspected() == [], "frames of one scene are one image"


async def test_an_image_that_was_forgotten_before_its_answer_came_is_judged() -> None:
    world = World(watch_distances="off", watch_recent_images=8)
    count = needed_images()
    images, rows = photos(count, seed=2), np.stack([unsure(index) for index in range(count)])
    await world.ask_together(ANN, images, rows)
    assert await world.suspected() == [("ann", "off-distribution")]


async def test_sure_answers_do_not_renew_a_suspicion() -> None:
    world = World(watch_distances="off", suspect_minutes=5)
    count = needed_images() + 20
    await world.ask(ANN, photos(count, seed=2), np.stack([unsure(index) for index in range(count)]))
    told = world.counted("off-distribution")
    await world.ask(ANN, photos(5, seed=3))
    assert world.counted("off-distribution") == told


async def test_what_led_to_a_suspicion_that_has_run_out_does_not_renew_it() -> None:
    world = World(watch_distances="off", suspect_minutes=5)
    count = needed_images()
    images, rows = photos(3 * count, seed=2), np.stack([unsure(index) for index in range(3 * count)])
    await world.ask(ANN, images[: 2 * count], rows[: 2 * count])
    assert await world.watch.is_suspect("ann")
    world.now += 300
    await world.ask(ANN, images[2 * count : 2 * count + 20], rows[:20])
    assert not await world.watch.is_suspect("ann")
    await world.ask(ANN, images[2 * count + 20 :], rows[20:count])
    assert await world.watch.is_suspect("ann"), "new evidence does"


async def test_a_thief_with_strange_images_is_suspected_when_the_evidence_says_so() -> None:
    world = World(watch_distances="off", suspect_minutes=5)
    needed = needed_images()
    images, rows = photos(needed, seed=2), np.stack([unsure(index) for index in range(needed)])
    await world.ask(ANN, images[:-1], rows[:-1])
    assert await world.watch.treat(ANN) == ANN
    await world.ask(ANN, images[-1:], rows[-1:])
    assert await world.watch.treat(ANN) == Caller("ann", "suspect")
    assert await world.suspected() == [("ann", "off-distribution")]
    assert world.counted("off-distribution") == 1
    assert await world.watch.treat(BOB) == BOB
    world.now += 300
    assert await world.watch.treat(ANN) == ANN


async def test_who_sends_mostly_what_the_model_knows_is_not_suspected() -> None:
    world = World(watch_distances="off")
    rows = np.stack([unsure(index) if index % 2 else sure(index) for index in range(400)])
    await world.ask(ANN, photos(400, seed=3), rows)
    assert await world.suspected() == []


@pytest.mark.parametrize("what", ["one subject", "repeats"])
async def test_strange_images_alone_are_no_theft(what: str) -> None:
    world = World(watch_distances="off")
    if what == "one subject":
        await world.ask(ANN, photos(300, seed=4), np.stack([unsure(index % 3) for index in range(300)]))
    else:
        await world.ask(ANN, np.tile(photos(20, seed=4), (15, 1, 1, 1)), np.stack([unsure(i) for i in range(300)]))
    assert await world.suspected() == []


async def test_images_made_from_each_other_are_suspected_and_photos_are_not() -> None:
    world = World()
    honest = photos(400, seed=5)
    await world.ask(ANN, honest)
    assert await world.suspected() == []
    seeds = photos(150, seed=6)
    sign = np.random.default_rng(6).choice([-25, 25], (*seeds.shape[:2], 8, 8)).repeat(4, axis=2).repeat(4, axis=3)
    made = levels(seeds + sign)
    labels = np.arange(150) % CLASSES
    rows = np.stack([sure(label) for label in labels])
    await world.ask(BOB, np.concatenate([seeds, made]), np.concatenate([rows, rows]))
    assert await world.suspected() == [("bob", "distances")]
    assert await world.watch.is_suspect("bob")
    told = world.counted("distances")
    await world.ask(BOB, photos(24, seed=12))
    assert world.counted("distances") <= told + 1, "only the image that completes a test speaks"
    world.now += 3600
    await world.ask(BOB, photos(60, seed=13))
    assert not await world.watch.is_suspect("bob"), "the distances of before do not renew it"


async def test_tiers_choose_what_is_done_about_them() -> None:
    world = World(watch_sequence_images=5, watch_distances="off", tier_anonymous_watch="off")
    assert await world.ask(EVE, search(60)) == 60, "trusted callers are only counted"
    assert await world.suspected() == [("eve", "near-duplicates")]
    assert await world.ask(ANN, search(60)) == 60
    strange = photos(120, seed=7)
    await world.ask(EVE, strange, np.stack([unsure(index) for index in range(120)]))
    assert await world.watch.is_suspect("eve")
    assert await world.watch.treat(EVE) == EVE
    assert {caller for caller, _ in await world.suspected()} == {"eve"}


@pytest.mark.parametrize(
    "settings", [{"limits": "off"}, {"watch_near_duplicates": "off", "watch_off_distribution": "off", "watch_distances": "off"}]
)
async def test_detectors_can_be_turned_off(settings: dict[str, str]) -> None:
    world = World(watch_sequence_images=5, **settings)
    assert await world.ask(ANN, search(60)) == 60
    assert await world.ask(ANN, photos(150, seed=7), np.stack([unsure(index) for index in range(150)])) == 150
    assert await world.suspected() == []


async def test_another_checkpoints_confidences_are_not_judged_by_default() -> None:
    world = World(watch_distances="off", checkpoint="other.safetensors")
    await world.ask(ANN, photos(150, seed=7), np.stack([unsure(index) for index in range(150)]))
    assert await world.suspected() == []


async def test_memory_is_bounded_by_callers_and_by_caller() -> None:
    world = World(watch_max_callers=3)
    for name in "abcdef":
        await world.ask(Caller(name, "anonymous"), photos(400, seed=8))
    assert world.watch.nbytes <= 3 * 72_000
    assert world.watch.nbytes > 2 * 60_000, "else the bound says nothing"


async def test_many_images_at_once_are_judged_as_one_by_one() -> None:
    one, many = (World(watch_horizon_images=10, watch_false_alarms=0.5, watch_distances="off") for _ in range(2))
    images = np.concatenate([photos(10, seed=9), photos(10, seed=9), search(20), photos(20, seed=10)])
    rows = np.stack([unsure(index) for index in range(len(images))])
    await one.ask(ANN, images, rows)
    await many.ask_together(ANN, images, rows)
    told = one.counted("off-distribution")
    assert told == many.counted("off-distribution")
    threshold, evidence = math.log(10 / 0.5), math.log(0.85 / 0.62)
    assert told == 10 + 1 + 20 - math.floor(threshold / evidence), "31 different pictures, of which the first do not reach it"


class Beside:
    """Something else that the event loop has to do; counts its turns."""

    turns = 0

    async def run(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)


@pytest.mark.parametrize(("count", "side", "least"), [(128, 32, 8), (1, 128, 1)])
async def test_others_have_their_turn_while_images_are_looked_at(count: int, side: int, least: int) -> None:
    world, images, beside = World(), photos(count, seed=9, side=side), Beside()
    running = asyncio.create_task(beside.run())
    look = await world.watch.before(ANN, images)
    assert beside.turns >= least
    beside.turns = 0
    await world.watch.after(ANN, images, np.stack([sure(index) for index in range(count)]), look)
    assert beside.turns >= least
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"suspect_label_only": False, "suspect_decimals": 4}, "SUSPECT_DECIMALS"),
        ({"suspect_label_only": False, "suspect_top_n": 0, "tier_standard_top_n": 2}, "SUSPECT_TOP_N"),
        ({"watch_honest_share": 0.9}, "watch_honest_share is 0.9"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Settings(**settings)
