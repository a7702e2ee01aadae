"""Common corruptions: what each does, by hand where a formula says it, and that it reproduces."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image

from training.evaluation import corruptions
from training.evaluation.corruptions import CORRUPTIONS, corrupt

WITHOUT_NOISE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
# Frost keeps less of the image but lays less ice on it; elastic transforms trade a large affine part for a local one.
NOT_ORDERED = {"frost", "elastic_transform"}


@pytest.fixture(scope="module")
def clean(pixels: torch.Tensor) -> torch.Tensor:
    """``(6, 3, 16, 16)``."""
    return pixels[:6]


def grey(level: int, count: int = 1, side: int = 32) -> torch.Tensor:
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


def error(changed: torch.Tensor, clean: torch.Tensor) -> float:
    return (changed.float() - clean.float()).square().mean().item()


def test_the_corruptions_are_those_of_the_paper() -> None:
    noise = ("gaussian_noise", "shot_noise", "impulse_noise")
    blur = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
    weather = ("snow", "frost", "fog", "brightness")
    digital = ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
    assert noise + blur + weather + digital == CORRUPTIONS


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_image_changes_in_the_same_way_each_time(name: str, severity: int, clean: torch.Tensor) -> None:
    before = clean.clone()
    changed = corrupt(clean, name, severity)
    assert changed.shape == clean.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(clean, before)
    assert (changed != clean).flatten(1).any(dim=1).all()
    assert torch.equal(corrupt(clean, name, severity), changed)
    assert torch.equal(corrupt(clean, name, severity, seed=5), changed) == (name in WITHOUT_NOISE)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_its_position_and_not_on_the_others(
    name: str, clean: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = corrupt(clean, name, 3)
    assert torch.equal(corrupt(clean[:4], name, 3), changed[:4])
    others = clean.clone()
    others[[0, 1, 2, 4]] = 255 - others[[0, 1, 2, 4]]
    assert torch.equal(corrupt(others, name, 3)[[3, 5]], changed[[3, 5]])
    twice = corrupt(clean[[0, 0]], name, 3)
    assert torch.equal(twice[0], twice[1]) == (name in WITHOUT_NOISE)
    monkeypatch.setattr(corruptions, "CHUNK", 4)
    assert torch.equal(corrupt(clean, name, 3), changed)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in NOT_ORDERED])
def test_severity_5_is_further_from_the_image_than_severity_1(name: str, pixels: torch.Tensor) -> None:
    assert error(corrupt(pixels, name, 5), pixels) > error(corrupt(pixels, name, 1), pixels)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_need_be_neither_square_nor_of_a_power_of_two(name: str, pixels: torch.Tensor) -> None:
    image = pixels[:2, :, :9, :14]
    changed = corrupt(image, name, 5)
    assert changed.shape == (2, 3, 9, 14)
    assert (changed != image).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images_are_no_error(name: str) -> None:
    assert corrupt(grey(0, count=0), name, 1).shape == (0, 3, 32, 32)


# --- noise


@pytest.mark.parametrize(("severity", "scale"), [*enumerate([0.04, 0.06, 0.08, 0.09, 0.10], start=1)])
def test_gaussian_noise_has_its_standard_deviation(severity: int, scale: float) -> None:
    noise = corrupt(grey(128, 8), "gaussian_noise", severity).double() / 255 - 128 / 255
    assert noise.std().item() == pytest.approx(scale, rel=0.02)  # 24,576 values: 0.5 % is one standard error
    assert noise.mean().item() == pytest.approx(0, abs=4 * scale / 24_576**0.5)


@pytest.mark.parametrize(("severity", "photons"), [*enumerate([500, 250, 100, 75, 50], start=1)])
def test_shot_noise_is_a_count_of_photons(severity: int, photons: int) -> None:
    share = 102 / 255
    noisy = corrupt(grey(102, 8), "shot_noise", severity).double() / 255
    assert noisy.mean().item() == pytest.approx(share, abs=4 * (share / photons / 24_576) ** 0.5)
    assert noisy.var().item() == pytest.approx(share / photons, rel=0.04)
    assert corrupt(grey(0), "shot_noise", severity).max() == 0


@pytest.mark.parametrize(("severity", "share"), [*enumerate([0.01, 0.02, 0.03, 0.05, 0.07], start=1)])
def test_impulses_are_black_or_white_in_equal_parts(severity: int, share: float) -> None:
    noisy = corrupt(grey(128, 16), "impulse_noise", severity)
    black, white = ((noisy == level).double().mean().item() for level in (0, 255))
    assert black == pytest.approx(share / 2, rel=0.15)
    assert white == pytest.approx(share / 2, rel=0.15)
    assert ((noisy == 128) | (noisy == 0) | (noisy == 255)).all()


# --- blur and shape


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"]
)
@pytest.mark.parametrize("severity", [1, 5])
def test_what_moves_pixels_leaves_a_plain_image_alone(name: str, severity: int) -> None:
    assert torch.equal(corrupt(grey(77, 2), name, severity), grey(77, 2))


def point() -> torch.Tensor:
    """Return a black image with one white pixel in row 16, column 16."""
    image = grey(0)
    image[:, :, 16, 16] = 255
    return image


def test_defocus_spreads_a_point_over_its_disk() -> None:
    box = grey(0)
    box[:, :, 15:18, 15:18] = round(255 / 9)  # all nine neighbours are within a radius of 1.5
    assert torch.equal(corrupt(point(), "defocus_blur", 5), box)
    plus = grey(0)
    plus[:, :, 16, 15:18] = plus[:, :, 15:18, 16] = 255 // 5
    assert torch.equal(corrupt(point(), "defocus_blur", 4), plus)


def test_motion_drags_a_point_to_one_side() -> None:
    images = point().expand(20, -1, -1, -1).clone()
    dragged = corrupt(images, "motion_blur", 3)[:, 0]
    # A Gaussian trail with sigma 2 keeps 1 / (1 + e^-1/8 + e^-4/8 + e^-9/8 + ...) of the light where it was.
    head = 255 / sum(np.exp(-(step**2) / 8) for step in range(13))
    assert (dragged[:, 16, 16].float() - head).abs().max() <= 0.5
    rows, columns = dragged.nonzero()[:, 1:].T
    assert columns.max() == 16
    assert ((rows - 16).abs() <= 16 - columns).all()  # within 45 degrees
    assert (rows > 16).any()
    assert (rows < 16).any()
    assert dragged.flatten(1).sum(dim=1).float() == pytest.approx(255, abs=4)


def test_zoom_moves_light_outwards_and_not_past_its_largest_factor() -> None:
    image = grey(0)
    image[..., 15:17, 26] = 255  # 10.5 columns right of the centre
    zoomed = corrupt(image, "zoom_blur", 5)[0, 0]
    assert zoomed[:, :26].max() == 0
    lit = zoomed.max(dim=0).values.nonzero().flatten()
    assert lit.tolist() == [26, 27, 28, 29]  # 15.5 + 10.5 * 1.25 = 28.6, and less than 1.25 for the pixel's own width


def test_glass_moves_colours_and_makes_none_when_it_hardly_blurs(clean: torch.Tensor) -> None:
    changed = corrupt(clean, "glass_blur", 1)  # a Gaussian of 0.05 pixels does nothing
    for before, after in zip(clean, changed, strict=True):
        assert {*map(tuple, after.flatten(1).T.tolist())} <= {*map(tuple, before.flatten(1).T.tolist())}


def test_pixels_are_averages_of_areas() -> None:
    image = grey(0, side=20)
    image[..., 10:] = 200
    # 20 columns become 13 and then 20 again; the seventh of the 13 is half black, half white and covers columns 9 and 10.
    row = corrupt(image, "pixelate", 5)[0, 0, 0].tolist()
    assert row[:9] == [0] * 9
    assert row[11:] == [200] * 9
    assert row[9] + row[10] == pytest.approx(200, abs=1)
    assert 0 < row[9] < 200


@pytest.mark.parametrize(("severity", "quality"), [*enumerate([80, 65, 58, 50, 40], start=1)])
def test_jpeg_is_pillows(severity: int, quality: int, clean: torch.Tensor) -> None:
    for image, changed in zip(clean, corrupt(clean, "jpeg_compression", severity), strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
        assert np.array_equal(np.asarray(Image.open(file)), changed.permute(1, 2, 0).numpy())


# --- colour and weather


@pytest.mark.parametrize(("severity", "share"), [*enumerate([0.75, 0.5, 0.4, 0.3, 0.15], start=1)])
def test_contrast_shrinks_around_each_channels_mean(severity: int, share: float, clean: torch.Tensor) -> None:
    exact = clean.double()
    mean = exact.mean(dim=(2, 3), keepdim=True)
    expected = mean + share * (exact - mean)
    assert (corrupt(clean, "contrast", severity) - expected).abs().max() < 0.501


@pytest.mark.parametrize(("severity", "amount"), [*enumerate([0.05, 0.1, 0.15, 0.2, 0.3], start=1)])
def test_brightness_raises_the_value_and_keeps_hue_and_saturation(severity: int, amount: float) -> None:
    colours = [(0, 0, 0), (100, 100, 100), (250, 250, 250), (200, 100, 50), (3, 90, 180), (240, 17, 128)]
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)
    for colour, changed in zip(colours, corrupt(images, "brightness", severity), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))
        assert changed[:, 0, 0].tolist() == pytest.approx([255 * channel for channel in expected], abs=0.501)
        assert torch.equal(changed, changed[:, :1, :1].expand_as(changed))


@pytest.mark.parametrize(("severity", "strength"), [*enumerate([0.2, 0.5, 0.75, 1, 1.5], start=1)])
def test_fog_keeps_the_brightest_value_and_cannot_light_a_black_image(severity: int, strength: float) -> None:
    foggy = corrupt(grey(255, 3), "fog", severity).flatten(1)
    assert (foggy.max(dim=1).values == 255).all()  # the cloud's thickest place
    assert (foggy.min(dim=1).values == round(255 / (1 + strength))).all()  # its thinnest
    assert corrupt(grey(0), "fog", severity).max() == 0


@pytest.mark.parametrize("severity", [1, 5])
def test_snow_only_lightens(severity: int, pixels: torch.Tensor) -> None:
    snowy = corrupt(pixels, "snow", severity)
    assert (snowy >= pixels).all()
    assert (snowy == 255).any()


def test_frost_is_light_bluish_and_nowhere_the_same() -> None:
    red, _, blue = corrupt(grey(0, 4), "frost", 5).double().unbind(dim=1)
    assert (blue > red).all()
    assert blue.max() <= 0.45 * 255 + 0.5
    assert (blue.flatten(1).std(dim=1) > 5).all()
    assert not torch.equal(blue[0], blue[1])


# --- refusals


@pytest.mark.parametrize(
    ("images", "name", "severity", "seed", "named"),
    [
        (grey(0), "rain", 1, 0, "'rain'"),
        (grey(0), "snow", 0, 0, "severity 0"),
        (grey(0), "snow", 6, 0, "severity 6"),
        (grey(0), "snow", 1, -1, "seed -1"),
        (grey(0).float(), "snow", 1, 0, "torch.float32"),
        (grey(0)[:, :1], "snow", 1, 0, "1, 32, 32"),
        (grey(0, side=7), "snow", 1, 0, "7, 7"),
    ],
    ids=["name", "severity 0", "severity 6", "seed", "float images", "grey images", "too small"],
)
def test_what_cannot_be_done_is_refused(images: torch.Tensor, name: str, severity: int, seed: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        corrupt(images, name, severity, seed)
