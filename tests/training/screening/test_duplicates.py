"""Duplicates: exact, near and mirrored ones are found, and who is contradicted by them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from training.data import Split
from training.screening.duplicates import find_duplicates


def pictures(count: int, size: int = 32) -> torch.Tensor:
    """Smooth pictures that all show different things ``(count, 3, size, size)`` uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return (F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def test_different_pictures_are_no_duplicates() -> None:
    found = find_duplicates(Split(pictures(200), torch.arange(200) % 7))
    assert (found.group == -1).all()
    assert not found.contradicted.any()
    assert not found.copies.any()


def test_duplicates_are_found_and_those_with_the_odd_label_are_contradicted() -> None:
    images, labels = pictures(40), torch.arange(40) % 4
    noise = torch.randint(-4, 5, images[0].shape, generator=torch.Generator().manual_seed(1))
    images[10] = images[2]  # exact, same label
    images[17] = (images[5].int() + noise).clamp(0, 255).to(torch.uint8)  # near, same label
    images[20] = (images[5].flip(2) * 0.9 + 5).to(torch.uint8)  # near: mirrored and paler, with another label
    found = find_duplicates(Split(images, labels))
    assert {tuple(np.flatnonzero(found.group == group)) for group in set(found.group) - {-1}} == {(2, 10), (5, 17, 20)}
    assert np.flatnonzero(found.copies).tolist() == [10]
    assert found.contradicted[[2, 10, 5, 17, 20]].tolist() == [0, 0, 0.5, 0.5, 1]
    assert found.usual[[2, 5, 17, 20]].tolist() == [2, 1, 1, 1]


def test_when_two_disagree_nobody_knows_who_is_right() -> None:
    images = pictures(20)
    images[7] = images[4]
    found = find_duplicates(Split(images, torch.arange(20) % 5))
    assert found.contradicted[[4, 7]].tolist() == [1, 1]
    assert found.usual[[4, 7]].tolist() == [-1, -1]
    assert not found.copies.any()


def test_patched_copies_do_not_outvote_the_image_that_they_were_made_from() -> None:
    images, labels = pictures(20), torch.arange(20) % 5
    images[7] = images[12] = images[4]
    labels[7] = labels[12] = 3
    images[12, 0, 0, 0] ^= 1
    found = find_duplicates(Split(images, labels))
    assert found.usual[4] == 3
    counted = found.counted(labels.numpy(), ~np.isin(np.arange(20), [7, 12]))
    assert counted.usual[[4, 7, 12]].tolist() == [4, 4, 4]
    assert counted.contradicted[[4, 7, 12]].tolist() == [0, 1, 1]


def test_plain_pictures_are_not_taken_for_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(240, 250, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
    assert (find_duplicates(Split(images, torch.arange(60) % 2)).group == -1).all()
