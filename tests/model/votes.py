"""Comparing an execution of a vote with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.certificate import read_means, read_votes
from model.mixture import Mixture

Predict = Callable[[torch.Tensor], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


def check_votes(voters: Mixture, predict: Predict, tolerance: float, *inputs: torch.Tensor) -> None:
    """Compare votes, means and weights on ragged batches of either input type.

    Args:
        voters: The reference.
        predict: The execution, from images to probabilities ``(B, C)`` and weights ``(B, E)``.
        tolerance: Of the execution's precision.
        inputs: The images in ``[0, 1]``, then the same as uint8.
    """
    with torch.no_grad():
        answers = voters.components(inputs[0])[1].exp().numpy()  # (B, E, C)
    ranked = np.sort(answers, axis=2)
    clear = (ranked[:, :, -1] - ranked[:, :, -2] > 2 * tolerance).all(axis=1)  # where no vote is open to rounding
    assert clear.sum() >= 10
    experts, classes = answers.shape[1:]
    expected = np.array([np.bincount(row, minlength=classes) for row in answers.argmax(axis=2)])
    assert len(np.unique(expected[clear], axis=0)) >= 3  # they are not all of one opinion
    for count in (7, 1, 33, 2):
        for images in inputs:
            probabilities, weights = predict(images[:count])
            votes = read_votes(probabilities, experts)
            kept: Any = clear[:count]
            assert np.array_equal(votes[kept], expected[:count][kept])
            assert (votes.sum(axis=1) == experts).all()
            assert np.abs(read_means(probabilities, experts) - answers[:count].mean(axis=1)).max() <= tolerance
            assert np.allclose(weights, 1 / experts, atol=0.005)
            assert weights.shape == (count, experts)
