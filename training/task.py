"""A task: what a stage trains, how it is attacked, and what its loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from training.attack import Attack, frozen_statistics
from training.data import Split
from training.losses import without_highest
from training.recipe import Schedule
from training.teacher import Teacher

Terms = dict[str, torch.Tensor]
Figures = dict[str, float]


class Task(nn.Module, ABC):
    """What a stage trains: the network, its attack, its loss, and how it is judged.

    Args:
        network: The network, channels-last; all that is saved.
        schedule: The stage's schedule.
        holdout: What it is judged on.
        device: Where the network is.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, holdout: Split, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.holdout = holdout
        self.device = device
        self.trim = 0.0
        """Share of the batch that gets no gradient; the trainer sets it for every step."""
        self.iterated = False
        """Whether attacks of one step are replaced by ones of two, as after a collapse; the trainer sets it for every step."""
        self.teacher: Teacher | None = None
        """Whose answers soften the targets, if anybody's."""

    @abstractmethod
    def attack(
        self, images: torch.Tensor, targets: torch.Tensor, choices: torch.Generator, noise: torch.Generator
    ) -> torch.Tensor:
        """Return attacked versions of ``images``.

        Args:
            images: ``(B, 3, H, W)``, float32 in ``[0, 1]``.
            targets: Classes ``(B,)`` or probabilities ``(B, C)``.
            choices: Decides which attack (on the CPU, the same for all workers).
            noise: Source of starting noise, on the images' device.
        """

    @abstractmethod
    def forward(self, attacked: torch.Tensor, clean: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Terms]:
        """Return the loss of attacked and clean images, and values to log."""

    @abstractmethod
    def judge(self, averaged: nn.Module) -> Figures:
        """Return held-out figures of a network; ``robust`` (in ``[0, 1]``), if present, is watched for collapse."""

    @abstractmethod
    def experts(self) -> list[nn.Module]:
        """Return what ``torch.compile`` may compile."""

    def drawn(self, attack: Attack) -> Attack:
        """Return what is done in place of an attack that was drawn for a batch."""
        return attack.iterated() if self.iterated else attack

    def kept(self, log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | slice:
        """Return which samples of a batch get gradients, by answers ``(B, C)`` to it: all, or all but those trimmed."""
        return without_highest(log_probs, targets, self.trim) if self.trim else slice(len(targets))

    def autocast(self) -> torch.autocast:
        """Return the context in which networks run, in the schedule's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.precision == "bfloat16")

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Run an attack inside: in the schedule's precision, with batch-norm statistics held unless it says otherwise.

        Parameters need no gradients meanwhile. Eager code would not compute them anyway, but compiled code would.
        """
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        held = frozen_statistics(self.network) if self.schedule.hold_statistics else nullcontext()
        with self.autocast(), held:
            for parameter in trained:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)
