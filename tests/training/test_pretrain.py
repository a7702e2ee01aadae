"""One expert alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model.mixture import Mixture
from training.data import Dataset, Split
from training.loading import load_dataset
from training.pipeline import Run
from training.pretrain import Alone, ExpertTask, expert_bag
from training.recipe import RECIPES, ExpertLoss, ExpertRecipe, Recipe, Schedule
from training.worker import Worker

CPU = torch.device("cpu")
DIGESTS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(2000)]
HALF = replace(RECIPES["compact"], bag=0.5)


def test_an_expert_alone_answers_as_it_does_inside_the_mixture(mixture: Mixture, images: torch.Tensor) -> None:
    _, log_probs = mixture.components(images)
    for index, expert in enumerate(mixture.experts):
        alone = Alone(expert, mixture.architecture).eval()
        torch.testing.assert_close(alone(images), log_probs[:, index])


@pytest.mark.parametrize("loss", ["cross_entropy", "trades"])
def test_trimmed_samples_get_no_gradient(mixture: Mixture, images: torch.Tensor, loss: ExpertLoss) -> None:
    alone = Alone(mixture.experts[0], mixture.architecture)
    task = ExpertTask(alone, ExpertRecipe("fgsm", loss=loss), Schedule(1, precision="float32"), no_images(), CPU).eval()
    task.trim = 0.25
    labels = torch.arange(12) % 5
    attacked, clean = images[:12].clone().requires_grad_(), images[12:24].clone().requires_grad_()
    task(attacked, clean, labels)[0].backward()
    judged = clean if loss == "trades" else attacked
    losses = F.cross_entropy(alone(judged), labels, reduction="none")
    assert attacked.grad is not None
    untouched = (attacked.grad.flatten(1) == 0).all(dim=1)
    assert set(untouched.nonzero().flatten().tolist()) == set(losses.argsort()[-3:].tolist())


def no_images() -> Split:
    return Split(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


def bag(index: int, recipe: Recipe = HALF, seed: int = 0, digests: list[str] = DIGESTS) -> set[str]:
    return {digests[position] for position in expert_bag(index, recipe, digests, seed).tolist()}


def test_every_expert_draws_a_bag_of_its_own() -> None:
    first, second, other_seed = bag(0), bag(1), bag(0, seed=1)
    for one, other in ((first, second), (first, other_seed)):
        assert len(one) == pytest.approx(1000, abs=110)  # five standard deviations
        assert len(one & other) == pytest.approx(500, abs=100)
    assert len(bag(0, replace(HALF, bag=0.1))) == pytest.approx(200, abs=67)
    assert bag(0, replace(HALF, bag=0.1)) < first
    assert len(bag(3, replace(HALF, bag=1.0))) == len(bag(3, replace(HALF, bag=0.0))) == 2000


def test_no_sample_moves_into_or_out_of_a_bag_because_of_others() -> None:
    assert bag(2, digests=DIGESTS[500:]) == bag(2) & set(DIGESTS[500:])
    assert expert_bag(2, HALF, [DIGESTS[7]] * 2, 0).numel() in (0, 2)  # copies share a lot


def relabelled(dataset: Dataset, position: int, digest: str) -> Dataset:
    labels = dataset.train.labels.clone()
    labels[position] = (labels[position] + 1) % 3
    return replace(dataset, train=Split(dataset.train.images, labels), digest=digest)


def test_an_expert_learns_nothing_from_outside_its_bag(colour_file: Path, tmp_path: Path, one_thread: None) -> None:
    dataset = load_dataset(str(colour_file))
    schedule = Schedule(1, batch_size=8)
    small = replace(HALF, pretrain=schedule, benign=schedule, holdout=4, validation_images=4).for_data(3, 8, 8)
    small = replace(small, architecture=replace(small.architecture, width=4, gate_width=4))
    train, _ = dataset.split_holdout(4)
    inside = set(expert_bag(1, small, train.digests(), 0).tolist())
    assert 8 <= len(inside) < len(train)
    places = {digest: place for place, digest in enumerate(dataset.train.digests())}
    held, left = (
        places[train.digests()[next(row for row in range(len(train)) if (row in inside) == wanted)]] for wanted in (True, False)
    )

    def weights(data: Dataset, name: str) -> dict[str, torch.Tensor]:
        run = Run(small, data, tmp_path / name, 0, Worker(CPU))
        run.pretrain([1])
        shown = [len(seen) for _, seen in run.stages()]
        assert shown[1] == len(inside)
        assert shown[-1] == len(train)
        return load_file(tmp_path / name / "expert-1.safetensors")

    whole, left_out, taken = (
        weights(data, name)
        for name, data in (
            ("whole", dataset),
            ("left out", relabelled(dataset, left, "1" * 64)),
            ("taken", relabelled(dataset, held, "2" * 64)),
        )
    )
    assert all(torch.equal(value, left_out[name]) for name, value in whole.items())
    assert not all(torch.equal(value, taken[name]) for name, value in whole.items())
