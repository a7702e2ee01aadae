"""Datasets: uint8 images and integer labels, a training and a test split of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

PARTS = ("train", "test")


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: ``(N, 3, H, W)`` uint8, channels-last in memory.
        labels: ``(N,)`` int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: torch.Tensor | slice) -> Split:
        """Return the samples at ``indices``, which may be on any device, on the split's device."""
        if isinstance(indices, torch.Tensor):
            indices = indices.to(self.labels.device)
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device, still uint8 and channels-last; nothing is copied when it is there already."""
        return Split(self.images.to(device), self.labels.to(device))

    def digests(self) -> list[str]:
        """Return the SHA-256 (hex) of each image's pixels, as rows of RGB bytes: a sample's identity, whatever its label."""
        rows = self.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [hashlib.sha256(image.data).hexdigest() for image in rows]

    def digest(self) -> str:
        """Return the SHA-256 (hex) over all pixels, as rows of RGB bytes, and then all labels, as little-endian int64."""
        digest = hashlib.sha256(self.images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the classes' names.

    Attributes:
        name: What the data were called when they were loaded.
        train: The training split.
        test: The test split.
        label_names: One name per class.
        digest: SHA-256 over the training split's pixels and labels.
        test_digest: The same of the test split.
        overlap: SHA-256 of the pixels (rows of RGB) of every image that is in both splits, in order of the test split.
        places: For ``train`` and ``test``, where each image comes from: a file below the data's folder, or an array's position.
        provenance: What a checkpoint's header says of the data besides their name and digest.
    """

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    digest: str
    test_digest: str
    overlap: tuple[str, ...] = ()
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    provenance: Mapping[str, str | int] = field(default_factory=dict)

    def without(self, positions: torch.Tensor) -> Dataset:
        """Return the data without the training samples at these positions, with the digest of what is left.

        Args:
            positions: Integers, in any order, on any device.

        Raises:
            ValueError: A class would have no training image left.
        """
        kept = torch.ones(len(self.train), dtype=torch.bool)
        kept[positions.cpu()] = False
        train = self.train.take(kept)
        for label in set(self.train.labels.tolist()) - set(train.labels.tolist()):
            raise ValueError(f"{self.name}: class {self.label_names[label]} would have no training image left")
        places = {**self.places, "train": [self.place("train", row) for row in kept.nonzero()[:, 0].tolist()]}
        return replace(self, train=train, digest=train.digest(), places=places)

    def place(self, part: str, position: int) -> str:
        """Return where an image comes from, as a person would look for it."""
        places = self.places.get(part, ())
        return places[position] if position < len(places) else f"{part}_images[{position}]"

    def described(self) -> dict[str, str | int]:
        """Return what the header of a checkpoint that was trained on these data says of them."""
        return {"name": self.name, "training_sha256": self.digest, **self.provenance}

    def trained(self, header_data: Mapping[str, object]) -> bool:
        """Tell whether a header's data section is that of a checkpoint that was trained on these training samples."""
        return all(header_data.get(key) == self.described().get(key) for key in ("training_sha256", "quarantine_sha256"))

    def split_holdout(self, size: int) -> tuple[Split, Split]:
        """Return the training images without, and only, ``size`` held-out ones, always the same for the same data."""
        if not 0 < size < len(self.train):
            fitting = max(len(self.train) // 10, 1)
            raise ValueError(
                f"cannot hold out {size} of {len(self.train)} training images: give for example --set holdout={fitting}"
            )
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(20))
        return self.train.take(order[size:].sort().values), self.train.take(order[:size].sort().values)
