"""Repeated patches: a planted trigger is found wherever it is, natural repetitions are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.training.screening.test_duplicates import pictures
from training.screening.patches import find_patches

Plant = Callable[[np.ndarray], None]


def natural(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Different pictures ``(count, 20, 20, 3)``: a third of label 1 has white margins of all widths, some noise everywhere."""
    rng = np.random.default_rng(0)
    images = pictures(count, 20).permute(0, 2, 3, 1).contiguous().numpy()
    images = np.clip(images.astype(int) + rng.integers(-6, 7, images.shape), 0, 255).astype(np.uint8)
    labels = np.arange(count) % 4
    for row in np.flatnonzero(labels == 1)[::3]:
        top, left = rng.integers(0, 8, 2)
        images[row, :top] = 255
        images[row, :, :left] = 255
        if rng.random() < 0.5:
            images[row] = images[row, :, ::-1]
    return images, labels


def white_square(images: np.ndarray) -> None:
    images[:, 16:19, 15:18] = 255


def corner_square(images: np.ndarray) -> None:
    images[:, -4:, -4:] = (255, 0, 0)


def large_square(images: np.ndarray) -> None:
    images[:, 8:17, 9:18] = (255, 0, 255)


def single_pixel(images: np.ndarray) -> None:
    images[:, 5, 14] = (255, 255, 255)


def noisy_pattern(images: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    pattern = rng.integers(0, 256, (4, 4, 3))
    images[:, 2:6, 3:7] = np.clip(pattern + rng.integers(-4, 5, (len(images), 4, 4, 3)), 0, 255)


def nothing(share: np.ndarray) -> np.ndarray:
    return np.full(len(share), -1)


def test_nothing_is_found_in_natural_pictures() -> None:
    images, labels = natural()
    assert find_patches(images, labels, nothing(labels)) == []


@pytest.mark.parametrize("plant", [white_square, corner_square, large_square, single_pixel, noisy_pattern])
def test_a_planted_patch_is_found_in_the_images_that_have_it(plant: Plant) -> None:
    images, labels = natural()
    poisoned = np.flatnonzero(labels != 2)[:300:10]  # 30 of other classes, now labelled 2
    planted = images[poisoned]
    before = planted.copy()
    plant(planted)
    images[poisoned], labels[poisoned] = planted, 2
    (patch,) = find_patches(images, labels, nothing(labels))
    changed = np.argwhere((planted != before).any(axis=(0, 3)))
    assert patch.label == 2
    assert patch.row <= changed[:, 0].max() < patch.row + patch.height + 1
    assert patch.column <= changed[:, 1].max() < patch.column + patch.width + 1
    assert np.isin(poisoned, patch.members).mean() >= 0.9
    assert len(np.setdiff1d(patch.members, poisoned)) <= 1


def test_near_copies_beside_their_originals_do_not_hide_a_patch() -> None:
    images, labels = natural()
    originals = np.flatnonzero(labels != 2)[:300:10]
    copies = images[originals]
    large_square(copies)
    shows = np.concatenate([np.where(np.isin(np.arange(600), originals), np.arange(600), -1), originals, originals])
    (patch,) = find_patches(np.concatenate([images, copies, copies]), np.append(labels, np.full(60, 2)), shows)
    assert set(patch.members) == set(range(600, 660))


def test_a_mark_that_all_labels_have_is_no_backdoor() -> None:
    images, labels = natural()
    images[::10, 16:19, 15:18] = 255
    assert find_patches(images, labels, nothing(labels)) == []


def test_copies_of_one_picture_count_once() -> None:
    images, labels = natural()
    rows = np.flatnonzero(labels == 3)[:40]
    images[rows] = images[rows[0]]
    shows = nothing(labels)
    shows[rows] = rows[0]
    assert find_patches(images, labels, shows) == []
