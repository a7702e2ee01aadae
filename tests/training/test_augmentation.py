"""Crops, flips, shifts, colours, erased boxes and mixed images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as vision

from training.augmentation import crop_and_flip, crop_shift, cutmix, erase, idbh, jitter, mixup, to_float

COUNT, HEIGHT, WIDTH = 300, 8, 12

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def half_jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return jitter(images, generator, 0.5)


def cutmix_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return cutmix(images, torch.zeros(len(images), dtype=torch.int64, device=images.device), 2, 1.0, generator)[0]


def mixup_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return mixup(images, torch.zeros(len(images), dtype=torch.int64, device=images.device), 2, 1.0, generator)[0]


ALL: list[Augmentation] = [crop_and_flip, crop_shift, erase, half_jitter, idbh, cutmix_images, mixup_images]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Images without a black pixel."""
    return torch.randint(1, 256, (batch, 3, height, width), generator=seeded(0)).to(torch.uint8)


def one_image() -> torch.Tensor:
    return noise(1)[0]


def rectangle(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the ``True`` part of a mask, and see that it is a full rectangle."""
    rows, columns = mask.any(dim=1).nonzero().flatten().tolist(), mask.any(dim=0).nonzero().flatten().tolist()
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert mask.sum() == height * width
    return rows[0], columns[0], height, width


@pytest.mark.parametrize("augment", ALL)
@settings(deadline=None, max_examples=15)
@given(batch=st.integers(1, 9), height=st.integers(8, 20), width=st.integers(8, 20), seed=st.integers(0, 2**31))
def test_the_seed_decides_and_type_shape_and_memory_format_are_kept(
    augment: Augmentation, batch: int, height: int, width: int, seed: int
) -> None:
    images = noise(batch, height, width).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    first, same = (augment(images, seeded(seed)) for _ in range(2))
    assert torch.equal(first, same)
    assert torch.equal(images, before)
    assert first.data_ptr() != images.data_ptr()
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert first.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", ALL)
def test_other_seeds_and_later_draws_give_other_results(augment: Augmentation) -> None:
    images, generator = noise(16), seeded(1)
    results = [augment(images, generator), augment(images, generator), augment(images, seeded(2))]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("augment", ALL)
def test_everything_is_computed_where_the_generator_is(augment: Augmentation) -> None:
    images, generator = noise(4), seeded(1)
    expected = augment(images, seeded(1))
    with torch.device("meta"):  # what is made without naming a device lands there, and can't be combined with the images
        result = augment(images, generator)
    assert torch.equal(result, expected)
    with pytest.raises(ValueError, match="a batch on meta can't be augmented by a generator on cpu"):
        augment(images.to("meta"), generator)


def test_every_result_is_a_crop_of_the_padded_image_or_its_mirror_and_all_of_them_occur() -> None:
    image = one_image()
    padded = F.pad(image, (4, 4, 4, 4))
    crops = [padded[:, y : y + HEIGHT, x : x + WIDTH] for y in range(9) for x in range(9)]
    candidates = torch.stack(crops + [crop.flip(2) for crop in crops])  # (162, 3, H, W)
    results = crop_and_flip(image.expand(COUNT, 3, HEIGHT, WIDTH), seeded(1))
    matches = (results.unsqueeze(1) == candidates).flatten(2).all(dim=2)  # (COUNT, 162)
    assert (matches.sum(dim=1) == 1).all()
    found = matches.int().argmax(dim=1)
    assert 0.4 < (found >= 81).float().mean() < 0.6
    assert set((found % 81 // 9).tolist()) == set(range(9))
    assert set((found % 9).tolist()) == set(range(9))


def test_crop_and_shift_pastes_a_box_of_the_image_at_any_place_on_black() -> None:
    image = noise(1, 16, 20)[0]
    results = crop_shift(image.expand(1000, 3, 16, 20), seeded(1))
    cuts, splits, places, sources = set(), set(), set(), set()
    for result in results:
        top, left, height, width = rectangle((result > 0).all(dim=0))
        assert result.any(dim=0).sum() == height * width  # black outside
        box = result[:, top : top + height, left : left + width]
        starts = [(y, x) for y in range(17 - height) for x in range(21 - width)]
        found = [(y, x) for y, x in starts if torch.equal(box, image[:, y : y + height, x : x + width])]
        assert len(found) == 1
        cut_rows, cut_columns = 16 - height, 20 - width
        cuts.add(cut_rows + cut_columns)
        splits.add((cut_rows, cut_columns))
        places.add((top, left))
        sources.add(found[0])
    assert cuts == set(range(6))  # 10 of 32 lines are 5 of 16
    assert len(splits) == 21  # every way to split every cut
    assert {y for y, _ in places} == {x for _, x in places} == set(range(6))
    assert {y for y, _ in sources} == {x for _, x in sources} == set(range(6))


def test_half_of_the_images_get_one_black_box_of_any_shape_and_place() -> None:
    images = noise(400, 32, 32)
    results = erase(images, seeded(1))
    black = (results == 0).all(dim=1)  # (400, 32, 32)
    assert torch.equal(results, images.masked_fill(black.unsqueeze(1), 0))  # nothing else has changed
    erased = black.flatten(1).any(dim=1)
    assert 0.42 < erased.float().mean() < 0.58
    boxes = torch.tensor([rectangle(mask) for mask in black[erased]])
    top, left, height, width = boxes.unbind(dim=1)
    shares, shapes = height * width / 1024, height / width
    assert shares.min() > 0.015
    assert shares.min() < 0.05
    assert shares.max() < 0.36
    assert shares.max() > 0.3
    assert 0.15 < shares.mean() < 0.2  # (0.02 + 0.33) / 2
    assert shapes.min() < 0.4
    assert shapes.max() > 2.5
    assert 0.35 < (shapes > 1).float().mean() < 0.6
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == (left + width).max() == 32


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_probability_decides_how_many_images_are_erased(probability: float, share: float) -> None:
    changed = (erase(noise(50), seeded(1), probability) == 0).flatten(1).any(dim=1)
    assert changed.float().mean() == share


def test_jitter_is_torchvisions_brightness_contrast_or_saturation_by_a_factor_within_the_strength() -> None:
    image, strength = one_image(), 0.4
    factors = [0.6 + 0.004 * step for step in range(201)]
    kinds = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)
    candidates = torch.stack([adjust(image, factor) for adjust in kinds for factor in factors])  # (603, 3, H, W)
    results = jitter(image.expand(90, 3, HEIGHT, WIDTH), seeded(1), strength)
    off = (results.unsqueeze(1).int() - candidates.int()).abs().flatten(2).amax(dim=2)  # (90, 603)
    assert (off.amin(dim=1) <= 2).all()  # torchvision rounds down, and the factors are a grid
    kind, step = off.argmin(dim=1) // 201, off.argmin(dim=1) % 201
    assert all((kind == number).sum() > 15 for number in range(3))
    assert step.min() < 20
    assert step.max() > 180


def test_no_strength_changes_nothing_and_none_is_above_1() -> None:
    images = noise(9)
    assert torch.equal(jitter(images, seeded(1), 0.0), images)
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"strength must be from 0 to 1, not {strength}"):
            jitter(images, seeded(1), strength)


def test_idbh_mirrors_shifts_recolours_and_erases() -> None:
    image = torch.full((3, 32, 32), 40, dtype=torch.uint8)
    image[:, :, 16:] = 160
    results = idbh(image.expand(400, 3, 32, 32), seeded(1)).float().mean(dim=1)  # (400, 32, 32)
    mirrored = results[:, :, :16].mean(dim=(1, 2)) > results[:, :, 16:].mean(dim=(1, 2))
    assert 0.4 < mirrored.float().mean() < 0.6
    middle = results[:, 16, 16]
    assert middle.unique().numel() > 50  # brightness and contrast
    assert 0.05 < (results[:, 14:18, 14:18] < 2).all(dim=2).all(dim=1).float().mean() < 0.2  # erased where no shift reaches
    assert (results[:, 0, :] < 40).all(dim=1).float().mean() > 0.2  # shifted down


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(8))
def test_cutmix_gives_every_class_its_share_of_the_pixels(alpha: float, seed: int) -> None:
    labels = torch.arange(8)
    images = (30 * labels + 1).to(torch.uint8).view(8, 1, 1, 1).repeat(1, 3, 9, 16)  # every image has one colour of its own
    mixed, targets = cutmix(images, labels, 10, alpha, seeded(seed))
    colours = torch.arange(10) * 30 + 1
    pixels = (mixed[:, 0].flatten(1).unsqueeze(1) == colours.view(1, 10, 1)).sum(dim=2)  # (8, 10)
    torch.testing.assert_close(targets, pixels / (9 * 16))
    assert targets.dtype == torch.float32
    assert (mixed == mixed[:, :1]).all()
    foreign = (mixed != images)[:, 0]
    boxes = {rectangle(mask) for mask in foreign if mask.any()}
    assert len(boxes) <= 1  # the same for all
    assert pixels.sum(dim=0).tolist() == [9 * 16] * 8 + [0, 0]  # every image's box is pasted once


def test_cutmix_pastes_a_copy_of_the_same_place() -> None:
    images = noise(6)
    mixed, _ = cutmix(images, torch.arange(6), 6, 1.0, seeded(4))
    sources = (mixed.unsqueeze(1) == images).all(dim=2)  # (6, 6, H, W): which image every pixel is from
    assert sources.any(dim=1).all()
    assert (sources.flatten(2).any(dim=2).sum(dim=1) > 1).any()


def pasted_shares(alpha: float) -> torch.Tensor:
    """Return how much of an image is its partner's, for 60 seeds; of eight images not all are their own partners."""
    images, labels = noise(8, 32, 32), torch.arange(8)
    targets = torch.stack([cutmix(images, labels, 8, alpha, seeded(seed))[1] for seed in range(60)])  # (60, 8, 8)
    return (1 - targets.diagonal(dim1=1, dim2=2)).amax(dim=1)


def test_a_large_alpha_pastes_half_of_an_image_less_what_the_border_cuts_off() -> None:
    shares = pasted_shares(1000.0)
    assert shares.max() < 0.55
    assert shares.max() > 0.45
    assert shares.min() > 0.1  # a quarter of it, around a corner
    assert shares.unique().numel() > 20


def test_a_small_alpha_pastes_nothing_or_all_that_the_border_leaves() -> None:
    shares = pasted_shares(0.01)
    assert 0.25 < (shares < 0.01).float().mean() < 0.75
    assert ((shares < 0.01) | (shares > 0.2)).float().mean() > 0.8
    assert shares.max() > 0.7


@pytest.mark.parametrize("mix", [cutmix, mixup])
def test_no_alpha_is_refused(mix: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="alpha must be above 0, not 0"):
        mix(noise(2), torch.arange(2), 2, 0, seeded(0))


@pytest.mark.parametrize("seed", range(6))
def test_mixup_blends_pixels_and_labels_by_one_weight(seed: int) -> None:
    images, labels = noise(8), torch.arange(8)
    mixed, targets = mixup(images, labels, 10, 0.8, seeded(seed))
    assert targets.shape == (8, 10)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    expected = torch.einsum("bc,cdhw->bdhw", targets[:, :8].double(), images.double())  # every class is one image
    assert (mixed - expected).abs().max() < 0.51  # of a level, since results are whole levels
    weights = {round(weight, 4) for weight in targets.flatten().tolist() if 0 < weight < 1}
    assert len(weights) <= 2
    assert not weights or sum(weights) == pytest.approx(1, abs=1e-3) or weights == {0.5}


def test_alpha_decides_how_even_mixup_blends() -> None:
    def shares(alpha: float) -> torch.Tensor:
        targets = torch.stack([mixup(noise(8), torch.arange(8), 8, alpha, seeded(seed))[1] for seed in range(200)])
        return targets.diagonal(dim1=1, dim2=2).amin(dim=1)  # what is left of the image itself; not all are their own partners

    assert (shares(1000.0) - 0.5).abs().max() < 0.06
    assert shares(1.0).mean() == pytest.approx(0.5, abs=0.06)  # uniform from 0 to 1, so the mean of 200 varies by 0.02
    assert shares(1.0).std() == pytest.approx(12**-0.5, abs=0.04)
    assert ((shares(0.01) < 0.01) | (shares(0.01) > 0.99)).float().mean() > 0.9


def test_bytes_become_the_unit_interval() -> None:
    floats = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.device("cpu"))
    torch.testing.assert_close(floats, torch.tensor([0.0, 0.2, 1.0]))
