"""The mixture's fast execution, for serving: the same function as :mod:`model.mixture`, arranged for speed.

Batch norms are folded into the convolutions, tensors are channels-last, experts run in bfloat16 where the hardware multiplies
it natively, and only chosen experts run under ``top_k``. Tested against the reference within :data:`TOLERANCE`. This loop over
experts is the plain one; :mod:`model.fast_dense`, :mod:`model.fast_compiled`, :mod:`model.fast_package` and
:mod:`model.fast_graphs` arrange the same folded weights for more speed where every expert runs.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock

from model.architecture import Architecture
from model.mixture import Mixture, mix, vote

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of a probability from the reference's; labels are equal where the two top ones differ by twice as much."""


M = TypeVar("M", bound=nn.Module)


class Prediction(NamedTuple):
    """What a batch came to.

    Attributes:
        probabilities: ``(B, C)`` float32.
        gate: The weights that the gate gave, ``(B, E)`` float32; 0 for experts that did not run, all alike in a vote.
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
        self.architecture = mixture.architecture
        self.top_k = mixture.top_k
        self.device = mixture.mean.device
        self._mixture, self.dtype = folded_copy(mixture, dtype)
        self._experts = list(self._mixture.experts)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, on any device; the answer is on the model's."""
        images = as_unit(images, self.architecture, self.device)
        normalised = self._mixture.normalise(images).contiguous(memory_format=torch.channels_last)
        gate = self._mixture.weigh(normalised).log_softmax(dim=1)  # (B, E)
        normalised = normalised.to(self.dtype)
        if self.top_k is None or self.top_k == self.architecture.num_experts:
            logits = torch.stack([expert(normalised) for expert in self._experts], dim=1)  # (B, E, C)
            log_probs = logits.float().log_softmax(dim=2)
            mixed = vote(log_probs) if self.architecture.votes else mix(gate, log_probs)
            return Prediction(mixed.exp_(), gate.exp())
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


def folded_copy(mixture: Mixture, dtype: torch.dtype | None = None) -> tuple[Mixture, torch.dtype]:
    """Copy a mixture, fold its batch norms, lay it out channels-last and cast its experts.

    Args:
        mixture: The reference, in eval mode.
        dtype: What the experts compute in; ``None`` chooses :func:`fastest_dtype`.

    Returns:
        The copy, without gradients, and the type of its experts.

    Raises:
        ValueError: The mixture is in training mode.
    """
    if mixture.training:
        raise ValueError("the mixture is in training mode: call eval() first")
    dtype = dtype or fastest_dtype(mixture.mean.device)
    copied = fold_batch_norms(copy.deepcopy(mixture)).requires_grad_(False).to(memory_format=torch.channels_last)
    copied.experts.to(dtype)
    return copied, dtype


def as_unit(images: torch.Tensor, architecture: Architecture, device: torch.device) -> torch.Tensor:
    """Return images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, as float32 in ``[0, 1]`` on a device, once checked."""
    check_images(images, architecture)
    images = images.to(device, non_blocking=True)
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def check_images(images: torch.Tensor, architecture: Architecture) -> None:
    """Raise ``ValueError`` unless images are ``(B, 3, H, W)``, uint8 or float32.

    Compiled code does not look: it would read beyond the memory of smaller ones.
    """
    shape = (3, architecture.height, architecture.input_width)
    if images.dim() != 4 or tuple(images.shape[1:]) != shape or len(images) == 0:
        raise ValueError(f"images must be (B, 3, {shape[1]}, {shape[2]}) with B of 1 or more, not {tuple(images.shape)}")
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images must be uint8, or float32 in [0, 1], not {images.dtype}")


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
