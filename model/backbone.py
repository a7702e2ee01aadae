"""The expert network: ResNet-18 for small images.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2, with the CIFAR stem of section 4.2's
small-image variant: a 3x3 convolution of stride 1 and no max-pooling, so that a 32x32 image keeps its resolution.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from model.architecture import BLOCKS_PER_STAGE, Activation

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class ResNet18(nn.Module):
    """ResNet-18 with a small-image stem and a free width.

    Args:
        width: Channels of the first stage; the later stages have 2, 4 and 8 times as many (64 is the published network).
        num_classes: Number of classes ``C``.
        activation: ``relu``, or ``silu``, which is smooth (Xie et al. 2020, "Smooth adversarial training").
    """

    def __init__(self, width: int, num_classes: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3x3(3, width), nn.BatchNorm2d(width), _ACTIVATIONS[activation](inplace=True))
        stages: list[nn.Module] = []
        channels = width
        for stage, blocks in enumerate(BLOCKS_PER_STAGE):
            for block in range(blocks):
                out, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if stride != 1 or channels != out:
                    shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
                made = BasicBlock(channels, out, stride, shortcut)
                made.relu = _ACTIVATIONS[activation](inplace=True)
                stages.append(made)
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images ``(B, 3, H, W)`` to logits ``(B, C)``."""
        features = self.blocks(self.stem(images))  # (B, 8 * width, H / 8, W / 8)
        logits: torch.Tensor = self.head(features.mean(dim=(2, 3)))  # (B, C)
        return logits
