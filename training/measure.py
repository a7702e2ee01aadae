"""Measuring: which images a network gets right, as they are or under attack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from training.attack import Attack, LogProbs, perturb
from training.augmentation import to_float
from training.data import Split

BATCH = 128


@dataclass(frozen=True)
class Bench:
    """What networks are measured on: all of them on the same images, on one device, with starting noise from one seed.

    Attributes:
        split: The images, ``(N, 3, H, W)`` uint8, and their labels.
        device: Where to run.
        seed: The starting noise follows from it, the batch's number and the restart's.
        batch_size: Images per forward pass.
    """

    split: Split
    device: torch.device
    seed: int = 0
    batch_size: int = BATCH

    def __len__(self) -> int:
        return len(self.split)

    def first(self, count: int) -> Bench:
        """Return the same bench with the first ``count`` images only, or all if there are fewer."""
        return replace(self, split=self.split.take(slice(count)))

    def batches(self, images: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images ``(B, 3, H, W)``, float32 in ``[0, 1]``, and labels ``(B,)``, both on the device.

        Args:
            images: Other versions of the images in the same order, ``(N, 3, H, W)`` float32; ``None`` means as they are.
        """
        for start in range(0, len(self), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part = to_float(self.split.images[rows], self.device) if images is None else images[rows].to(self.device)
            yield part.contiguous(memory_format=torch.channels_last), self.split.labels[rows].to(self.device)

    def correct(self, network: LogProbs, attack: Attack | None, crafted_on: LogProbs | None = None) -> torch.Tensor:
        """Return ``(N,)`` booleans: which images are classified rightly, after ``attack`` if there is one.

        An image counts as right only if it is right as it is and survives every restart of the attack; one that is already
        broken is left alone.

        Args:
            network: Which network answers.
            attack: What is done to the images; ``None`` leaves them as they are.
            crafted_on: Which network the attack climbs, if it is another (a transfer attack).
        """
        if attack is None:
            return self.judge(network)
        results = []
        for number, (images, labels) in enumerate(self.batches()):
            # The first start attacks all images, so that networks that are compared face the same noise on each.
            right = torch.ones(len(labels), dtype=torch.bool, device=self.device)
            for restart in range(attack.restarts):
                rows = right.nonzero().squeeze(1)
                if len(rows):
                    noise = self._generator(number, restart)
                    attacked = perturb(crafted_on or network, images[rows], labels[rows], attack, noise)
                    right[rows] = _right(network, attacked, labels[rows])
            results.append((right & _right(network, images, labels)).cpu())
        return torch.cat(results)

    def attacked(self, network: LogProbs, attack: Attack) -> torch.Tensor:
        """Return the images after one start of an attack: ``(N, 3, H, W)``, float32 in ``[0, 1]``, on the CPU."""
        return torch.cat(
            [
                perturb(network, images, labels, attack, self._generator(number, 0)).cpu()
                for number, (images, labels) in enumerate(self.batches())
            ]
        )

    def judge(self, network: LogProbs, images: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``(N,)`` booleans: which images, or which of these versions of them, ``network`` classifies rightly."""
        return torch.cat([_right(network, part, labels).cpu() for part, labels in self.batches(images)])

    def _generator(self, batch: int, restart: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 100_003 + batch) * 64 + restart)


def exact_float32() -> None:
    """Make GPUs compute in float32 where float32 is asked for, not in TF32: attacks need exact gradients."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def accuracy_under(log_probs: LogProbs, split: Split, attack: Attack | None, device: torch.device) -> float:
    """Return the share, in ``[0, 1]``, of images that are classified rightly after ``attack`` if there is one."""
    return Bench(split, device).correct(log_probs, attack).float().mean().item()


@torch.no_grad()
def _right(network: LogProbs, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return network(images).argmax(dim=1) == labels
