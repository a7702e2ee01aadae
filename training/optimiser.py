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
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of x, x^3 and x^5 in a Newton-Schulz iteration."""
ITERATIONS = 4


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
        self._matrices = [_as_matrix(kernel.detach()) for kernel in self._kernels]  # views that share the kernels' storage
        if any(m.data_ptr() != k.data_ptr() for m, k in zip(self._matrices, self._kernels, strict=True)):
            raise ValueError("the module is not channels-last in memory: call to(memory_format=torch.channels_last) first")
        self._sgd = torch.optim.SGD(
            others, lr=0.0, momentum=schedule.momentum, nesterov=True, weight_decay=schedule.weight_decay
        )
        self._muon = _Muon(self._matrices, schedule.momentum)
        self._sgd_share = SGD_LR_SHARE if self._matrices else 1.0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the parameters' gradients once, at Muon learning rate ``lr``, and clear them."""
        gradients = []
        for kernel in self._kernels:
            if kernel.grad is None:
                raise RuntimeError(f"a kernel of shape {tuple(kernel.shape)} got no gradient: is it part of the loss?")
            gradients.append(_as_matrix(kernel.grad))
            kernel.grad = None
        if self._matrices:
            norms = torch._foreach_norm(self._matrices)
            torch._foreach_mul_(self._matrices, [len(m) ** 0.5 / n for m, n in zip(self._matrices, norms, strict=True)])
            self._muon.step(gradients, lr)
        for group in self._sgd.param_groups:
            group["lr"] = lr * self._sgd_share
        self._sgd.step()
        self._sgd.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the momentum buffers by name, empty before the first step."""
        buffers = {f"muon.{index}": buffer for index, buffer in enumerate(self._muon.momenta)}
        for index, parameter in enumerate(self._sgd.param_groups[0]["params"]):
            if "momentum_buffer" in self._sgd.state.get(parameter, {}):
                buffers[f"sgd.{index}"] = self._sgd.state[parameter]["momentum_buffer"]
        return buffers

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the buffers that :meth:`state` returned."""
        if "muon.0" in state:
            self._muon.momenta = [
                torch.empty_like(matrix).copy_(state[f"muon.{index}"]) for index, matrix in enumerate(self._matrices)
            ]
        for index, parameter in enumerate(self._sgd.param_groups[0]["params"]):
            if f"sgd.{index}" in state:
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(state[f"sgd.{index}"])
                self._sgd.state[parameter] = {"momentum_buffer": buffer}


class _Muon:
    """Muon on many matrices, those of one shape together: nine networks have 171 of 10 shapes, and a GPU would wait for each.

    Otherwise as ``torch.optim.Muon``: Nesterov momentum, four Newton-Schulz iterations in bfloat16, and a learning rate that
    is larger by ``sqrt(rows / columns)`` for matrices with more rows than columns.
    """

    def __init__(self, matrices: list[torch.Tensor], momentum: float) -> None:
        self._matrices, self._momentum = matrices, momentum
        self.momenta: list[torch.Tensor] = []
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, (rows, columns) in enumerate(matrix.shape for matrix in matrices):
            shapes.setdefault((rows, columns), []).append(index)
        self._shapes = shapes

    def step(self, gradients: list[torch.Tensor], lr: float) -> None:
        if not self.momenta:
            self.momenta = [torch.zeros_like(matrix) for matrix in self._matrices]
        torch._foreach_lerp_(self.momenta, gradients, 1 - self._momentum)
        updates = torch._foreach_lerp(gradients, self.momenta, self._momentum)
        for (rows, columns), alike in self._shapes.items():
            orthogonal = _orthogonalised(torch.stack([updates[index] for index in alike])).to(updates[0].dtype)
            change = [self._matrices[index] for index in alike]
            torch._foreach_add_(change, list(orthogonal.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def _orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Return ``(N, R, C)`` matrices with all singular values near 1, in bfloat16.

    Source: the quintic Newton-Schulz iteration of Jordan et al. 2024.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT.bfloat16() if tall else matrices.bfloat16()
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), found, beta=first)
    return found.mT if tall else found


def _as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """View a channels-last kernel ``(O, I, h, w)`` as ``(O, h * w * I)``."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
