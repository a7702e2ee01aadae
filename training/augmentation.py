"""Random crops and flips, for a whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PADDING = 4


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pad by 4 black pixels, crop back at a random place and mirror half of the images.

    Args:
        images: ``(B, 3, H, W)``, any dtype.
        generator: Source of the randomness, so that a resumed run augments as the unbroken one would.

    Returns:
        A new tensor of the same shape, dtype and memory format (channels-last).
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)  # (B, H + 8, W + 8, 3)
    rows, columns = torch.randint(0, 2 * PADDING + 1, (2, batch, 1), generator=generator)
    flips = torch.rand(batch, 1, generator=generator) < 0.5
    across = torch.arange(width).expand(batch, width)
    across = torch.where(flips, across.flip(1), across) + columns  # (B, W)
    down = torch.arange(height) + rows  # (B, H)
    cropped = padded[torch.arange(batch).view(-1, 1, 1), down.unsqueeze(2), across.unsqueeze(1)]  # (B, H, W, 3)
    return cropped.permute(0, 3, 1, 2)


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Map uint8 images to float32 in ``[0, 1]`` on a device."""
    return images.to(device, non_blocking=True).float().div_(255)
