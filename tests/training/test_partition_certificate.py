"""The certificate of partition mode by brute force: every single-sample change of a small set, retrained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch

from model.certificate import read_votes, tolerated_partitions
from model.mixture import vote
from training.data import Dataset, Split
from training.partition import partition_of, partitions

EXPERTS, CLASSES, SIZE = 9, 3, 72


def sample(count: int, seed: int) -> Split:
    """Return noisy 2 x 2 images whose classes overlap, so that experts disagree."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 200, (count, 3, 2, 2), generator=generator)
    images[torch.arange(count), labels] += 50
    return Split(images.to(torch.uint8), labels)


def data_of(train: Split) -> Dataset:
    return Dataset("noise", train, TESTS, ("red", "green", "blue"), "", "")


TESTS = sample(60, seed=2)
TRAIN = sample(SIZE, seed=1)
CANDIDATES = sample(30, seed=3)
"""Images that the attacker may insert, with any label."""


def nearest_mean(train: Split, images: torch.Tensor) -> torch.Tensor:
    """Learn each class's mean image and answer with log-probabilities ``(N, C)`` by the distance to each."""
    flat, queries = train.images.flatten(1).double(), images.flatten(1).double()
    means = torch.stack(
        [
            flat[train.labels == label].mean(dim=0)
            if (train.labels == label).any()
            else torch.full((12,), 1e3, dtype=torch.float64)
            for label in range(3)
        ]
    )
    return (-torch.cdist(queries, means) / 20).log_softmax(dim=1).float()


def answers(train: Split) -> np.ndarray:
    """Train an expert on each partition and return their vote's probabilities ``(N, C)`` for the test images."""
    experts = [nearest_mean(part.train, TESTS.images) for part in partitions(data_of(train), EXPERTS)]
    probabilities: np.ndarray = vote(torch.stack(experts, dim=1)).exp().numpy()
    return probabilities


def with_label(at: int, label: int) -> Split:
    labels = TRAIN.labels.clone()
    labels[at] = label
    return Split(TRAIN.images, labels)


def single_changes() -> Iterator[Split]:
    """Yield the training set after each removal, each relabelling and each insertion of a candidate."""
    for at in range(SIZE):
        yield TRAIN.take(torch.tensor([i for i in range(SIZE) if i != at]))
        for label in range(CLASSES):
            if label != TRAIN.labels[at]:
                yield with_label(at, label)
    for image in CANDIDATES.images:
        for label in range(CLASSES):
            yield Split(torch.cat([TRAIN.images, image[None]]), torch.cat([TRAIN.labels, torch.tensor([label])]))


def poisoned(chosen: tuple[int, ...], label: int) -> Split:
    """Return the training set with every sample of the chosen partitions relabelled."""
    parts = partitions(data_of(TRAIN), EXPERTS)
    labels = [torch.full_like(p.train.labels, label) if i in chosen else p.train.labels for i, p in enumerate(parts)]
    return Split(torch.cat([part.train.images for part in parts]), torch.cat(labels))


@pytest.fixture(scope="module")
def clean() -> tuple[np.ndarray, np.ndarray]:
    """The labels that the vote gives the test images, and how many changed partitions each is certified for."""
    probabilities = answers(TRAIN)
    return probabilities.argmax(axis=1), tolerated_partitions(read_votes(probabilities, EXPERTS))


def test_no_single_change_of_the_training_data_changes_a_certified_answer(clean: tuple[np.ndarray, np.ndarray]) -> None:
    labels, tolerated = clean
    changed = np.array([answers(train).argmax(axis=1) != labels for train in single_changes()])  # (changes, N)
    assert len(changed) == SIZE * CLASSES + len(CANDIDATES) * CLASSES
    assert (tolerated >= 1).sum() >= 10
    assert not changed[:, tolerated >= 1].any()
    assert changed[:, tolerated == 0].any(axis=0).sum() >= 5  # the changes are of consequence where nothing is certified


def test_no_single_repainted_sample_changes_an_answer_that_tolerates_two_partitions(
    clean: tuple[np.ndarray, np.ndarray],
) -> None:
    """Other pixels lead to another partition, so that two are touched; where it is the same one, tolerating one is enough."""
    labels, tolerated = clean
    reached = {1: np.zeros(len(labels), bool), 2: np.zeros(len(labels), bool)}
    parts = [partition_of(digest, EXPERTS) for digest in [*TRAIN.digests(), *CANDIDATES.digests()]]
    for at in range(SIZE):
        for number, image in list(enumerate(CANDIDATES.images))[::3]:
            images = TRAIN.images.clone()
            images[at] = image
            touched = len({parts[at], parts[SIZE + number]})
            reached[touched] |= answers(Split(images, TRAIN.labels)).argmax(axis=1) != labels
    for touched, changed in reached.items():
        assert (tolerated >= touched).any()
        assert not changed[tolerated >= touched].any()
        assert changed.any()
    assert reached[2][tolerated == 1].any()  # one would not have been enough


@pytest.mark.parametrize("count", [1, 2, 3])
def test_whole_partitions_may_be_poisoned_as_far_as_the_certificate_goes(
    clean: tuple[np.ndarray, np.ndarray], count: int
) -> None:
    labels, tolerated = clean
    changed = np.array(
        [
            answers(poisoned(chosen, label)).argmax(axis=1) != labels
            for chosen in list(combinations(range(EXPERTS), count))[:: 1 + 2 * (count == 3)]
            for label in range(CLASSES)
        ]
    )
    assert (tolerated >= count).any()
    assert not changed[:, tolerated >= count].any()
    assert changed[:, tolerated < count].any()


def test_training_on_all_data_has_no_such_bound(clean: tuple[np.ndarray, np.ndarray]) -> None:
    """Were the certificate read off experts that share their data, single changes would break it."""
    rows = [torch.arange(SIZE)[expert % 2 :: 2] for expert in range(EXPERTS)]  # every sample is in four or five experts' data

    def joint(train: Split) -> np.ndarray:
        chosen = [row[row < len(train)] for row in rows]
        experts = [nearest_mean(train.take(row), TESTS.images) for row in chosen]
        probabilities: np.ndarray = vote(torch.stack(experts, dim=1)).exp().numpy()
        return probabilities

    told = joint(TRAIN)
    claimed = tolerated_partitions(read_votes(told, EXPERTS)) >= 1
    broken = [(joint(train).argmax(axis=1) != told.argmax(axis=1))[claimed].any() for train in single_changes()]
    assert any(broken)
