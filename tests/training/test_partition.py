"""Partitions: which sample is in which, and what one changed sample touches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import colour_arrays
from training.data import Dataset, Split
from training.loading import load_dataset
from training.partition import check_classes, held_out, partition_of, partitions

COUNT = 5


def dataset_of(images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Return a dataset with training images ``(N, H, W, 3)`` uint8 and the tests' usual test images."""
    arrays = colour_arrays()
    train = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))
    test = Split(torch.from_numpy(arrays["test_images"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["test_labels"]))
    return Dataset("colours", train, test, ("red", "green", "blue"), "", "")


@pytest.fixture
def images() -> np.ndarray:
    images: np.ndarray = colour_arrays(train=60)["train_images"]
    return images


@pytest.fixture
def labels() -> np.ndarray:
    labels: np.ndarray = colour_arrays(train=60)["train_labels"]
    return labels


def home(image: np.ndarray) -> int:
    """Return an image's partition, found independently."""
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
    return int.from_bytes(digest, "big") % COUNT


def touched(before: Dataset, after: Dataset) -> set[int]:
    """Return which partitions differ in any sample, its label or its order."""
    pairs = enumerate(zip(partitions(before, COUNT), partitions(after, COUNT), strict=True))
    different = set()
    for index, (one, other) in pairs:
        same = len(one.train) == len(other.train) and all(
            torch.equal(*pair) for pair in ((one.train.images, other.train.images), (one.train.labels, other.train.labels))
        )
        assert same == (one.digest == other.digest)
        if not same:
            different.add(index)
    return different


def test_every_sample_is_in_the_partition_that_its_pixels_say(images: np.ndarray, labels: np.ndarray) -> None:
    parts = partitions(dataset_of(images, labels), COUNT)
    seen = []
    for index, part in enumerate(parts):
        rows = part.train.images.permute(0, 2, 3, 1).numpy()
        assert [home(image) for image in rows] == [index] * len(rows)
        seen += [(image.tobytes(), label) for image, label in zip(rows, part.train.labels.tolist(), strict=True)]
        assert part.label_names == ("red", "green", "blue")
    assert sorted(seen) == sorted((image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))
    assert partition_of("0" * 63 + "b", 9) == 2


def test_partitions_have_nearly_the_same_size_and_all_classes() -> None:
    arrays = colour_arrays(train=900)
    parts = partitions(dataset_of(arrays["train_images"], arrays["train_labels"]), 9)
    assert sum(len(part.train) for part in parts) == 900
    assert all(60 < len(part.train) < 140 and len(part.train.labels.unique()) == 3 for part in parts)


def test_the_order_of_the_data_does_not_matter(images: np.ndarray, labels: np.ndarray) -> None:
    order = np.random.default_rng(3).permutation(len(images))
    assert touched(dataset_of(images, labels), dataset_of(images[order], labels[order])) == set()


def removed(images: np.ndarray, labels: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, set[int]]:
    return np.delete(images, at, 0), np.delete(labels, at), {home(images[at])}


def relabelled(images: np.ndarray, labels: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, set[int]]:
    changed = labels.copy()
    changed[at] = (changed[at] + 1) % 3
    return images, changed, {home(images[at])}


def inserted(images: np.ndarray, labels: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, set[int]]:
    new = 255 - images[at : at + 1]
    return np.concatenate([new, images]), np.concatenate([labels[:1], labels]), {home(new[0])}


def inserted_twin(images: np.ndarray, labels: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, set[int]]:
    return np.insert(images, 0, images[at], 0), np.insert(labels, 0, (labels[at] + 1) % 3), {home(images[at])}


def repainted(images: np.ndarray, labels: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray, set[int]]:
    changed = images.copy()
    changed[at, 0, 0, 0] ^= 1
    return changed, labels, {home(images[at]), home(changed[at])}


@pytest.mark.parametrize("change", [removed, relabelled, inserted, inserted_twin, repainted])
def test_one_changed_sample_touches_one_partition_and_changed_pixels_two(
    images: np.ndarray, labels: np.ndarray, change: Callable[..., tuple[np.ndarray, np.ndarray, set[int]]]
) -> None:
    for at in range(0, 60, 7):
        new_images, new_labels, expected = change(images, labels, at)
        assert touched(dataset_of(images, labels), dataset_of(new_images, new_labels)) == expected


def test_what_is_held_out_is_in_no_partitions_training_images(images: np.ndarray, labels: np.ndarray) -> None:
    dataset = dataset_of(images, labels)
    kept = set(held_out(dataset, 2 * COUNT, COUNT).digests())
    assert len(kept) == 2 * COUNT
    for part in partitions(dataset, COUNT):
        train, holdout = part.split_holdout(2)
        assert not kept & set(train.digests())
        assert set(holdout.digests()) <= kept
    assert held_out(dataset, 10).digests() == dataset.split_holdout(10)[1].digests()


def test_a_class_that_only_training_images_have_is_refused(images: np.ndarray, labels: np.ndarray) -> None:
    dataset = dataset_of(images, labels)
    check_classes(dataset)
    with pytest.raises(ValueError, match="class violet has no test image"):
        check_classes(replace(dataset, label_names=("red", "green", "blue", "violet")))


def test_an_empty_partition_is_refused(images: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"colours: partition \d+ of 50 gets none of the 60 training images"):
        partitions(dataset_of(images, labels), 50)


def test_a_digest_is_that_of_the_rows_of_rgb(images: np.ndarray, labels: np.ndarray, colour_file: object) -> None:
    split = load_dataset(str(colour_file)).train
    expected = [hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest() for image in split.images]
    assert split.digests() == expected
