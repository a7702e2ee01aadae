"""Memory that two processes share: the pixels and the answers of a fixed number of images."""

from __future__ import annotations

import mmap
import os

import numpy as np

from model.architecture import Architecture


class Slab:
    """Slots for images ``(3, H, W)`` and their probabilities ``(C,)``.

    Anonymous memory, so that it needs no file system and goes with the last process that has it.

    Args:
        file: Descriptor from :meth:`make_file` for as many slots.
        slots: How many images fit.
        architecture: ``H``, ``W`` and ``C``.
    """

    def __init__(self, file: int, slots: int, architecture: Architecture) -> None:
        shape = (3, architecture.height, architecture.input_width)
        size = int(np.prod(shape))
        self._map = mmap.mmap(file, _bytes(slots, architecture))
        self._floats = np.frombuffer(self._map, np.float32, slots * size).reshape(slots, *shape)
        # Each slot holds either kind: its bytes lie at the start of where its floats would be.
        self._bytes = self._floats.view(np.uint8).reshape(slots, 4 * size)[:, :size].reshape(slots, *shape)
        self._answers = np.frombuffer(self._map, np.float32, offset=4 * slots * size).reshape(slots, -1)

    @staticmethod
    def make_file(slots: int, architecture: Architecture) -> int:
        """Return the descriptor of new memory, to be handed to the other process."""
        file = os.memfd_create("palisade")
        os.ftruncate(file, _bytes(slots, architecture))
        return file

    def write(self, slots: list[int] | slice, images: np.ndarray) -> str:
        """Put images ``(N, 3, H, W)``, uint8 or float32, into their slots; returns what :meth:`read` needs to know."""
        self._view(images.dtype.str)[slots] = images
        return images.dtype.str

    def read(self, slots: list[int] | slice, kind: str) -> np.ndarray:
        """Return images; a copy for a list of slots, a view for a slice."""
        return self._view(kind)[slots]

    def write_answers(self, slots: list[int] | slice, rows: np.ndarray) -> None:
        """Put probabilities ``(N, C)`` into their slots."""
        self._answers[slots] = rows

    def read_answers(self, slots: list[int] | slice) -> np.ndarray:
        """Return a copy of probabilities ``(N, C)`` float32."""
        return self._answers[slots].copy()

    def _view(self, kind: str) -> np.ndarray:
        return self._bytes if kind == "|u1" else self._floats


def _bytes(slots: int, architecture: Architecture) -> int:
    return 4 * slots * (3 * architecture.height * architecture.input_width + architecture.num_classes)
