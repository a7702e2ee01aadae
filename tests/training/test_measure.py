"""Measuring."""

from __future__ import annotations

import pytest
import torch

from tests.training.evaluation.linear import linear
from training.attack import Attack
from training.data import Split
from training.measure import Bench, accuracy_under

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
        correct = Bench(split, CPU, batch_size=batch_size).correct(reddest, None)
        assert correct.tolist() == [True, True, False, True, True]
    assert accuracy_under(reddest, split, None, CPU) == pytest.approx(0.8)


def test_under_attack_only_clear_cases_survive(split: Split) -> None:
    for attack in (Attack.fgsm(8 / 255), Attack.pgd(8 / 255, 10, 2 / 255)):
        assert Bench(split, CPU, batch_size=2).correct(reddest, attack).tolist() == [True, True, False, False, False]


def test_the_seed_and_the_batchs_number_decide_the_starting_noise(split: Split) -> None:
    def seen(seed: int) -> list[torch.Tensor]:
        inputs = []

        def watched(images: torch.Tensor) -> torch.Tensor:
            inputs.append(images.detach().clone())
            return reddest(images)

        Bench(split, CPU, seed, batch_size=2).correct(watched, Attack.pgd(8 / 255, 1, 0.0))
        return inputs

    first, same, other = seen(1), seen(1), seen(2)
    assert all(torch.equal(one, two) for one, two in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    noise = [inputs - split.images[start : start + 2] / 255 for start, inputs in ((0, first[0]), (2, first[2]))]
    assert not torch.allclose(noise[0], noise[1], atol=1e-4)


def test_an_image_must_survive_every_restart_and_is_left_alone_once_it_is_broken() -> None:
    split = Split(torch.full((64, 3, 8, 8), 128, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    judged: list[int] = []

    def by_noise(images: torch.Tensor) -> torch.Tensor:
        """Right for the half of all noise that brightens the first pixel; the slope is zero, so that noise is all there is."""
        first = images[:, 0, 0, 0] - 128 / 255
        if not images.requires_grad:
            judged.append(len(images))
        return torch.stack([first.sign(), -first.sign()], dim=1) + 0 * images.sum()

    bench = Bench(split, CPU)
    once = bench.correct(by_noise, Attack.pgd(8 / 255, 1, 0.0))
    assert 16 < once.sum() < 48
    judged.clear()
    thrice = bench.correct(by_noise, Attack.pgd(8 / 255, 1, 0.0, restarts=3))
    assert not (thrice & ~once).any()
    assert 1 <= thrice.sum() < 20
    assert judged[:2] == [64, int(once.sum())]
    assert judged[1] > judged[2] >= thrice.sum()


def test_a_transfer_attack_climbs_one_network_and_is_judged_on_another() -> None:
    network, stranger = linear(classes=2), linear(classes=2, seed=1)
    attack = Attack.pgd(8 / 255, 10, 2 / 255)
    own = network.bench.correct(network, attack)
    transferred = network.bench.correct(network, attack, crafted_on=stranger)
    same = network.bench.correct(network, attack, crafted_on=network)
    assert torch.equal(own, same)
    assert transferred.sum() > own.sum() + 10  # a step along unrelated weights is hardly more than noise


def test_attacked_images_can_be_kept_and_judged_later() -> None:
    network = linear(classes=3)
    attack = Attack.pgd(8 / 255, 5, 2 / 255)
    bench = network.bench
    attacked = bench.attacked(network, attack)
    assert attacked.shape == (100, 3, 8, 8)
    assert torch.equal(bench.judge(network) & bench.judge(network, attacked), bench.correct(network, attack))
    assert torch.equal(bench.judge(network), network.robust(0))


def test_the_first_images_are_a_bench_of_their_own() -> None:
    network = linear(classes=3)
    assert len(network.bench.first(7)) == 7
    assert len(network.bench.first(1000)) == 100
    assert torch.equal(network.bench.first(7).judge(network), network.bench.judge(network)[:7])


def test_every_restart_starts_elsewhere(images: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []

    def unbreakable(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.detach().clone())
        return torch.stack([inputs.flatten(1).sum(dim=1) * 0 + 1, inputs.flatten(1).sum(dim=1) * 0], dim=1)

    bench = Bench(Split((images[:4] * 255).to(torch.uint8), torch.zeros(4, dtype=torch.int64)), torch.device("cpu"))
    attack = Attack.pgd(8 / 255, 1, 0.0, restarts=3)
    assert bench.correct(unbreakable, attack).all()
    starts = seen[::2]  # in turn the attack's pass and its judging, and in the end the clean images
    assert len(starts) == 4
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
