"""The teacher: a checkpoint whose answers others learn, robust distillation."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from model.checkpoint import load_checkpoint, read_header
from model.fast import fold_batch_norms
from model.mixture import Mixture


class Teacher:
    """Softens targets by what a trained mixture says of the clean images.

    Whatever a stage does with the label, in its loss and in its attack, it then does with the teacher's probabilities: those of
    the clean image, where the teacher is most often right. Source: Zi et al. 2021, "Revisiting adversarial robustness
    distillation: robust soft labels make student better" (RSLAD), section 3.3, at temperature 1. Its two terms, clean and
    attacked, are those of joint training (with the weights of the recipe); experts have one of them, as without a teacher. A
    cross-entropy against the teacher's probabilities has the gradient of the divergence from them.

    Args:
        checkpoint: A path or the name of an embedded checkpoint. Its weights are read when it is first asked.
        share: Of every target that is the teacher's answer, in ``(0, 1]``; the rest stays the label.
        device: Where it answers.

    Raises:
        ValueError: The share is out of its range.
    """

    def __init__(self, checkpoint: str | Path, share: float, device: torch.device) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"a teacher's share of the targets is above 0 and at most 1, not {share}")
        self.header = read_header(checkpoint)
        self.share = share
        self._checkpoint, self._device = checkpoint, device

    @property
    def told(self) -> dict[str, object]:
        """What is recorded of it, as JSON values."""
        return {"sha256": self.header.weights_sha256, "top_k": self.header.top_k, "share": self.share}

    @cached_property
    def _network(self) -> Mixture:
        loaded = fold_batch_norms(load_checkpoint(self._checkpoint, self._device))
        if read_header(self._checkpoint) != self.header:
            raise ValueError(f"the teacher {self._checkpoint} was replaced while the run was prepared: start again")
        return loaded.requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def soften(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return targets ``(B, C)`` float32: the given ones, with their share of the teacher's answers.

        Args:
            images: ``(B, 3, H, W)``, float32 in ``[0, 1]``, not attacked.
            targets: Classes ``(B,)`` or probabilities ``(B, C)``.
        """
        answers: torch.Tensor = self._network(images).exp()
        labels = targets if targets.is_floating_point() else F.one_hot(targets, answers.shape[1])
        return self.share * answers + (1 - self.share) * labels
