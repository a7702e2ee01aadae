"""Partitions: the training data in disjoint parts, one for each expert, told apart by the images' pixels alone.

Source: Levine and Feizi, "Deep Partition Aggregation: provable defense against general poisoning attacks" (2021), section 3.
The certificate of :mod:`model.certificate` rests on this: what one sample is, and whether it is there, decides about one part.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from training.data import Dataset, Split

RULE = "SHA-256 of the pixels (rows of RGB bytes), as a number, modulo the number of partitions"


def partition_of(digest: str, count: int) -> int:
    """Return the partition, from 0, of the image with this SHA-256 in hexadecimal. Labels and other images don't matter."""
    return int(digest, 16) % count


def partitions(dataset: Dataset, count: int) -> list[Dataset]:
    """Return the data as ``count`` disjoint datasets, each a function of its own samples, whatever order they came in.

    A sample that is inserted, removed or relabelled changes one of them, one whose pixels change two. All have the classes and
    the test images of the whole.

    Args:
        dataset: The data.
        count: How many.

    Raises:
        ValueError: A partition would be empty.
    """
    digests, labels = dataset.train.digests(), dataset.train.labels.tolist()
    members: list[list[int]] = [[] for _ in range(count)]
    for position in sorted(range(len(digests)), key=lambda i: (digests[i], labels[i])):
        members[partition_of(digests[position], count)].append(position)
    empty = [index for index, positions in enumerate(members) if not positions]
    if empty:
        raise ValueError(f"{dataset.name}: partition {empty[0]} of {count} gets none of the {len(digests)} training images")
    return [_part(dataset, index, torch.tensor(positions), count) for index, positions in enumerate(members)]


def held_out(dataset: Dataset, size: int, count: int = 1) -> Split:
    """Return the training images that no expert was trained on.

    Args:
        dataset: The data.
        size: How many were held out in all.
        count: How many partitions the experts were trained on, each of which held out its share; 1 for all data together.
    """
    if count == 1:
        return dataset.split_holdout(size)[1]
    parts = [part.split_holdout(size // count)[1] for part in partitions(dataset, count)]
    return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def check_classes(dataset: Dataset) -> None:
    """Raise ``ValueError`` if a class of the data that are to be trained on has no test image.

    The list of classes would follow from the training data, and one added sample could change every expert.
    """
    tested = set(dataset.test.labels.tolist())
    for label, name in enumerate(dataset.label_names):
        if label not in tested:
            raise ValueError(
                f"{dataset.name}: class {name} has no test image, so that training images alone would say that it is a class "
                "and one added sample could change every expert: add a test image of it, or remove the class"
            )


def _part(dataset: Dataset, index: int, positions: torch.Tensor, count: int) -> Dataset:
    train = dataset.train.take(positions)
    digest = hashlib.sha256(train.images.permute(0, 2, 3, 1).contiguous().numpy().data)
    digest.update(train.labels.numpy().astype("<i8").tobytes())
    return replace(dataset, name=f"{dataset.name}, partition {index} of {count}", train=train, digest=digest.hexdigest())
