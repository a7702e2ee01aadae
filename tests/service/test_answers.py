"""The cache of answers already given."""

from __future__ import annotations

import numpy as np

from service.answers import AnswerCache, digest
from service.watch.fingerprint import Fingerprinter


def row(value: float) -> np.ndarray:
    return np.array([value, 1 - value], np.float32)


def test_the_first_answer_stands_when_two_callers_computed_the_same_image() -> None:
    answers = AnswerCache(10)
    first, second = row(0.25), row(0.75)
    assert answers.keep(b"image", first) is first
    assert answers.keep(b"image", second) is first
    assert answers.get(b"image") is first


def test_an_unknown_image_has_no_answer() -> None:
    answers = AnswerCache(10)
    answers.keep(b"image", row(0.25))
    assert answers.get(b"other") is None


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    answers = AnswerCache(2)
    answers.keep(b"a", row(0.1))
    answers.keep(b"b", row(0.2))
    answers.get(b"a")
    answers.keep(b"c", row(0.3))
    assert len(answers) == 2
    assert answers.get(b"b") is None
    assert answers.get(b"a") is not None
    assert answers.get(b"c") is not None


def test_a_capacity_of_zero_keeps_nothing() -> None:
    answers = AnswerCache(0)
    fresh = row(0.5)
    assert answers.keep(b"image", fresh) is fresh
    assert answers.get(b"image") is None
    assert len(answers) == 0


def test_the_key_is_the_pixels_whatever_their_layout() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    turned = np.ascontiguousarray(pixels.transpose(1, 2, 0)).transpose(2, 0, 1)
    assert digest(turned) == digest(pixels)
    changed = pixels.copy()
    changed[2, 3, 4] ^= 1
    assert digest(changed) != digest(pixels)


def test_a_step_that_the_watch_takes_for_a_repeat_is_answered_as_one() -> None:
    """Else a search by such steps would be answered and not counted."""
    image = np.full((3, 4, 5), 100.2 / 255, np.float32)
    step, larger = image.copy(), image.copy()
    step[0, 0, 0] += 0.002 / 255
    larger[0, 0, 0] += 0.05 / 255
    take = Fingerprinter(b"secret").take
    exact = take(np.stack([image, step, larger])).exact
    assert [bool(exact[0] == each) for each in exact] == [True, True, False]
    assert [digest(image) == digest(each) for each in (image, step, larger)] == [True, True, False]
