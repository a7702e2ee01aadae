"""The optimiser: Muon for convolution kernels and SGD for everything else, or SGD alone.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); holding every kernel at a fixed norm
follows Jordan's airbench94_muon. Short adversarial training is limited by how little is learnt per step, and Muon learns more
per step than SGD (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import nn

from training.recipe import Schedule

SGD_LR_SHARE = 2.0
"""SGD's learning rate over Muon's: both follow one schedule."""


class Optimiser:
    """Steps a module's parameters and can be saved and restored exactly.

    A convolution kernel that batch norm follows has a direction but no meaningful length, so it is held at Frobenius norm
    ``sqrt(out_channels)``, which makes Muon's learning rate an angle per step. The first convolution of every network (whose
    input has three channels) and all vectors and heads are left to SGD.
    """

    def __init__(self, module: nn.Module, schedule: Schedule) -> None:
        self._kernels: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in module.parameters():
            hidden = schedule.optimiser == "muon" and parameter.ndim == 4 and parameter.shape[1] >= 8
            (self._kernels if hidden else others).append(parameter)
        # torch.optim.Muon takes matrices only: give it views that share the kernels' storage.
        self._matrices = [nn.Parameter(_as_matrix(kernel.detach())) for kernel in self._kernels]
        if any(m.data_ptr() != k.data_ptr() for m, k in zip(self._matrices, self._kernels, strict=True)):
            raise ValueError("the module is not channels-last in memory: call to(memory_format=torch.channels_last) first")
        self._optimisers: dict[str, torch.optim.Optimizer] = {
            "sgd": torch.optim.SGD(
                others, lr=0.0, momentum=schedule.momentum, nesterov=True, weight_decay=schedule.weight_decay
            )
        }
        if self._matrices:
            self._optimisers["muon"] = torch.optim.Muon(
                self._matrices, lr=0.0, weight_decay=0.0, momentum=schedule.momentum, nesterov=True, ns_steps=4
            )
        self._sgd_share = SGD_LR_SHARE if self._matrices else 1.0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the parameters' gradients once, at Muon learning rate ``lr``, and clear them."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            if kernel.grad is None:
                raise RuntimeError(f"a kernel of shape {tuple(kernel.shape)} got no gradient: is it part of the loss?")
            matrix.grad = _as_matrix(kernel.grad).contiguous()
            kernel.grad = None
        if self._matrices:
            matrices: list[torch.Tensor] = list(self._matrices)
            norms = torch._foreach_norm(matrices)
            torch._foreach_mul_(matrices, [len(m) ** 0.5 / n for m, n in zip(matrices, norms, strict=True)])
        for name, optimiser in self._optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = lr * (self._sgd_share if name == "sgd" else 1.0)
            optimiser.step()
        self._optimisers["sgd"].zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the momentum buffers by name, empty before the first step."""
        return {
            f"{name}.{index}": optimiser.state[parameter]["momentum_buffer"]
            for name, optimiser in self._optimisers.items()
            for index, parameter in enumerate(optimiser.param_groups[0]["params"])
            if "momentum_buffer" in optimiser.state.get(parameter, {})
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the buffers that :meth:`state` returned."""
        for name, optimiser in self._optimisers.items():
            for index, parameter in enumerate(optimiser.param_groups[0]["params"]):
                if f"{name}.{index}" in state:
                    buffer = torch.empty_like(parameter, requires_grad=False).copy_(state[f"{name}.{index}"])
                    optimiser.state[parameter] = {"momentum_buffer": buffer}


def _as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """View a channels-last kernel ``(O, I, h, w)`` as ``(O, h * w * I)``."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
