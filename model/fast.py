"""The mixture's fast execution, for serving: the same function as :mod:`model.mixture`, arranged for speed.

Batch norms are folded into the convolutions, tensors are channels-last, experts run in bfloat16 where the hardware multiplies
it natively, and only chosen experts run under ``top_k``. Tested against the reference within :data:`TOLERANCE`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock

from model.mixture import Mixture, mix

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of a probability from the reference's; labels are equal where the two top ones differ by twice as much."""


M = TypeVar("M", bound=nn.Module)


class Prediction(NamedTuple):
    """What a batch came to.

    Attributes:
        probabilities: ``(B, C)`` float32.
        gate: The weights that the gate gave, ``(B, E)`` float32; 0 for experts that did not run.
    """

    probabilities: torch.Tensor
    gate: torch.Tensor


class FastMixture:
    """A mixture that only predicts.

    Args:
        mixture: The reference, in eval mode; it is copied.
        dtype: What the experts compute in; the gate and the mixing stay in float32. ``None`` chooses :func:`fastest_dtype`.
    """

    def __init__(self, mixture: Mixture, dtype: torch.dtype | None = None) -> None:
        if mixture.training:
            raise ValueError("the mixture is in training mode: call eval() first")
        self.architecture = mixture.architecture
        self.top_k = mixture.top_k
        self.device = mixture.mean.device
        self.dtype = dtype or fastest_dtype(self.device)
        folded = fold_batch_norms(copy.deepcopy(mixture)).requires_grad_(False).to(memory_format=torch.channels_last)
        self._mixture = folded
        self._experts = [expert.to(self.dtype) for expert in folded.experts]

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, on any device; the answer is on the model's."""
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        normalised = self._mixture.normalise(images).contiguous(memory_format=torch.channels_last)
        gate = self._mixture.gate(normalised).log_softmax(dim=1)  # (B, E)
        normalised = normalised.to(self.dtype)
        if self.top_k is None or self.top_k == self.architecture.num_experts:
            logits = torch.stack([expert(normalised) for expert in self._experts], dim=1)  # (B, E, C)
            return Prediction(mix(gate, logits.float().log_softmax(dim=2)).exp_(), gate.exp())
        return self._predict_top_k(normalised, gate, self.top_k)

    def _predict_top_k(self, normalised: torch.Tensor, gate: torch.Tensor, k: int) -> Prediction:
        kept, chosen = gate.topk(k, dim=1)  # both (B, k)
        kept = kept.log_softmax(dim=1)
        logits = gate.new_empty(len(gate), k, self.architecture.num_classes)  # (B, k, C)
        for index, expert in enumerate(self._experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            if len(rows):
                logits[rows, slots] = expert(normalised[rows].contiguous(memory_format=torch.channels_last)).float()
        weights = torch.zeros_like(gate).scatter_(1, chosen, kept.exp())
        return Prediction(mix(kept, logits.log_softmax(dim=2)).exp_(), weights)


def fold_batch_norms(module: M) -> M:
    """Fold every batch norm of a module in eval mode into the convolution before it, in place, and return the module."""
    for child in module.modules():
        if isinstance(child, BasicBlock):
            for number in ("1", "2"):
                fused = fuse_conv_bn_eval(getattr(child, f"conv{number}"), getattr(child, f"bn{number}"))
                setattr(child, f"conv{number}", fused)
                setattr(child, f"bn{number}", nn.Identity())
        elif isinstance(child, nn.Sequential):
            for position in range(len(child) - 1):
                convolution, norm = child[position], child[position + 1]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    child[position] = fuse_conv_bn_eval(convolution, norm)
                    child[position + 1] = nn.Identity()
    return module


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32
