"""Crops and flips."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.augmentation import crop_and_flip, to_float

COUNT, HEIGHT, WIDTH = 300, 8, 12


def one_image() -> torch.Tensor:
    return torch.randint(1, 256, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_every_result_is_a_crop_of_the_padded_image_or_its_mirror_and_all_of_them_occur() -> None:
    image = one_image()
    padded = F.pad(image, (4, 4, 4, 4))
    crops = [padded[:, y : y + HEIGHT, x : x + WIDTH] for y in range(9) for x in range(9)]
    candidates = torch.stack(crops + [crop.flip(2) for crop in crops])  # (162, 3, H, W)
    results = crop_and_flip(image.expand(COUNT, 3, HEIGHT, WIDTH), torch.Generator().manual_seed(1))
    matches = (results.unsqueeze(1) == candidates).flatten(2).all(dim=2)  # (COUNT, 162)
    assert (matches.sum(dim=1) == 1).all()
    found = matches.int().argmax(dim=1)
    assert 0.4 < (found >= 81).float().mean() < 0.6
    assert set((found % 81 // 9).tolist()) == set(range(9))
    assert set((found % 9).tolist()) == set(range(9))


def test_the_seed_decides_and_type_shape_and_memory_format_are_kept() -> None:
    images = one_image().repeat(4, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    first, same, other = (crop_and_flip(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_bytes_become_the_unit_interval() -> None:
    floats = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.device("cpu"))
    torch.testing.assert_close(floats, torch.tensor([0.0, 0.2, 1.0]))
