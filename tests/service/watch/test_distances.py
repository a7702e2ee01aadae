"""The sample of earlier images that distances are measured to."""

from __future__ import annotations

import zlib

import numpy as np

from service.watch.distances import LATEST, Distances

CAPACITY = 32


def sample_after(key: bytes, thumbnails: np.ndarray) -> np.ndarray:
    """The thumbnails that are kept of ``(N, 192)``."""
    distances = Distances(0.9, 10, CAPACITY + LATEST, key)
    for index, thumbnail in enumerate(thumbnails):
        distances.look(thumbnail, index % 10)
    assert distances._sample is not None
    return distances._sample


def test_nobody_can_choose_which_images_stay_in_the_sample() -> None:
    chance = np.random.default_rng(0)
    drawn = chance.integers(0, 256, (CAPACITY, 192), np.uint8)
    steered = []  # a hash without a key would keep none of them
    for number in range(CAPACITY, CAPACITY + 200):
        while zlib.crc32((thumbnail := chance.integers(0, 256, 192, np.uint8)).tobytes()) % (number + 1) < CAPACITY:
            pass
        steered.append(thumbnail)
    images = np.concatenate([drawn, np.stack(steered)])
    one, other = sample_after(b"one", images), sample_after(b"other", images)
    for sample in (one, other):
        assert not np.array_equal(sample, drawn), "some of the later ones are in it"
        assert len(np.unique(sample, axis=0)) == CAPACITY
    assert not np.array_equal(one, other)
    assert np.array_equal(one, sample_after(b"one", images))
