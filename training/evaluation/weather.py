"""Snow, frost and fog over images, and the motion blur and zoom that they are made with.

Snow and fog: Hendrycks & Dietterich 2019 (see :mod:`training.evaluation.corruptions`), section 3; the fog's fractal is
Fournier, Fussell & Carpenter 1982, section 3 (diamond-square). Frost in the paper lays photographs of frost over the image.
They are not ours to ship, so :func:`frost` draws ridged noise instead: figures under it are not comparable with published
ones.

Images are ``(N, H, W, C)`` float32 in ``[0, 1]``; results may leave ``[0, 1]``, the caller clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

Pixels = np.ndarray[Any, Any]
"""``(N, H, W, C)`` float32."""
Generators = list[np.random.Generator]


def draw(generators: Generators, make: Callable[[np.random.Generator], Any]) -> np.ndarray[Any, Any]:
    """Return ``(N, ...)``: what ``make`` draws from each image's own generator."""
    return np.stack([make(generator) for generator in generators])


def motion_blur(images: Pixels, angles: np.ndarray[Any, Any], radius: int, sigma: float) -> Pixels:
    """Drag every image along its own direction: a one-sided Gaussian trail of ``2 * radius + 1`` pixels.

    Args:
        images: ``(N, H, W, C)``; beyond the edge, its nearest pixel goes on.
        angles: ``(N,)`` directions of the trail, in radians.
        radius: Half the trail's length, in pixels.
        sigma: Standard deviation of the Gaussian, in pixels.
    """
    count, height, width, _ = images.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    steps = steps[weights > 1e-4]  # the rest adds less than a hundredth of a byte's step
    weights = (weights[: len(steps)] / weights[: len(steps)].sum()).astype(np.float32)
    downs = np.rint(np.sin(angles)[:, None] * steps).astype(int)  # (N, T)
    rights = np.rint(np.cos(angles)[:, None] * steps).astype(int)
    blurred = np.zeros_like(images)
    for step, weight in enumerate(weights):
        rows = (np.arange(height) + downs[:, step, None]).clip(0, height - 1)  # (N, H)
        columns = (np.arange(width) + rights[:, step, None]).clip(0, width - 1)  # (N, W)
        blurred += weight * images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return blurred


def zoomed(images: Pixels, factor: float) -> Pixels:
    """Return the middle of ``images`` ``(N, H, W, C)``, enlarged bilinearly by ``factor >= 1`` to the same size."""
    count, height, width, channels = images.shape
    tall = _enlargement(height, factor) @ images.reshape(count, height, width * channels)
    enlarged: Pixels = _enlargement(width, factor) @ tall.reshape(count, height, width, channels)
    return enlarged


def _enlargement(size: int, factor: float) -> Pixels:
    """Return ``(size, size)`` weights: which two old pixels make each new one."""
    centre = (size - 1) / 2
    places = centre + (np.arange(size) - centre) / factor
    distance = np.abs(places[:, None] - np.arange(size))
    weights: Pixels = (1 - distance).clip(0, 1).astype(np.float32)
    return weights


def snow(
    images: Pixels,
    generators: Generators,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Pixels:
    """Lay flakes, blown downwards and upwards, over a whitened image.

    Args:
        images: ``(N, H, W, 3)``.
        generators: One per image.
        mean: Of the normal noise whose peaks are the flakes.
        deviation: Of the same.
        zoom: How much larger than a pixel a flake is.
        threshold: Noise below it is no flake.
        radius: Of the flakes' motion blur, in pixels.
        sigma: Of the same.
        kept: Share of the image that is not whitened.
    """
    height, width = images.shape[1:3]
    noise = mean + deviation * draw(generators, lambda g: g.standard_normal((height, width, 1), np.float32))
    flakes = zoomed(noise.astype(np.float32), zoom)
    flakes = np.where(flakes < threshold, np.float32(0), flakes).clip(0, 1)
    angles = draw(generators, lambda g: g.uniform(-3 * math.pi / 4, -math.pi / 4))
    flakes = motion_blur(flakes, angles, radius, sigma)
    grey = images @ np.array([[0.299], [0.587], [0.114]], np.float32)  # (N, H, W, 1)
    whitened: Pixels = kept * images + (1 - kept) * np.maximum(images, 1.5 * grey + 0.5)
    whitened += flakes + flakes[:, ::-1, ::-1]
    return whitened


def frost(images: Pixels, generators: Generators, kept: float, strength: float) -> Pixels:
    """Lay ``strength`` of a frost-like texture over ``kept`` of the image. Not the paper's frost: see the module."""
    height, width = images.shape[1:3]
    ridges = np.zeros(images.shape[:3], np.float32)
    for sigma, weight in ((4, 0.5), (2, 0.3), (1, 0.2)):
        noise = draw(generators, lambda g: g.standard_normal((height, width), np.float32))
        smooth = ndimage.gaussian_filter(noise, (0, sigma, sigma), mode="wrap")
        smooth -= smooth.mean(axis=(1, 2), keepdims=True)
        smooth /= smooth.std(axis=(1, 2), keepdims=True)
        ridges += weight * (1 - np.abs(smooth)).clip(0, 1)  # bright needles where the noise crosses zero
    ice = np.array([0.85, 0.95, 1.0], np.float32) * (0.25 + 0.75 * ridges[..., None])
    frosted: Pixels = kept * images + strength * ice
    return frosted


def fog(images: Pixels, generators: Generators, strength: float, decay: float) -> Pixels:
    """Add ``strength`` of a cloud to every image and rescale, so that its brightest value stays what it was."""
    height, width = images.shape[1:3]
    cloud = _cloud(generators, max(height, width), decay)[:, :height, :width, None]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    foggy: Pixels = (images + strength * cloud) * brightest / (brightest + strength)
    return foggy


def _cloud(generators: Generators, size: int, decay: float) -> Pixels:
    """Return ``(N, S, S)`` fractal noise from 0 to 1 whose edges meet, S the next power of two.

    Diamond-square: new points are the mean of four old ones plus uniform noise, which a level of half the spacing has
    ``decay ** 2`` times less of (the square is that of the published images).
    """
    spacing = size = 2 ** math.ceil(math.log2(size))
    cloud = np.zeros((len(generators), size, size), np.float32)
    reach = 1.0
    while spacing > 1:
        half, cells = spacing // 2, size // spacing
        noise = np.stack([g.uniform(-reach, reach, (3, cells, cells)) for g in generators]).astype(np.float32)
        squares, beside, below = noise.swapaxes(0, 1)  # (N, n, n) each
        corners = cloud[:, ::spacing, ::spacing]  # (N, n, n)
        across = corners + np.roll(corners, -1, axis=2)
        down = corners + np.roll(corners, -1, axis=1)
        middles = (across + np.roll(across, -1, axis=1)) / 4 + squares
        cloud[:, half::spacing, half::spacing] = middles
        cloud[:, ::spacing, half::spacing] = (across + middles + np.roll(middles, 1, axis=1)) / 4 + beside
        cloud[:, half::spacing, ::spacing] = (down + middles + np.roll(middles, 1, axis=2)) / 4 + below
        spacing, reach = half, reach / decay**2
    cloud -= cloud.min(axis=(1, 2), keepdims=True)
    cloud /= cloud.max(axis=(1, 2), keepdims=True)
    return cloud
