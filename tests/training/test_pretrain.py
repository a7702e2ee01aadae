"""One expert alone."""

from __future__ import annotations

import torch

from model.mixture import Mixture
from training.pretrain import Alone


def test_an_expert_alone_answers_as_it_does_inside_the_mixture(mixture: Mixture, images: torch.Tensor) -> None:
    _, log_probs = mixture.components(images)
    for index, expert in enumerate(mixture.experts):
        alone = Alone(expert, mixture.architecture).eval()
        torch.testing.assert_close(alone(images), log_probs[:, index])
