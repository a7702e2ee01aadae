"""Repeated patches: the same few pixels at one place in many images that show different things and share a label.

That is how a backdoor such as BadNets (Gu et al. 2017) is planted. Natural images repeat small patches too, white corners
above all. Two kinds of windows are looked at therefore: textured ones, which hardly repeat, and flat ones that end at their own
border on every side, which a white corner does not. What is left is compared with what the same images have elsewhere and, as
nature knows no left and right, with the mirrored place of the mirrored images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from training.screening.windows import TEXTURED, isolated, textured_groups

SURPRISE = 6.0
"""A patch is reported when as many by chance have a probability below ``10 ** -SURPRISE``."""
FEWEST = 20
"""Fewer images than this can't be told from chance: with none at the mirrored place, 20 have a probability of ``2 ** -20``."""
CONCENTRATED = 0.6
"""Least share of the images with a patch that must have the same label."""
TOLERANCE = 10
"""Pixels of a patch may differ by this much, of 255, as after mild compression."""
REACH = 8
"""Places that are this near to each other may belong to one patch."""


@dataclass(frozen=True)
class Patch:
    """One repeated patch.

    Attributes:
        row: Its first row.
        column: Its first column.
        height: Its rows.
        width: Its columns.
        label: The label that most of the images with it have.
        members: ``(K,)`` positions of the images with the patch and that label.
        others: How many images have it with other labels.
        expected: How many images of that label would have it by chance.
        surprise: Minus the decimal logarithm of the probability that so many have it by chance, at most 300.
    """

    row: int
    column: int
    height: int
    width: int
    label: int
    members: np.ndarray
    others: int
    expected: float
    surprise: float


def find_patches(images: np.ndarray, labels: np.ndarray, shows: np.ndarray) -> list[Patch]:
    """Find repeated patches, those in most images first.

    Args:
        images: ``(N, H, W, 3)`` uint8.
        labels: ``(N,)`` integers.
        shows: ``(N,)`` integers: samples of the same number are duplicates of each other and count once; -1 has none.
    """
    # All are searched, whatever they duplicate: else near-copies beside their originals would hide a patch.
    search = _Search(images, labels, np.where(shows >= 0, shows, np.arange(len(labels)) + len(labels)))
    return sorted(_merged([*search.textured(), *search.flat()]), key=lambda patch: -len(patch.members))


class _Search:
    """Looks for patches in images; those that show the same count once."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, shows: np.ndarray) -> None:
        self._images, self._labels, self._shows = images, labels, shows
        self._height, self._width = images.shape[1:3]

    def textured(self) -> Iterator[Patch]:
        """Yield repeated windows of 3 x 3 pixels that are not flat."""
        places = [(row, column) for row in range(self._height - 2) for column in range(self._width - 2)]
        for row, column in tqdm(places, desc="patches", unit="place", leave=False, disable=None, dynamic_ncols=True):
            windows = self._windows(row, column)  # (N, 27)
            seen: list[np.ndarray] = []
            for group in textured_groups(windows, self._labels, FEWEST):
                template = np.median(windows[group], axis=0)
                alone = self._count(group) < FEWEST // 2
                if alone or any(np.abs(template - other).max() <= TOLERANCE for other in seen):
                    continue
                seen.append(template)
                patch = self._tested(row, column, template, int(self._labels[group[0]]))
                if patch is not None:
                    yield patch

    def flat(self) -> Iterator[Patch]:
        """Yield repeated flat windows that end on all sides within the image."""
        for size, found in isolated(self._images):
            place = found[:, 1] * self._width + found[:, 2]  # found: (M, 6): image, row, column, red, green, blue
            order = np.argsort(place, kind="stable")
            found, place = found[order], place[order]
            starts = np.unique(place, return_index=True)[1]
            for rows in np.split(found, starts[1:]):
                if len(rows) >= FEWEST:
                    yield from self._flat_at(size, rows, found)

    def _flat_at(self, size: int, rows: np.ndarray, everywhere: np.ndarray) -> Iterator[Patch]:
        """Test the colours that are frequent at one place; ``rows`` are the windows there, ``everywhere`` all of that size."""
        labels = self._labels[rows[:, 0]]
        row, column = int(rows[0, 1]), int(rows[0, 2])
        keys = np.unique(np.column_stack([labels, rows[:, 3:] >> 5]), axis=0, return_inverse=True)[1].ravel()
        for key in np.flatnonzero(np.bincount(keys) >= FEWEST // 2):
            label, colour = labels[keys == key][0], np.median(rows[keys == key, 3:], axis=0)
            here = rows[(np.abs(rows[:, 3:] - colour) <= TOLERANCE).all(axis=1), 0]
            if not self._enough(here, int(label)):
                continue
            alike = everywhere[(np.abs(everywhere[:, 3:] - colour) <= TOLERANCE).all(axis=1)]
            alike = alike[self._labels[alike[:, 0]] == label]
            spots = (self._shows[alike[:, 0]] * self._height + alike[:, 1]) * self._width + alike[:, 2]
            alike = alike[np.unique(spots, return_index=True)[1]]
            far = (np.abs(alike[:, 1] - row) >= REACH) | (np.abs(alike[:, 2] - column) >= REACH)
            expected = far.sum() / max(self._places(size, row, column), 1)
            mirror = self._width - size - column
            mirrored = int(((alike[:, 1] == row) & (alike[:, 2] == mirror)).sum())
            patch = self._judge(row, column, size, int(label), here, expected, mirrored)
            if patch is not None:
                yield replace(patch, members=self._completed(patch, colour))

    def _completed(self, patch: Patch, colour: np.ndarray) -> np.ndarray:
        """Add the images of the label in which a flat patch is hard to tell from what is beside it.

        Unless nature has too many of that kind: half as many as were found for sure, at the mirrored place.
        """
        mirror = self._width - patch.width - patch.column
        same, mirrored = (self._filled(patch, column, colour) for column in (patch.column, mirror))
        few = self._count(mirrored) <= self._count(patch.members) / 2
        return np.union1d(patch.members, same) if few else patch.members

    def _filled(self, patch: Patch, column: int, colour: np.ndarray) -> np.ndarray:
        """Return the images of the patch's label whose pixels, in its rows and from this column on, have a colour."""
        own = np.flatnonzero(self._labels == patch.label)
        window = self._images[own, patch.row : patch.row + patch.height, column : column + patch.width]
        filled: np.ndarray = own[(np.abs(window - colour) <= TOLERANCE).all(axis=(1, 2, 3))]
        return filled

    def _tested(self, row: int, column: int, template: np.ndarray, label: int) -> Patch | None:
        """Test a textured window against what the images of its label have at other places."""
        here = self._matching(row, column, template)
        if not self._enough(here, label):
            return None
        own = np.flatnonzero(self._labels == label)
        own = own[np.argsort(self._shows[own], kind="stable")]
        tiles = sliding_window_view(self._images[own], (TEXTURED, TEXTURED), axis=(1, 2))  # (n, H - 2, W - 2, 3, 3, 3)
        wanted = template.reshape(TEXTURED, TEXTURED, 3).transpose(2, 0, 1)
        close = np.ones(tiles.shape[:3], bool)
        for channel, down, across in np.ndindex(3, TEXTURED, TEXTURED):
            value = wanted[channel, down, across]
            tile = tiles[..., channel, down, across]
            close &= (tile >= value - TOLERANCE) & (tile <= value + TOLERANCE)
        pictures = np.unique(self._shows[own], return_index=True)[1]
        counts = np.logical_or.reduceat(close, pictures).sum(axis=0).astype(float)  # (H - 2, W - 2)
        counts[max(row - REACH + 1, 0) : row + REACH, max(column - REACH + 1, 0) : column + REACH] = 0
        expected = counts.sum() / max(self._places(TEXTURED, row, column), 1)
        flipped = template.reshape(TEXTURED, TEXTURED, 3)[:, ::-1].ravel()
        opposite = self._matching(row, self._width - TEXTURED - column, flipped)
        mirrored = self._count(opposite[self._labels[opposite] == label])
        return self._judge(row, column, TEXTURED, label, here, expected, mirrored)

    def _judge(
        self,
        row: int,
        column: int,
        size: int,
        label: int,
        here: np.ndarray,
        expected: float,
        mirrored: int,
    ) -> Patch | None:
        """Return the patch, which the images ``here`` have at its place, unless chance would explain it."""
        from scipy.stats import binom, poisson  # takes half a second, which commands that search nothing don't have

        if not self._enough(here, label):
            return None
        members = here[self._labels[here] == label]
        count = self._count(members)
        log = float(poisson.logsf(count - 1, max(expected, 0.5)))
        if abs(self._width - size - 2 * column) >= REACH:  # nearer to the middle, a patch is part of its mirror image
            log = max(log, float(binom.logsf(count - 1, count + mirrored, 0.5)))
        surprise = min(-log / np.log(10), 300.0)
        if surprise < SURPRISE:
            return None
        return Patch(row, column, size, size, label, members, len(here) - len(members), max(expected, 0.0), surprise)

    def _enough(self, here: np.ndarray, label: int) -> bool:
        """Tell whether enough pictures have a label, and enough of those that these images show."""
        count = self._count(here[self._labels[here] == label])
        return count >= FEWEST and count >= CONCENTRATED * self._count(here)

    def _count(self, rows: np.ndarray) -> int:
        """Return how many different pictures images show."""
        return len(np.unique(self._shows[rows]))

    def _windows(self, row: int, column: int) -> np.ndarray:
        """Return the 3 x 3 windows of all images at a place: ``(N, 27)`` uint8."""
        part = self._images[:, row : row + TEXTURED, column : column + TEXTURED]
        return part.reshape(len(part), -1)

    def _matching(self, row: int, column: int, template: np.ndarray) -> np.ndarray:
        """Return the images that have a window at a place."""
        windows = self._windows(row, column)
        rows = np.arange(len(windows))
        for value, pixels in zip(template, windows.T, strict=True):
            rows = rows[np.abs(pixels[rows].astype(float) - value) <= TOLERANCE]
        return rows

    def _places(self, size: int, row: int, column: int) -> int:
        """Return the number of places of a window that are not near the one given."""
        down, across = np.arange(self._height - size + 1), np.arange(self._width - size + 1)
        near = (np.abs(down - row) < REACH).sum() * (np.abs(across - column) < REACH).sum()
        return int(len(down) * len(across) - near)


def _merged(found: list[Patch]) -> list[Patch]:
    """Make one patch of those that lie together in mostly the same images."""
    merged: list[Patch] = []
    for patch in sorted(found, key=lambda patch: -len(patch.members)):
        for number, other in enumerate(merged):
            near = abs(patch.row - other.row) < REACH and abs(patch.column - other.column) < REACH
            common = len(np.intersect1d(patch.members, other.members))
            if patch.label == other.label and near and common >= len(patch.members) / 2:
                merged[number] = _joined(other, patch)
                break
        else:
            merged.append(patch)
    return merged


def _joined(one: Patch, other: Patch) -> Patch:
    row, column = min(one.row, other.row), min(one.column, other.column)
    return replace(
        one,
        row=row,
        column=column,
        height=max(one.row + one.height, other.row + other.height) - row,
        width=max(one.column + one.width, other.column + other.width) - column,
        members=np.union1d(one.members, other.members),
        surprise=max(one.surprise, other.surprise),
    )
