"""Common corruptions: what weather, cameras and file formats do to images, at five severities, without an adversary.

The corruptions and their parameters are those of CIFAR-10-C (Hendrycks & Dietterich 2019, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", section 3 and its CIFAR-10-C variant), made anew from the clean images.
The noise drawn is not the published files', so figures compare with published ones within sampling error only; and frost is
ours (see :mod:`training.evaluation.weather`): figures for it do not compare with published ones at all, nor does a mean that
includes it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from training.evaluation.weather import Generators, Pixels, draw, fog, frost, motion_blur, snow, zoomed

CHUNK = 250
"""Images that are corrupted at once; it bounds memory and changes no pixel."""
SEVERITIES = 5


def corrupt(images: torch.Tensor, name: str, severity: int, seed: int = 0) -> torch.Tensor:
    """Return corrupted versions of ``images``.

    What happens to an image follows from its position, its pixels, the name, the severity and the seed, and from nothing else:
    the first n images of a set are corrupted alike with and without the others.

    Args:
        images: ``(N, 3, H, W)`` uint8, H and W at least 8. Radii are in pixels and meant for 32x32.
        name: One of :data:`CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: Seed of the noise, not negative.

    Returns:
        ``(N, 3, H, W)`` uint8, channels-last in memory, rounded to the nearest level.

    Raises:
        ValueError: No such corruption or severity, a negative seed, or images of another type or shape.
    """
    if name not in _METHODS:
        raise ValueError(f"no corruption is called {name!r}: take one of {', '.join(CORRUPTIONS)}")
    if severity not in range(1, SEVERITIES + 1):
        raise ValueError(f"severity {severity}: take 1, 2, 3, 4 or 5")
    if seed < 0:
        raise ValueError(f"seed {seed}: take 0 or more")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 8:
        raise ValueError(
            f"corruptions take (N, 3, H, W) uint8 of at least 8x8 pixels, not {images.dtype} {tuple(images.shape)}"
        )
    method, parameters = _METHODS[name]
    kind = CORRUPTIONS.index(name)
    clean = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    result = np.empty(clean.shape, np.uint8)
    for start in range(0, len(clean), CHUNK):
        part = clean[start : start + CHUNK].astype(np.float32) / 255
        generators = [np.random.default_rng((seed, kind, severity, start + i)) for i in range(len(part))]
        result[start : start + CHUNK] = _to_bytes(method(part, generators, *parameters[severity - 1]))
    return torch.from_numpy(result).permute(0, 3, 1, 2)


def _to_bytes(images: Pixels) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


# Every method below takes images (N, H, W, 3) in [0, 1], a generator per image and the parameters of one severity; what it
# returns may leave [0, 1] and is clipped.

# --- noise


def _gaussian_noise(images: Pixels, generators: Generators, scale: float) -> Pixels:
    return images + scale * draw(generators, lambda g: g.standard_normal(images.shape[1:], np.float32))


def _shot_noise(images: Pixels, generators: Generators, photons: float) -> Pixels:
    """Count photons: ``photons`` of them on average where a channel is 1."""
    counts = [generator.poisson(image * photons) for image, generator in zip(images, generators, strict=True)]
    return np.stack(counts).astype(np.float32) / photons


def _impulse_noise(images: Pixels, generators: Generators, share: float) -> Pixels:
    """Set a share of the channel values to 0 or, as often, to 1."""
    chance = draw(generators, lambda g: g.random(images.shape[1:], np.float32))
    return np.where(chance < share / 2, np.float32(0), np.where(chance < share, np.float32(1), images))


# --- blur


def _defocus_blur(images: Pixels, generators: Generators, radius: float, alias: float) -> Pixels:
    """Spread every point over a disk whose edge is softened by a 3x3 Gaussian."""
    reach = math.ceil(radius) + 1
    row, column = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (row**2 + column**2 <= radius**2).astype(np.float32)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), alias, mode="constant", radius=1)
    blurred: Pixels = ndimage.correlate(images, kernel[None, :, :, None], mode="mirror")
    return blurred


def _glass_blur(images: Pixels, generators: Generators, sigma: float, reach: int, iterations: int) -> Pixels:
    """Give every pixel the colour of a random neighbour, ``iterations`` times, between two Gaussian blurs.

    The neighbour is up to ``reach`` pixels above and to the left, or below and to the right but one less, as in the published
    images.
    """
    images = ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")
    count, height, width, _ = images.shape
    rows, columns = np.mgrid[:height, :width]
    for _ in range(iterations):
        shift = draw(generators, lambda g: g.integers(-reach, reach, (2, height, width)))  # (N, 2, H, W)
        row, column = (rows + shift[:, 0]).clip(0, height - 1), (columns + shift[:, 1]).clip(0, width - 1)
        images = images[np.arange(count)[:, None, None], row, column]
    blurred: Pixels = ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")
    return blurred


def _motion_blur(images: Pixels, generators: Generators, radius: int, sigma: float) -> Pixels:
    angles = draw(generators, lambda g: g.uniform(-math.pi / 4, math.pi / 4))
    return motion_blur(images, angles, radius, sigma)


def _zoom_blur(images: Pixels, generators: Generators, largest: float) -> Pixels:
    """Average the image with itself enlarged about its centre, in steps of a hundredth."""
    factors = [1 + step / 100 for step in range(1, round(100 * (largest - 1)) + 1)]
    # Published: the clean image counts twice, once by itself and once as factor 1.
    return sum((zoomed(images, factor) for factor in factors), 2 * images) / np.float32(len(factors) + 2)


# --- colour, shape and file format


def _brightness(images: Pixels, generators: Generators, amount: float) -> Pixels:
    """Raise the value of hue, saturation and value; scaling a colour keeps the other two."""
    value = images.max(axis=3, keepdims=True)
    raised = (value + amount).clip(0, 1)
    # Black has no hue: it becomes grey.
    scaled: Pixels = np.where(value > 0, images * (raised / np.maximum(value, 1e-6)), raised)
    return scaled


def _contrast(images: Pixels, generators: Generators, share: float) -> Pixels:
    """Move every channel towards its mean over the image."""
    mean = images.mean(axis=(1, 2), keepdims=True)
    flattened: Pixels = (images - mean) * np.float32(share) + mean
    return flattened


def _elastic_transform(images: Pixels, generators: Generators, alpha: float, sigma: float, affine: float) -> Pixels:
    """Move three corners of a triangle by up to ``affine``, then every pixel by smoothed noise of strength ``alpha``.

    All three parameters are fractions of the shorter side. Severity 1 has no noise but the largest affine part, so that it
    can change more pixels than severity 5.
    """
    side = min(images.shape[1:3])
    shape = images.shape[1:3]
    centre, third = np.array(shape) // 2, side // 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])  # (3, 2), row and column
    grid = np.stack([*np.mgrid[: shape[0], : shape[1]], np.ones(shape)])  # (3, H, W)

    def one(image: Pixels, generator: np.random.Generator) -> Pixels:
        moved = corners + generator.uniform(-affine * side, affine * side, corners.shape)
        # Where a pixel comes from: the affine map that takes the moved corners back.
        back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # (3, 2)
        image = _resampled(image, np.einsum("ki,khw->ihw", back, grid), "mirror")
        noise = generator.uniform(-1, 1, (2, *shape))
        smooth = ndimage.gaussian_filter(noise, (0, sigma * side, sigma * side), mode="reflect", truncate=3)
        return _resampled(image, grid[:2] + alpha * side * smooth, "reflect")

    return np.stack([one(image, generator) for image, generator in zip(images, generators, strict=True)])


def _resampled(image: Pixels, places: np.ndarray[Any, Any], mode: str) -> Pixels:
    """Return ``(H, W, 3)``: the image, bilinearly, at ``places`` ``(2, H, W)``."""
    channels = [ndimage.map_coordinates(image[..., channel], places, order=1, mode=mode) for channel in range(3)]
    return np.stack(channels, axis=2)


def _pixelate(images: Pixels, generators: Generators, share: float) -> Pixels:
    """Shrink to ``share`` of the size and enlarge again, both by areas."""
    height, width = images.shape[1:3]
    small = (int(width * share), int(height * share))

    def one(image: Image.Image) -> Image.Image:
        return image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)

    return _by_pillow(images, one)


def _jpeg_compression(images: Pixels, generators: Generators, quality: int) -> Pixels:
    def one(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(images, one)


def _by_pillow(images: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    changed = [np.asarray(change(Image.fromarray(image))) for image in _to_bytes(images)]
    return np.stack(changed).astype(np.float32) / 255


_METHODS: dict[str, tuple[Callable[..., Pixels], tuple[tuple[Any, ...], ...]]] = {
    "gaussian_noise": (_gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
    "shot_noise": (_shot_noise, ((500,), (250,), (100,), (75,), (50,))),
    "impulse_noise": (_impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, ((1.06,), (1.11,), (1.15,), (1.20,), (1.25,))),
    # mean, standard deviation and zoom of the flakes, threshold, motion radius and sigma, share of the image that stays
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
    "contrast": (_contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
    "elastic_transform": (
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
    "jpeg_compression": (_jpeg_compression, ((80,), (65,), (58,), (50,), (40,))),
}

CORRUPTIONS: tuple[str, ...] = tuple(_METHODS)
"""The names that :func:`corrupt` knows, in the paper's order."""
