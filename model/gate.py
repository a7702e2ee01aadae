"""The gate: a small convolutional network that says how much each expert counts for an image."""

from __future__ import annotations

import torch
from torch import nn


class Gate(nn.Module):
    """Three stride-2 convolutions, global average pooling and a linear layer.

    The paper does not publish its gate; this one is ours. Its last layer starts at zero, so an untrained gate weighs all
    experts alike and joint training starts from uniform averaging.

    Args:
        width: Channels of the first convolution; the next two have 2 and 4 times as many.
        num_experts: Number of experts ``E``.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor in (1, 2, 4):
            layers += [
                nn.Conv2d(channels, width * factor, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width * factor),
                nn.ReLU(inplace=True),
            ]
            channels = width * factor
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_experts)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.temperature = 1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images ``(B, 3, H, W)`` to gate logits ``(B, E)``."""
        features = self.features(images)  # (B, 4 * width, H / 8, W / 8)
        logits: torch.Tensor = self.head(features.mean(dim=(2, 3)))  # (B, E)
        return logits / self.temperature

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Divide the logits by ``temperature`` from now on, and scale the last layer so that the answers stay what they are.

        A low temperature lets the gate become sharp with small weights. Checkpoints are stored at temperature 1.
        """
        for parameter in self.head.parameters():
            parameter.mul_(temperature / self.temperature)
        self.temperature = temperature
