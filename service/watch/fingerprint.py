"""Fingerprints: short codes that nearly equal images share, and that nobody can work out without the secret.

After Blacklight (Li et al., "Blacklight: Scalable Defense for Neural Networks against Query-Based Black-Box Attacks", 2022):
pixels are quantised coarsely, every window of neighbouring values is hashed, and the smallest hashes are kept. Here the hash is
a keyed polynomial, computed for all windows at once, and the range of hashes is cut into slots of which each keeps its
smallest, so that two fingerprints are compared slot by slot. Beside those, which a shift of the picture hardly changes, a
fingerprint has the hashes of windows at places that are secret but fixed, which tell an attack's steps from a camera that
moves.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import numpy as np

WINDOW = 20
"""Values in a window; Blacklight's for images of this size. Two thirds of seven pixels' width, three channels."""
QUANTUM = 50
"""Levels of 255 in a quantisation step; Blacklight's."""
SLOTS = 48
"""Hashes of each kind in a fingerprint."""
LARGEST_HASH = 2**30
"""Slots end here, a quarter of the way: fewer hashes to sort."""
LARGEST_SIDE = 64
"""Pixels; of larger images every second, third, ... row and column is looked at."""
FINEST = 64
"""Float images that differ by less than a 64th of a level everywhere are repeats: that is the noise of computing."""


def told_apart(image: np.ndarray) -> np.ndarray:
    """Return what an image ``(3, H, W)`` is compared by: itself if uint8, its 64ths of levels as uint16 if float32.

    Whoever answers repeats compares them so, too: else they would be searched with, uncounted.
    """
    return image if image.dtype == np.uint8 else np.rint(image * (255 * FINEST)).astype(np.uint16)


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of ``N`` images.

    Attributes:
        exact: A digest of each image's values, ``(N,)`` uint64; equal for repeats only.
        free: ``(N, SLOTS)`` uint32; the share of equal slots estimates the share of windows that both have, wherever they are.
        fixed: ``(N, SLOTS)`` uint16; the share of equal slots estimates the share of windows that are where they were.
    """

    exact: np.ndarray
    free: np.ndarray
    fixed: np.ndarray


class Fingerprinter:
    """Takes fingerprints.

    Args:
        secret: Bytes that nobody else knows; ``None`` draws them. Fingerprints compare under one secret only.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        seed = hashlib.sha512(secret or secrets.token_bytes(32)).digest()
        self._key = seed[:32]
        chance = np.random.default_rng(list(seed))  # numpy's generator is no cipher, but its output stays in here too
        codes = chance.integers(0, 2**32, 256 // QUANTUM + 2, dtype=np.uint32)
        offset = int(chance.integers(QUANTUM))  # where the steps are is secret, as in Blacklight
        self._code_of_level = codes[(np.arange(256) + offset) // QUANTUM]  # (256,)
        self._base = int(chance.integers(2**31)) * 2 + 1
        self._finish = np.uint32(int(chance.integers(2**31)) * 2 + 1)
        self._places = chance.random(SLOTS)
        self._slots = np.arange(SLOTS, dtype=np.uint32) * np.uint32(LARGEST_HASH // SLOTS)

    def take(self, images: np.ndarray) -> Fingerprints:
        """Return the fingerprints of images ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``; any thread may call it."""
        exact = np.array([self._digest(image) for image in images], np.uint64)
        levels = images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)
        stride = -(-max(images.shape[2:]) // LARGEST_SIDE)
        flat = levels[:, :, ::stride, ::stride].transpose(0, 2, 3, 1).reshape(len(images), -1)  # (N, V), channels innermost
        if flat.shape[1] < WINDOW:
            flat = np.pad(flat, ((0, 0), (0, WINDOW - flat.shape[1])))
        hashes = self._hash_windows(self._code_of_level[flat])  # (N, V - WINDOW + 1)
        fixed = (hashes[:, (self._places * hashes.shape[1]).astype(np.intp)] >> np.uint32(16)).astype(np.uint16)
        return Fingerprints(exact, np.stack([self._smallest(row) for row in hashes]), fixed)

    def _digest(self, image: np.ndarray) -> int:
        data = np.ascontiguousarray(told_apart(image)).data
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "little")

    def _hash_windows(self, codes: np.ndarray) -> np.ndarray:
        """Return a hash ``(N, V - WINDOW + 1)`` uint32 of every window of ``codes`` ``(N, V)`` uint32, by doubling lengths."""
        hashes, length = {1: codes}, 1
        while 2 * length <= WINDOW:
            hashes[2 * length] = self._join(hashes[length], hashes[length], length, length)
            length *= 2
        whole = hashes[length]
        for part in (part for part in (8, 4, 2, 1) if (WINDOW - length) & part):
            whole = self._join(whole, hashes[part], length, part)
            length += part
        mixed = whole ^ (whole >> np.uint32(15))  # a polynomial's low bits hardly vary, its high ones do
        finished: np.ndarray = mixed * self._finish
        return finished

    def _join(self, left: np.ndarray, right: np.ndarray, at: int, length: int) -> np.ndarray:
        """Return hashes of windows that are ``left``'s and then, ``at`` values on, ``right``'s of that ``length``."""
        power = np.uint32(pow(self._base, length, 2**32))
        count = min(left.shape[1], right.shape[1] - at)
        joined: np.ndarray = left[:, :count] * power + right[:, at : at + count]
        return joined

    def _smallest(self, hashes: np.ndarray) -> np.ndarray:
        """Return for each slot the smallest hash not below it; the largest of all if there is none."""
        few = hashes[hashes < LARGEST_HASH]
        ordered = np.sort(few if len(few) >= SLOTS else hashes)
        return ordered[np.minimum(np.searchsorted(ordered, self._slots), len(ordered) - 1)]
