"""Distances: whether a caller's images lie apart from each other as photos do, or as images that were made from each other do.

After PRADA (Juuti et al., "PRADA: Protecting Against DNN Model Stealing Attacks", 2019): the distances of each image to the
nearest earlier one of the same class are close to normally distributed for honest callers. Here the earlier images are a sample
of bounded size, of thumbnails, and the test looks at the latest distances.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import deque

import numpy as np

from service.watch.coverage import LEAST, coverage
from service.watch.normality import shapiro_w

SIDE = 8
"""Pixels of a thumbnail's side."""
TESTED = 100
"""Distances in a test; PRADA's least number."""
EVERY = 25
"""Distances between two tests."""
OUTLIER = 3.0
"""Standard deviations from the mean beyond which a distance is left out, as in PRADA."""

LATEST = 8
"""New images that a retake may follow."""
RETAKE = 0.5
"""A retake is nearer to one of them than this share of its distance to those before."""


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Return images ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``, as ``(N, 3 SIDE SIDE)`` uint8."""
    if images.dtype != np.uint8:
        images = np.rint(images * 255).astype(np.uint8)
    count, channels, height, width = images.shape
    if height < SIDE or width < SIDE:  # too small to need it
        return np.asarray(images.reshape(count, -1))
    tall, wide = height // SIDE, width // SIDE
    blocks = images[:, :, : SIDE * tall, : SIDE * wide].reshape(count, channels, SIDE, tall, SIDE, wide)
    means = blocks.sum(axis=(3, 5), dtype=np.uint32) // (tall * wide)  # (N, 3, SIDE, SIDE)
    return np.asarray(means.astype(np.uint8).reshape(count, -1))


def nearest(peers: np.ndarray, thumbnail: np.ndarray) -> float:
    """Return the least Euclidean distance of a thumbnail ``(V,)`` to its peers ``(M, V)``; infinity without any."""
    if not len(peers):
        return math.inf
    differences = peers.astype(np.int32) - thumbnail  # (M, V)
    return math.sqrt(np.einsum("mv,mv->m", differences, differences).min())


class Distances:
    """One caller's images and their distances.

    An image that is much nearer to one of the latest few than to all before them is a retake of it, or the next frame: it is
    passed over, and so is a repeat. What a thief makes from an image comes a round of queries after it.

    Args:
        least_w: Shapiro and Wilk's W below which the distances do not look like an honest caller's.
        classes: The model's.
        capacity: Thumbnails remembered, the latest few among them.
        key: Bytes that nobody else knows, up to 64, so that nobody can tell which thumbnails stay.
    """

    def __init__(self, least_w: float, classes: int, capacity: int, key: bytes) -> None:
        self._least_w = least_w
        self._key = key
        self._capacity = max(1, capacity - LATEST)
        self._sample: np.ndarray | None = None  # (M, V) uint8
        self._labels = np.full(self._capacity, -1, np.int16)  # (M,); -1 where there is no thumbnail yet
        self._latest: deque[tuple[np.ndarray, int]] = deque()
        self._seen = 0
        self._distances: deque[float] = deque(maxlen=TESTED)
        self._distance_labels: deque[int] = deque(maxlen=TESTED)
        self._classes = classes
        self._fresh = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, with what Python adds."""
        latest = sum(sys.getsizeof(thumbnail) + 48 for thumbnail, _ in self._latest)
        sample = 0 if self._sample is None else self._sample.nbytes
        return sample + self._labels.nbytes + latest + 40 * len(self._distances)

    @property
    def classes(self) -> int:
        """How many classes the model has."""
        return self._classes

    def look(self, thumbnail: np.ndarray, label: int) -> float | None:
        """Add a new image's thumbnail and its class.

        Returns:
            Its distance to the nearest earlier one of its class, for :meth:`add`; ``None`` if there is none, and for a retake.
        """
        apart = math.inf if self._sample is None else nearest(self._sample[self._labels == label], thumbnail)
        to_latest = nearest(np.array([peer for peer, _ in self._latest]), thumbnail)
        if apart == 0 or to_latest < RETAKE * (apart if apart < math.inf else self._usual()):
            return None
        self._latest.append((thumbnail, label))
        if len(self._latest) > LATEST:
            self._keep(*self._latest.popleft())
        return apart if apart < math.inf else None

    def add(self, distance: float, label: int) -> bool:
        """Add a distance that was found here or elsewhere; returns whether it completes a test that finds a thief."""
        self._distances.append(distance)
        self._distance_labels.append(label)
        self._fresh += 1
        if len(self._distances) < TESTED or self._fresh < EVERY:
            return False
        self._fresh = 0
        counts = np.bincount(self._distance_labels, minlength=self._classes)
        return coverage(counts) >= LEAST and self.w() < self._least_w

    def begin_anew(self) -> None:
        """Forget the distances, so that the next test is of later ones only; the images stay."""
        self._distances.clear()
        self._distance_labels.clear()
        self._fresh = 0

    def w(self) -> float:
        """Return W of the latest distances without outliers."""
        values = np.array(self._distances)
        inside = np.abs(values - values.mean()) <= OUTLIER * values.std()
        return shapiro_w(values[inside])

    def _usual(self) -> float:
        """Return the mean distance so far."""
        return sum(self._distances) / len(self._distances) if self._distances else 0.0

    def _keep(self, thumbnail: np.ndarray, label: int) -> None:
        """Hold an even sample of all images: the ``n``-th one stays by a chance of capacity / n, drawn from pixels and key."""
        if self._sample is None:
            self._sample = np.zeros((self._capacity, len(thumbnail)), np.uint8)
        row = self._seen
        if row >= self._capacity:
            code = hashlib.blake2b(thumbnail.tobytes(), digest_size=8, key=self._key).digest()
            row = int.from_bytes(code, "little") % (self._seen + 1)
        self._seen += 1
        if row < self._capacity:
            self._sample[row], self._labels[row] = thumbnail, label
