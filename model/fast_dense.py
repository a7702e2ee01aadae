"""The dense fast execution: every expert runs, several of them stacked into one network of grouped convolutions.

A small network leaves most of a processor idle and is mostly launches; nine of them one after another are that nine times.
Experts whose weights are stacked are one network again, nine times as wide, whose convolutions have one group per expert
(Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", section 3.2, used groups first).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from model.backbone import ResNet18
from model.fast import Prediction, as_unit, folded_copy
from model.mixture import Mixture, count_votes


class StackedExperts(nn.Module):
    """Several experts as one network of grouped convolutions.

    Args:
        experts: Experts of one shape whose batch norms are folded; their weights are copied.
    """

    def __init__(self, experts: Sequence[ResNet18]) -> None:
        super().__init__()
        first = copy.deepcopy(experts[0])
        for name, module in experts[0].named_modules():
            if isinstance(module, nn.Conv2d):
                if module.bias is None:
                    raise ValueError(f"the batch norm after the expert's {name} is not folded: call fold_batch_norms first")
                same = [cast(nn.Conv2d, expert.get_submodule(name)) for expert in experts]
                first.set_submodule(name, _stack_convolutions(same, shared_input=name == "stem.0"))
        self.num_experts = len(experts)
        self.stem, self.blocks = first.stem, first.blocks
        self.weight = nn.Parameter(torch.stack([expert.head.weight.detach().T for expert in experts]))  # (E, features, C)
        self.bias = nn.Parameter(torch.stack([expert.head.bias.detach() for expert in experts]).unsqueeze(1))  # (E, 1, C)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images ``(B, 3, H, W)`` to every expert's logits ``(B, E, C)``."""
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))  # (B, E * features)
        features = features.unflatten(1, (self.num_experts, -1)).transpose(0, 1)  # (E, B, features)
        return torch.baddbmm(self.bias, features, self.weight).transpose(0, 1)


class DenseMixture(nn.Module):
    """A mixture that only predicts and runs all its experts: one function without branches, fit for compilers and graphs.

    Args:
        mixture: The reference, in eval mode, on the CPU or a CUDA device; it is copied. Its ``top_k`` must keep every expert.
        dtype: What the experts compute in; the gate and the mixing stay in float32. ``None`` chooses
            :func:`model.fast.fastest_dtype`.
        stack: Experts per network of grouped convolutions, from 1 (one after another) to the number of experts (``None``).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mixture: Mixture, dtype: torch.dtype | None = None, stack: int | None = None) -> None:
        super().__init__()
        self.architecture = mixture.architecture
        total = self.architecture.num_experts
        if mixture.top_k not in (None, total):
            raise ValueError(f"top_k={mixture.top_k} skips experts, which only the loop does: use FastMixture or top_k=None")
        stack = total if stack is None else stack
        if not 1 <= stack <= total:
            raise ValueError(f"stack must be from 1 to {total} (the number of experts) or None, not {stack}")
        folded, self.dtype = folded_copy(mixture, dtype)
        if not self.architecture.votes:
            self.gate = folded.gate
        self.register_buffer("mean", folded.mean)
        self.register_buffer("std", folded.std)
        experts = [cast(ResNet18, expert) for expert in folded.experts]
        groups = [StackedExperts(experts[start : start + stack]) for start in range(0, total, stack)]
        self.groups = nn.ModuleList(groups).to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.mean.device

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images ``(B, 3, H, W)``, float32 in ``[0, 1]``, to probabilities ``(B, C)`` and gate weights ``(B, E)``."""
        normalised = self.normalise(images)
        logits = [group(normalised.to(self.dtype)) for group in self.groups]
        return self.finish(self.weigh(normalised), logits)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)`` in ``[0, 1]`` to zero mean and unit deviation per channel, channels-last."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def weigh(self, normalised: torch.Tensor) -> torch.Tensor:
        """Return the gate's logits ``(B, E)`` for normalised images ``(B, 3, H, W)``; zeros where there is no gate."""
        if self.architecture.votes:
            return normalised.new_zeros(normalised.shape[0], self.architecture.num_experts)
        logits: torch.Tensor = self.gate(normalised)
        return logits

    def finish(self, gate: torch.Tensor, logits: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix the groups' logits, each ``(B, stack, C)``, by the gate's ``(B, E)`` or as votes; see :meth:`forward`."""
        weights = gate.softmax(dim=1)
        probabilities = torch.cat(logits, dim=1).float().softmax(dim=2)  # (B, E, C)
        mixed = (weights.unsqueeze(2) * probabilities).sum(dim=1)
        if self.architecture.votes:
            mixed = (count_votes(probabilities) + mixed) / (self.architecture.num_experts + 1)
        return mixed, weights

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, on any device; the answer is on the model's."""
        return Prediction(*self(as_unit(images, self.architecture, self.device)))


def _stack_convolutions(convolutions: list[nn.Conv2d], shared_input: bool) -> nn.Conv2d:
    """Return one convolution that gives all outputs in turn; each reads its own part of the input, or all the same."""
    first, count = convolutions[0], len(convolutions)
    with torch.device(first.weight.device):
        stacked = nn.Conv2d(
            first.in_channels if shared_input else first.in_channels * count,
            first.out_channels * count,
            cast(tuple[int, int], first.kernel_size),
            cast(tuple[int, int], first.stride),
            cast(tuple[int, int], first.padding),
            groups=1 if shared_input else count,
            dtype=first.weight.dtype,
        )
    assert stacked.bias is not None
    with torch.no_grad():
        stacked.weight.copy_(torch.cat([convolution.weight for convolution in convolutions]))
        stacked.bias.copy_(torch.cat([cast(torch.Tensor, convolution.bias) for convolution in convolutions]))
    return stacked
