"""Answers already given, so that sending an image again can't average rounding away."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from service.watch.fingerprint import told_apart


class AnswerCache:
    """A bounded cache from an image's digest to its probabilities.

    An image's probabilities differ in the last bits with the batch that it rides in. The first answer is kept, and a policy is
    a pure function of it, so identical images get identical answers under every policy while the cache holds them.

    Args:
        capacity: Images; the one that was used longest ago is dropped. 0 keeps nothing.

    Attributes:
        capacity: As given.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> np.ndarray | None:
        """Return the probabilities ``(C,)`` kept under ``key``."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def keep(self, key: bytes, row: np.ndarray) -> np.ndarray:
        """Return the probabilities to answer with: those kept first when two callers computed the same image at once."""
        if self.capacity == 0:
            return row
        row = self._rows.setdefault(key, row)
        if len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
        return row


def digest(image: np.ndarray) -> bytes:
    """Return the key of a decoded and resized image ``(3, H, W)``, uint8 or float32.

    Float images have one key when the watch takes them for repeats of each other.
    """
    data = np.ascontiguousarray(told_apart(image)).data
    return hashlib.sha256(data).digest()  # of 3 H W bytes or of twice as many: never the same
