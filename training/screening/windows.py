"""Windows of many images at once: which are textured and frequent, which are flat and end at their own border."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

TEXTURED = 3
"""Side of a textured window."""
CONTRAST = 48
"""A window is textured if a channel's brightest and darkest pixel differ by this much, of 255."""
FLATNESS = 8
"""A window is flat if they differ by no more than this in any channel."""
EDGE = 40
"""A flat window ends at a side if the line of pixels beyond differs from it by this much in some channel, on average."""
LARGEST = 16
"""Side of the largest flat window; half the image's side if that is less."""
BLOCK = 512 * 32 * 32
"""Pixels that are looked at together."""
LEVELS = 32
"""Width of the bins that pixels are put into, in two grids half a bin apart."""


def textured_groups(windows: np.ndarray, labels: np.ndarray, fewest: int) -> Iterator[np.ndarray]:
    """Yield the positions of textured windows that are much alike and share a label, at least half of ``fewest`` at a time.

    Half of them, as one patch's pixels may lie on both sides of a bin's border.

    Args:
        windows: ``(N, 27)`` uint8, all from the same place of their image.
        labels: ``(N,)`` integers.
        fewest: The smallest number of images that is of interest.
    """
    channels = windows.reshape(len(windows), -1, 3)
    rows = np.flatnonzero((channels.max(axis=1) - channels.min(axis=1)).max(axis=1) >= CONTRAST)
    weights = np.random.default_rng(0).integers(1, 2**62, windows.shape[1], dtype=np.int64)
    for offset in (0, LEVELS // 2):
        bins = (windows[rows].astype(np.int64) + offset) // LEVELS
        keys = bins @ weights + labels[rows] * 0x9E3779B1  # (n,), wraps around
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        for number in np.flatnonzero(counts >= fewest // 2):
            yield rows[inverse == number]


def isolated(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, for each side from 1 to 16, the flat windows that differ from what is beside them on every side in the image.

    Args:
        images: ``(N, H, W, 3)`` uint8.

    Yields:
        The side and ``(M, 6)`` int32: image, row, column, and the window's mean red, green and blue.
    """
    sides = range(1, min(LARGEST, *(side // 2 for side in images.shape[1:3])) + 1)
    found: dict[int, list[np.ndarray]] = {side: [] for side in sides}
    size = max(1, BLOCK // (images.shape[1] * images.shape[2]))
    starts = range(0, len(images), size)
    blocks = tqdm(starts, desc="flat patches", unit="block", leave=False, disable=None, dynamic_ncols=True)
    for start in blocks:
        block = images[start : start + size]
        sums = np.zeros((len(block), block.shape[1] + 1, block.shape[2] + 1, 3), np.int32)
        sums[:, 1:, 1:] = block.cumsum(axis=1, dtype=np.int32).cumsum(axis=2, dtype=np.int32)
        lightest = darkest = block
        for side in sides:
            if side > 1:
                lightest, darkest = _grown(lightest, np.maximum), _grown(darkest, np.minimum)
            flat = ((lightest - darkest) <= FLATNESS).all(axis=3)  # (B, H - side + 1, W - side + 1)
            means = _means(sums, side, side)
            rows = np.argwhere(flat & _ends(sums, means, side))
            colours = means[rows[:, 0], rows[:, 1], rows[:, 2]].round()
            rows[:, 0] += start
            found[side].append(np.column_stack([rows, colours]).astype(np.int32))
    for side in sides:
        yield side, np.concatenate(found[side])


def _grown(extremes: np.ndarray, pick: np.ufunc) -> np.ndarray:
    """Return the extremes of windows that are larger by one row and one column."""
    wider = pick(extremes[:, :, :-1], extremes[:, :, 1:])
    grown: np.ndarray = pick(wider[:, :-1], wider[:, 1:])
    return grown


def _means(sums: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the means of all windows of a size, from sums over all pixels above and to the left: ``(B, ..., ..., 3)``."""
    boxes = sums[:, height:, width:] - sums[:, :-height, width:] - sums[:, height:, :-width] + sums[:, :-height, :-width]
    means: np.ndarray = boxes.astype(np.float32) / (height * width)
    return means


def _ends(sums: np.ndarray, means: np.ndarray, side: int) -> np.ndarray:
    """Tell which windows differ from the line of pixels beyond each of their sides; the image's border counts as an end."""
    ends = np.ones(means.shape[:3], bool)
    rows, columns = means.shape[1] - 1, means.shape[2] - 1
    above = _means(sums, 1, side)  # (B, H, W - side + 1, 3), one row high
    left = _means(sums, side, 1)  # (B, H - side + 1, W, 3)
    ends[:, 1:] &= _differ(above[:, :rows], means[:, 1:])
    ends[:, :-1] &= _differ(above[:, side:], means[:, :-1])
    ends[:, :, 1:] &= _differ(left[:, :, :columns], means[:, :, 1:])
    ends[:, :, :-1] &= _differ(left[:, :, side:], means[:, :, :-1])
    return ends


def _differ(lines: np.ndarray, windows: np.ndarray) -> np.ndarray:
    differ: np.ndarray = np.abs(lines - windows).max(axis=3) >= EDGE
    return differ
