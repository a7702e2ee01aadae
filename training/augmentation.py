"""Random changes to training images, for a whole batch at once.

Every function takes its randomness from a generator and nothing else, so that a resumed run augments as the unbroken one
would. The generator may live on a GPU: images must be on its device (``ValueError`` otherwise), and so is all that is computed.
Results are new tensors, channels-last in memory.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

PADDING = 4
MOST_CUT = 10 / 32
"""Crop-and-shift cuts at most this share of an image's shorter side: 10 rows and columns together at 32 pixels."""
ERASED_SHARE = (0.02, 0.33)
"""Least and largest share of an image's pixels that is erased."""
NARROWEST = 0.3
"""Erased boxes are from 0.3 to 1 / 0.3 times as tall as they are wide."""
IDBH_JITTER = 0.5
LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue add to grey (ITU-R BT.601)."""
CONTRAST, SATURATION, KINDS = 1, 2, 3  # 0 is brightness


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pad by 4 black pixels, crop back at a random place and mirror half of the images.

    Source: He et al. 2016, "Deep residual learning for image recognition", section 4.2.

    Args:
        images: ``(B, 3, H, W)``, any dtype.
        generator: Source of the randomness, on the images' device.

    Returns:
        ``(B, 3, H, W)``, the same dtype.
    """
    device = _device(generator, images)
    batch, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)  # (B, 3, H + 8, W + 8)
    rows, columns = torch.randint(0, 2 * PADDING + 1, (2, batch, 1), generator=generator, device=device)
    flips = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    across = torch.arange(width, device=device).expand(batch, width)
    across = torch.where(flips, across.flip(1), across) + columns  # (B, W)
    down = torch.arange(height, device=device) + rows  # (B, H)
    return _take(padded, down, across)


def crop_shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut a random box out of every image and paste it at a random place on black.

    Up to :data:`MOST_CUT` lines are cut in all, shared at random between rows and columns. Source: "Cropshift" of Li and
    Spratling 2023, "Data augmentation alone can improve adversarial training" (IDBH), section 4, with the cut of its CIFAR-10
    policy (0 to 10 of 32 lines).

    Args:
        images: ``(B, 3, H, W)``, uint8.
        generator: Source of the randomness, on the images' device.

    Returns:
        ``(B, 3, H, W)``, uint8.
    """
    device = _device(generator, images)
    batch, _, height, width = images.shape
    most = int(MOST_CUT * min(height, width))
    cut = torch.randint(0, most + 1, (batch, 1), generator=generator, device=device)
    columns_cut = _up_to(cut, generator)
    down, kept_rows = _shifted(height, cut - columns_cut, generator)  # (B, H)
    across, kept_columns = _shifted(width, columns_cut, generator)  # (B, W)
    kept = kept_rows.unsqueeze(2) & kept_columns.unsqueeze(1)  # (B, H, W)
    return _take(images, down, across).masked_fill_(~kept.unsqueeze(1), 0)


def erase(images: torch.Tensor, generator: torch.Generator, probability: float = 0.5) -> torch.Tensor:
    """Blacken a random box in some of the images.

    The box's area and shape are drawn from :data:`ERASED_SHARE` and :data:`NARROWEST` (the shape log-uniformly), and its sides
    rounded to whole pixels, at least one and at most the image's. Source: Zhong et al. 2020, "Random erasing data
    augmentation", algorithm 1, which fills with noise and redraws boxes that do not fit; black is what IDBH fills with.

    Args:
        images: ``(B, 3, H, W)``, uint8.
        generator: Source of the randomness, on the images' device.
        probability: Chance of an image to be changed, in ``[0, 1]``.

    Returns:
        ``(B, 3, H, W)``, uint8.
    """
    device = _device(generator, images)
    batch, _, height, width = images.shape
    chosen = torch.rand(batch, 1, generator=generator, device=device) < probability
    least, largest = ERASED_SHARE
    area = height * width * (least + (largest - least) * torch.rand(batch, 1, generator=generator, device=device))
    shape = (math.log(NARROWEST) * (2 * torch.rand(batch, 1, generator=generator, device=device) - 1)).exp()
    tall = (area * shape).sqrt().round().long().clamp(1, height)  # (B, 1)
    wide = (area / shape).sqrt().round().long().clamp(1, width)
    rows = _span(height, _up_to(height - tall, generator), tall) & chosen  # (B, H)
    columns = _span(width, _up_to(width - wide, generator), wide)  # (B, W)
    box = rows.unsqueeze(2) & columns.unsqueeze(1)  # (B, H, W)
    return images.clone(memory_format=torch.channels_last).masked_fill_(box.unsqueeze(1), 0)


def jitter(images: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Change the brightness, the contrast or the saturation of every image: one of the three, drawn per image.

    All three move pixels away from or towards something: black, the image's mean grey, or the pixel's own grey. The factor is
    drawn from ``[1 - strength, 1 + strength]``, where 1 changes nothing. Source: the colour operations of IDBH (Li and
    Spratling 2023, section 4), which also draws one operation per image.

    Args:
        images: ``(B, 3, H, W)``, uint8.
        generator: Source of the randomness, on the images' device.
        strength: In ``[0, 1]``.

    Returns:
        ``(B, 3, H, W)``, uint8.

    Raises:
        ValueError: ``strength`` is not in ``[0, 1]``.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")
    device = _device(generator, images)
    each = (len(images), 1, 1, 1)
    kinds = torch.randint(0, KINDS, each, generator=generator, device=device)
    factors = 1 + strength * (2 * torch.rand(each, generator=generator, device=device) - 1)
    floats = images.float()  # (B, 3, H, W) in [0, 255]
    grey = (floats * torch.tensor(LUMA, device=device).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)  # (B, 1, H, W)
    anchor = torch.where(kinds == SATURATION, grey, torch.zeros_like(grey))
    anchor = torch.where(kinds == CONTRAST, grey.mean(dim=(2, 3), keepdim=True), anchor)
    changed = (anchor + factors * (floats - anchor)).round().clamp(0, 255)
    return changed.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def idbh(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images, crop and shift, jitter colours and erase: most of IDBH's weak policy.

    Source: Li and Spratling 2023, "Data augmentation alone can improve adversarial training", section 4, and the authors'
    CIFAR-10 "weak" policy. Kept: the order, the mirroring, crop-and-shift by 0 to 10 of 32 lines, one colour operation per
    image, and a black box in half of the images. Left out: the policy draws that operation from eight, of which sharpness,
    automatic contrast, equalisation, shear and rotation are missing here, and from wider, uneven ranges (factors 0.5 to 1.9,
    saturation from 0.1) where these are 0.5 to 1.5.

    Args:
        images: ``(B, 3, H, W)``, uint8.
        generator: Source of the randomness, on the images' device.

    Returns:
        ``(B, 3, H, W)``, uint8.
    """
    device = _device(generator, images)
    flips = torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < 0.5
    mirrored = torch.where(flips, images.flip(3), images)
    return erase(jitter(crop_shift(mirrored, generator), generator, IDBH_JITTER), generator)


def cutmix(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste the same box of every image's partner in the batch into it, and share out the label by area.

    Source: Yun et al. 2019, "CutMix: regularization strategy to train strong classifiers with localizable features",
    algorithm A1: one box per batch, its area drawn from ``Beta(alpha, alpha)`` and cut off at the border, after which labels
    follow the area that was really pasted. Partners are a random permutation; an image can be its own partner.

    Args:
        images: ``(B, 3, H, W)``, uint8.
        labels: Classes ``(B,)``, int64, on the images' device.
        num_classes: ``C``.
        alpha: Above 0. 1 draws areas evenly, less prefers very small and very large boxes.
        generator: Source of the randomness, on the images' device.

    Returns:
        Images ``(B, 3, H, W)``, uint8, and targets ``(B, C)``, float32, whose rows sum to 1.

    Raises:
        ValueError: ``alpha`` is not above 0.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, not {alpha}: leave CutMix out to turn it off")
    device = _device(generator, images, labels)
    batch, _, height, width = images.shape
    order = torch.randperm(batch, generator=generator, device=device)
    box = _numpy(generator)
    side = math.sqrt(1 - box.beta(alpha, alpha))  # of the box, relative to the image's
    top, bottom = _edges(height, side * height, box.uniform(0, height))
    left, right = _edges(width, side * width, box.uniform(0, width))
    mixed = images.clone(memory_format=torch.channels_last)
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    targets = F.one_hot(labels, num_classes).float()  # (B, C)
    return mixed, (1 - pasted) * targets + pasted * targets[order]


def mixup(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend every image with its partner in the batch, and their labels alike.

    Source: Zhang et al. 2018, "mixup: beyond empirical risk minimization", section 2, with one weight per batch, drawn from
    ``Beta(alpha, alpha)``, as in the authors' code. Blended pixels are rounded to whole levels. Partners are a random
    permutation; an image can be its own partner.

    Args:
        images: ``(B, 3, H, W)``, uint8.
        labels: Classes ``(B,)``, int64, on the images' device.
        num_classes: ``C``.
        alpha: Above 0. 1 draws weights evenly, less prefers those near 0 and 1, where images stay nearly as they were.
        generator: Source of the randomness, on the images' device.

    Returns:
        Images ``(B, 3, H, W)``, uint8, and targets ``(B, C)``, float32, whose rows sum to 1.

    Raises:
        ValueError: ``alpha`` is not above 0.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, not {alpha}: leave mixup out to turn it off")
    device = _device(generator, images, labels)
    order = torch.randperm(len(images), generator=generator, device=device)
    kept = _numpy(generator).beta(alpha, alpha)
    floats = images.float()
    blended = (kept * floats + (1 - kept) * floats[order]).round()
    targets = F.one_hot(labels, num_classes).float()  # (B, C)
    mixed = blended.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return mixed, kept * targets + (1 - kept) * targets[order]


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Map uint8 images to float32 in ``[0, 1]`` on a device."""
    return images.to(device, non_blocking=True).float().div_(255)


def _device(generator: torch.Generator, *batch: torch.Tensor) -> torch.device:
    """Return a batch's device; ``ValueError`` when the generator can't draw there."""
    home = generator.device
    for tensor in batch:
        # A generator made for "cuda" names no card, a tensor always does.
        if tensor.device.type != home.type or home.index not in (None, tensor.device.index):
            raise ValueError(f"a batch on {tensor.device} can't be augmented by a generator on {home}: move one of them")
    return batch[0].device


def _numpy(generator: torch.Generator) -> np.random.Generator:
    """Return NumPy's generator, which draws the Beta that torch draws from no generator, seeded from torch's."""
    # Reading the seed off a GPU is one short wait per batch.
    return np.random.default_rng(int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device)))


def _take(images: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Return the pixels in rows ``down`` ``(B, H)`` and columns ``across`` ``(B, W)`` of images: ``(B, 3, H, W)``."""
    each = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[each, down.unsqueeze(2), across.unsqueeze(1)].permute(0, 3, 1, 2)


def _up_to(limit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw whole numbers evenly from 0 to each limit, the limit included."""
    return (torch.rand(limit.shape, generator=generator, device=limit.device) * (limit + 1)).long()


def _span(length: int, start: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Tell which of ``length`` lines are among the ``size`` ones from ``start`` on: ``(B, 1)`` both, to ``(B, length)``."""
    lines = torch.arange(length, device=start.device)
    return (lines >= start) & (lines < start + size)


def _shifted(length: int, cut: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut ``(B, 1)`` lines off at random ends and shift the rest: which old line each new one shows, and whether it does."""
    first, place = _up_to(cut, generator), _up_to(cut, generator)
    lines = torch.arange(length, device=cut.device) - place + first
    return lines.clamp(0, length - 1), _span(length, place, length - cut)


def _edges(length: int, size: float, centre: float) -> tuple[int, int]:
    """Return where a span starts and ends on a side of ``length`` pixels, cut off at both ends."""
    return round(max(centre - size / 2, 0)), round(min(centre + size / 2, length))
