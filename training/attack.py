"""Adversarial attacks: one loop; threat models differ in how they start, step and project.

Sources: FGSM, Goodfellow et al. 2015, section 4; PGD, Madry et al. 2018, section 2.1; noise-started FGSM (N-FGSM), de Jorge
et al. 2022, algorithm 1; the margin objective, Carlini & Wagner 2017, section V-A (their f6, without a bound on the
confidence), inside PGD as in Madry et al. 2018, section 5 ("CW").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

LogProbs = Callable[[torch.Tensor], torch.Tensor]
Objective = Literal["cross_entropy", "margin"]


@dataclass(frozen=True)
class Attack:
    """An L-infinity attack that climbs an objective by signed gradient steps.

    Attributes:
        epsilon: Radius of the ball, in ``[0, 1]`` pixel units.
        steps: Number of gradient steps.
        step_size: Length of a step, in ``[0, 1]`` pixel units.
        noise: Half-width of the uniform starting noise, in ``[0, 1]`` pixel units; 0 starts at the image.
        project: Keep the result inside the ball and inside ``[0, 1]``. N-FGSM does neither.
        objective: What is climbed: ``cross_entropy`` of the true class, or the ``margin`` by which the best wrong class leads
            it in log-probability.
        restarts: How often :mod:`training.measure` repeats the attack from other noise; :func:`perturb` starts once.
    """

    epsilon: float
    steps: int
    step_size: float
    noise: float = 0.0
    project: bool = True
    objective: Objective = "cross_entropy"
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or min(self.epsilon, self.step_size, self.noise) < 0:
            raise ValueError(f"an attack needs steps >= 1 and no negative length, not {self}")
        if self.restarts < 1 or (self.restarts > 1 and not self.noise):
            raise ValueError(f"an attack needs restarts >= 1, and noise if it restarts, not {self}")
        if self.objective not in get_args(Objective):
            raise ValueError(f"an attack's objective is one of {', '.join(get_args(Objective))}, not {self.objective!r}")

    @classmethod
    def fgsm(cls, epsilon: float) -> Attack:
        """Return the single-step attack from the image itself."""
        return cls(epsilon=epsilon, steps=1, step_size=epsilon)

    @classmethod
    def noise_fgsm(cls, epsilon: float) -> Attack:
        """Return N-FGSM: noise of twice the radius, one full step, no projection; for training only."""
        return cls(epsilon=epsilon, steps=1, step_size=epsilon, noise=2 * epsilon, project=False)

    @classmethod
    def pgd(
        cls, epsilon: float, steps: int, step_size: float, *, objective: Objective = "cross_entropy", restarts: int = 1
    ) -> Attack:
        """Return PGD with a random start inside the ball."""
        return cls(epsilon, steps, step_size, noise=epsilon, objective=objective, restarts=restarts)

    def iterated(self) -> Attack:
        """Return the attack itself if it takes several steps, else PGD of two steps in the same ball.

        What a network that overfitted to one step has learnt to hide from (catastrophic overfitting, Wong et al. 2020), two
        find; after Li et al. 2020, "Towards understanding fast adversarial training".
        """
        return self if self.steps > 1 else Attack.pgd(self.epsilon, 2, 0.625 * self.epsilon)


def perturb(
    log_probs: LogProbs,
    images: torch.Tensor,
    labels: torch.Tensor,
    attack: Attack,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return adversarial versions of ``images``.

    Only gradients with respect to the images are computed; the parameters' ``grad`` fields are left alone.

    Args:
        log_probs: The attacked function, images ``(B, 3, H, W)`` in ``[0, 1]`` to log-probabilities (or logits) ``(B, C)``.
        images: ``(B, 3, H, W)``, float32 in ``[0, 1]``.
        labels: ``(B,)``, the true classes; for the cross-entropy also probabilities ``(B, C)``.
        attack: What to do.
        generator: Source of the starting noise, which is drawn on the generator's device: one on the CPU gives the same noise
            whatever the images' device, one on the images' device saves copying.

    Returns:
        ``(B, 3, H, W)``, float32, without gradient history.
    """
    adversarial = images.detach()
    if attack.noise:
        noise = torch.empty(images.shape, device=generator.device)
        noise.uniform_(-attack.noise, attack.noise, generator=generator)
        adversarial = adversarial + noise.to(images.device).contiguous(memory_format=torch.channels_last)
        adversarial = _project(adversarial, images, attack)
    for _ in range(attack.steps):
        adversarial.requires_grad_(True)
        loss = _objective(log_probs(adversarial), labels, attack.objective)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = _project(adversarial.detach() + attack.step_size * gradient.sign(), images, attack)
    return adversarial


def _objective(log_probs: torch.Tensor, labels: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Return the sum over the batch of what the attack climbs; log-probabilities are ``(B, C)``."""
    if objective == "cross_entropy":
        return F.cross_entropy(log_probs, labels, reduction="sum")
    true = labels.unsqueeze(1)
    others = log_probs.scatter(1, true, -torch.inf).max(dim=1).values  # (B,)
    return (others - log_probs.gather(1, true).squeeze(1)).sum()


def _project(adversarial: torch.Tensor, images: torch.Tensor, attack: Attack) -> torch.Tensor:
    if not attack.project:
        return adversarial
    return torch.clamp(adversarial, images - attack.epsilon, images + attack.epsilon).clamp_(0, 1)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Hold batch-norm statistics while an attack runs: the network is in eval mode inside the block."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
