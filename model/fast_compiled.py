"""The compiled fast execution: the dense mixture through torch.compile, just in time, for this process."""

from __future__ import annotations

from typing import Any

import torch

from model.fast import Prediction, as_unit
from model.fast_dense import DenseMixture
from model.mixture import Mixture

FREEZING = {"freezing": True}
"""Weights become constants, so that the compiler lays them out once the way the processor's convolutions want them."""

# Isolated, or the mixtures of one process would share one limit of compilations, past which torch runs uncompiled.
_COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": True, "isolate_recompiles": True, "options": FREEZING}


class CompiledMixture:
    """A mixture that only predicts, compiled when it is made, so that no request waits for the compiler.

    One image has code of its own, and all larger batches share theirs. Compiling takes tens of seconds and, for a CPU, a C++
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
        for size in (1, 2):  # torch compiles size 1 apart, as it broadcasts; 2 stands for every other
            self.predict(torch.zeros(size, 3, self.architecture.height, self.architecture.input_width))

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, on any device; the answer is on the model's."""
        images = as_unit(images, self.architecture, self.device)
        # One image cut from others may keep their stride, by which torch would take it for a new kind of input and compile.
        return Prediction(*self._run(images.flatten().view(images.shape)))
