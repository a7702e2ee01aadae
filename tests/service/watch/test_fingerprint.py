"""What fingerprints say of two images."""

from __future__ import annotations

import numpy as np
import pytest

from service.watch.fingerprint import Fingerprinter
from tests.service.watch.pictures import levels, photos


def shares(one: np.ndarray, other: np.ndarray, secret: bytes = b"secret") -> tuple[np.ndarray, np.ndarray]:
    first, second = Fingerprinter(secret).take(one), Fingerprinter(secret).take(other)
    return (first.free == second.free).mean(axis=1), (first.fixed == second.fixed).mean(axis=1)


def test_a_small_change_keeps_most_and_another_photo_almost_nothing() -> None:
    pictures = photos(40, seed=1)
    changed = pictures.copy()
    changed[:, :, 4:10, 4:10] ^= 16
    free, fixed = shares(pictures, changed)
    assert free.min() > 0.6
    assert fixed.min() > 0.6
    free, fixed = shares(pictures, photos(40, seed=2))
    assert free.max() < 0.25
    assert fixed.max() < 0.25


def test_a_shifted_picture_is_the_same_scene_at_another_place() -> None:
    pictures = photos(40, seed=1)
    free, fixed = shares(pictures, np.roll(pictures, 2, axis=3))
    assert np.median(free) > 0.6
    assert fixed.max() < 0.6


def test_a_repeat_is_told_from_the_smallest_step_of_a_search() -> None:
    exact = photos(1, seed=1).astype(np.float32) / 255
    take = Fingerprinter(b"secret").take
    assert take(exact).exact == take(exact.copy()).exact
    assert take(exact).exact == take(np.clip(exact + np.float32(1e-8), 0, 1)).exact, "the noise of computing"
    step = np.random.default_rng(0).normal(0, 0.05 / 255, exact.shape).astype(np.float32)
    assert take(exact).exact != take(np.clip(exact + step, 0, 1)).exact
    one_value = photos(1, seed=1)
    one_value[0, 0, 0, 0] ^= 1
    assert take(photos(1, seed=1)).exact != take(one_value).exact


def test_pixels_and_tensors_of_the_same_picture_look_alike() -> None:
    pixels = photos(5, seed=3)
    free, fixed = shares(pixels, pixels.astype(np.float32) / 255)
    assert (free == 1).all()
    assert (fixed == 1).all()


def test_nobody_can_work_fingerprints_out_without_the_secret() -> None:
    pictures = photos(20, seed=1)
    one, other = Fingerprinter(b"one").take(pictures), Fingerprinter(b"other").take(pictures)
    assert (one.free == other.free).mean() < 0.01
    assert not (one.exact == other.exact).any()
    drawn = Fingerprinter().take(pictures)
    assert not (drawn.exact == Fingerprinter().take(pictures).exact).any()


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 8, 8), (1, 3, 224, 200)])
def test_images_of_any_size_have_fingerprints_of_one_size(shape: tuple[int, ...]) -> None:
    pictures = levels(np.random.default_rng(0).uniform(0, 255, shape))
    prints = Fingerprinter(b"secret").take(pictures)
    assert prints.free.shape == prints.fixed.shape == (shape[0], 48)
    blank = Fingerprinter(b"secret").take(levels(np.full(shape, 7.0)))
    assert (blank.free != prints.free).any()


def test_a_fingerprint_does_not_depend_on_the_images_beside_it() -> None:
    pictures = photos(9, seed=4)
    take = Fingerprinter(b"secret").take
    together = take(pictures)
    for index in range(len(pictures)):
        alone = take(pictures[index : index + 1])
        assert alone.exact[0] == together.exact[index]
        assert (alone.free[0] == together.free[index]).all()
        assert (alone.fixed[0] == together.fixed[index]).all()
