"""Duplicates: images that are there more than once, exactly or nearly, mirrored too, and labels of theirs that contradict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from training.data import Split

THUMBNAIL = 8
BLOCK = 1024
CLOSE = 0.985
"""Thumbnails whose correlation is above this are compared pixel by pixel."""
ALIKE = 0.97
"""They are near-duplicates if all their pixels correlate above this."""
FLAT = 8.0
"""An image whose thumbnail varies by less (standard deviation, of 255) has too little in it to be recognised again."""


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        group: ``(N,)`` integers: samples of the same number show the same; -1 has no duplicate.
        contradicted: ``(N,)`` in ``[0, 1]``: the share of a sample's duplicates that have another label than it has, 0
            without any.
        usual: ``(N,)`` integers: the label that most of the sample's group has, -1 when there is none or no majority.
        copies: ``(N,)`` booleans: exact copies, with the same label, of a sample that comes before.
    """

    group: np.ndarray
    contradicted: np.ndarray
    usual: np.ndarray
    copies: np.ndarray

    def counted(self, labels: np.ndarray, voters: np.ndarray) -> Duplicates:
        """Return the same groups with a vote of these samples alone ``(N,)``, by labels ``(N,)``; nobody votes on itself."""
        contradicted, usual = np.zeros(len(labels)), np.full(len(labels), -1)
        for number in np.unique(self.group[self.group >= 0]):
            members = np.flatnonzero(self.group == number)
            shares = Counter(labels[members[voters[members]]].tolist()).most_common()
            for member in members.tolist():
                others = voters[members].sum() - voters[member]
                alike = dict(shares).get(int(labels[member]), 0) - voters[member]
                contradicted[member] = (others - alike) / max(others, 1)
            if len(shares) == 1 or (shares and shares[0][1] > shares[1][1]):
                usual[members] = shares[0][0]
        return replace(self, contradicted=contradicted, usual=usual)


def find_duplicates(split: Split) -> Duplicates:
    """Find groups of images that show the same, whatever their labels.

    Exact duplicates are told by their digests. Near ones have 8 x 8 thumbnails that correlate, and then pixels that differ
    little, one of the two mirrored or not; brightness and contrast count for nothing. Cost: N^2 / 2 comparisons of thumbnails.
    """
    labels = split.labels.cpu().numpy()
    parent = np.arange(len(split))
    digests = split.digests()
    first: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    copies = np.zeros(len(split), bool)
    for row, (digest, label) in enumerate(zip(digests, labels.tolist(), strict=True)):
        _unite(parent, first.setdefault(digest, row), row)
        copies[row] = (digest, label) in seen
        seen.add((digest, label))
    for one, other in _near(split, np.array(sorted(first.values()))):
        _unite(parent, one, other)
    roots = np.array([_root(parent, row) for row in range(len(split))])
    _, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
    group = np.where(counts[inverse] > 1, roots, -1)
    nobody = np.zeros(len(split))
    return Duplicates(group, nobody, np.full(len(split), -1), copies).counted(labels, np.ones(len(split), bool))


def _near(split: Split, rows: np.ndarray) -> Iterable[tuple[int, int]]:
    """Yield pairs, among these rows, of images that are nearly the same."""
    thumbnails = torch.cat([_thumbnails(split.images[part]) for part in np.array_split(rows, len(rows) // BLOCK + 1)])
    flat = thumbnails.std(dim=1) < FLAT
    straight = _standard(thumbnails)
    mirrored = _standard(thumbnails.view(-1, 3, THUMBNAIL, THUMBNAIL).flip(3).flatten(1))
    bar = tqdm(range(0, len(rows), BLOCK), desc="duplicates", unit="block", leave=False, disable=None, dynamic_ncols=True)
    for start in bar:
        block = slice(start, start + BLOCK)
        for flip, others in ((False, straight), (True, mirrored)):
            close = straight[block] @ others[start:].T  # (BLOCK, N - start), correlations
            close[flat[block]] = 0
            for one, other in (close > CLOSE).nonzero().tolist():
                if other > one and not flat[start + other]:
                    pair = int(rows[start + one]), int(rows[start + other])
                    if _correlation(split.images[pair[0]], split.images[pair[1]], flip) > ALIKE:
                        yield pair


def _thumbnails(images: torch.Tensor) -> torch.Tensor:
    """Return ``(N, 3 * 8 * 8)`` float32, of 255."""
    return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)


def _standard(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of mean 0 and length 1."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    lengths: torch.Tensor = centred.norm(dim=1, keepdim=True)
    return centred / lengths.clamp_min(1e-6)


def _correlation(one: torch.Tensor, other: torch.Tensor, flip: bool) -> float:
    """Return the correlation of two images ``(3, H, W)``, which does not change with brightness or contrast."""
    rows = torch.stack([one, other.flip(2) if flip else other]).float().flatten(1)
    left, right = _standard(rows)
    return float(left @ right)


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _unite(parent: np.ndarray, one: int, other: int) -> None:
    roots = sorted((_root(parent, one), _root(parent, other)))
    parent[roots[1]] = roots[0]
