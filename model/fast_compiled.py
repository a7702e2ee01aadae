"""The compiled fast execution: the dense mixture through torch.compile, just in time, for this process."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from model.fast import Prediction, as_unit
from model.fast_dense import DenseMixture
from model.mixture import Mixture

FREEZING = {"freezing": True}
"""Weights become constants, so that the compiler lays them out once the way the processor's convolutions want them."""

# Isolated, or the mixtures of one process would share one limit of compilations, past which torch runs uncompiled.
_ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}  # not in 2.11
_COMPILE: dict[str, Any] = {"fullgraph": True, "options": FREEZING, **_ISOLATED}

_SIZES = (1, 2, 16)
"""Batch sizes to compile for: torch compiles 1 apart, as it broadcasts, and on a CPU chooses convolutions anew from 16 on."""


class CompiledMixture:
    """A mixture that only predicts, compiled when it is made, so that no request waits for the compiler.

    One image, up to 15 and more than that have code of their own. Compiling takes tens of seconds and, for a CPU, a C++
    compiler (``g++``, or what ``CXX`` names); generated code goes to the folder that ``TORCHINDUCTOR_CACHE_DIR`` names.

    Args:
        mixture: The reference, in eval mode; it is copied. Its ``top_k`` must keep every expert.
        dtype: What the experts compute in; ``None`` chooses :func:`model.fast.fastest_dtype`.
        stack: Experts per network of grouped convolutions; ``None`` stacks all.

    Raises:
        ValueError: The mixture is in training mode or skips experts, or ``stack`` is out of range.
    """

    def __init__(self, mixture: Mixture, dtype: torch.dtype | None = None, stack: int | None = None) -> None:
        dense = DenseMixture(mixture, dtype, stack)
        self.architecture, self.device, self.dtype = dense.architecture, dense.device, dense.dtype
        self._run = torch.compile(dense, **_COMPILE)
        for size in _SIZES:
            self.predict(torch.zeros(size, 3, self.architecture.height, self.architecture.input_width))

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, on any device; the answer is on the model's."""
        images = as_unit(images, self.architecture, self.device)
        # A copy has the strides that its shape has. Views and odd strides would be new kinds of input, to be compiled for.
        return Prediction(*self._run(images.clone(memory_format=torch.contiguous_format)))
