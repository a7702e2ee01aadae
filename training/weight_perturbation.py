"""Adversarial weight perturbation: gradients are taken at weights that a step up the loss has made worse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def ascended(module: nn.Module, gamma: float) -> Iterator[None]:
    """Move a module's weights up the loss for the length of the block, then put them back bit for bit.

    Every parameter with more than one dimension moves along the gradient that is in its ``grad`` now, by ``gamma`` times its
    own Frobenius norm. Then all ``grad`` are ``None``, so that after a ``backward`` in the block they hold the gradients at the
    perturbed weights, for an optimiser that steps from the restored ones. Vectors (biases, batch norms) and parameters whose
    gradient is missing or zero stay. Weights are put back also when the block raises; they keep their storage throughout.

    Source: Wu et al. 2020, "Adversarial weight perturbation helps robust generalization", equations 7 to 9 and algorithm 1,
    with one ascent step.

    Args:
        module: The network, after ``backward`` of the loss to climb.
        gamma: Length of the step relative to each weight's norm, 0 or more; around 0.005 in the paper.

    Raises:
        ValueError: ``gamma`` is negative, or no parameter has a gradient.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be 0 or more, not {gamma}")
    gradients = [(parameter, parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        raise ValueError(f"no parameter of the {type(module).__name__} has a gradient to climb: call backward() first")
    moving = [(parameter, gradient) for parameter, gradient in gradients if parameter.ndim > 1]
    # Subtracting what was added would round differently than adding did, so copies are what restores the bits.
    before = [(parameter, parameter.detach().clone()) for parameter, _ in moving]
    try:
        with torch.no_grad():
            for parameter, gradient in moving:
                length = gradient.norm()
                # A choice on the device, not an if: reading the length would stall a GPU once per parameter.
                scale = torch.where(length > 0, gamma * parameter.norm() / length, 0.0)
                parameter.add_(gradient * scale)
        module.zero_grad(set_to_none=True)
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in before:
                parameter.copy_(weights)
