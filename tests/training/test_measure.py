"""Measuring."""

from __future__ import annotations

import pytest
import torch

from training.attack import Attack
from training.data import Split
from training.measure import accuracy_under, correct_under

CPU = torch.device("cpu")


def reddest(images: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the channels by their mean brightness."""
    return (20 * images.mean(dim=(2, 3))).log_softmax(dim=1)


@pytest.fixture
def split() -> Split:
    images = torch.full((5, 3, 4, 4), 100, dtype=torch.uint8)
    for index, (channel, value) in enumerate([(0, 200), (1, 200), (2, 200), (0, 103), (1, 103)]):
        images[index, channel] = value
    return Split(images, torch.tensor([0, 1, 0, 0, 1]))  # the third is wrong, the last two are close calls


def test_right_and_wrong_are_counted_image_by_image_across_batches(split: Split) -> None:
    for batch_size in (1, 2, 5, 128):
        correct = correct_under(reddest, split, None, CPU, batch_size=batch_size)
        assert correct.tolist() == [True, True, False, True, True]
    assert accuracy_under(reddest, split, None, CPU) == pytest.approx(0.8)


def test_under_attack_only_clear_cases_survive(split: Split) -> None:
    for attack in (Attack.fgsm(8 / 255), Attack.pgd(8 / 255, 10, 2 / 255)):
        assert correct_under(reddest, split, attack, CPU, batch_size=2).tolist() == [True, True, False, False, False]


def test_the_seed_and_the_batchs_number_decide_the_starting_noise(split: Split) -> None:
    def seen(seed: int) -> list[torch.Tensor]:
        inputs = []

        def watched(images: torch.Tensor) -> torch.Tensor:
            inputs.append(images.detach().clone())
            return reddest(images)

        correct_under(watched, split, Attack.pgd(8 / 255, 1, 0.0), CPU, seed=seed, batch_size=2)
        return inputs

    first, same, other = seen(1), seen(1), seen(2)
    assert all(torch.equal(one, two) for one, two in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    noise = [inputs - split.images[start : start + 2] / 255 for start, inputs in ((0, first[0]), (2, first[2]))]
    assert not torch.allclose(noise[0], noise[1], atol=1e-4)
