"""Thieves for benchmarks.extraction: how they choose what to ask, and how they train a clone on the answers.

Random choice is ART's own loop of KnockoffNets (Orekondy et al., 2019). ART's CopycatCNN chooses, asks and trains in the same
way, so it is the same thief (tests/test_extraction.py holds them to it); the two papers differ in whether they use
probabilities, and here the policy decides that. ART's adaptive KnockoffNets trains on labels whatever it is told, on one image
at a time (which batch norm can't bear) and asks the same image repeatedly; here it goes by rounds and never asks twice. JBDA
(Papernot et al., 2017), in the form that goes toward the three likeliest classes (Orekondy et al., 2020), is not in ART.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.extraction_victim import Pool
from model.architecture import Architecture
from model.backbone import ResNet18
from training.data import Split
from training.pretrain import Alone, ExpertTask
from training.recipe import ExpertRecipe, Schedule
from training.stage import Stage, Trainer
from training.worker import Worker

CPU = torch.device("cpu")
Ask = Callable[[np.ndarray], np.ndarray]
"""From exact probabilities ``(N, C)`` to what the thief makes of the answers to them, distributions ``(N, C)``."""
REFERENCE = 2000
ROUND = 50
"""Queries of the adaptive thief between two looks at their rewards."""
SEEDS = 150
"""Photos that the augmenting thief starts with."""
STEP = 25.5
"""Levels by which augmentation moves every value: 0.1."""


@dataclass(frozen=True)
class Student:
    """How a clone is trained: the same for every policy.

    The longer, the more answers there are, but fewer times each: ``epochs`` holds for 2,000 answers and goes with the inverse
    of the square root of their number.

    Attributes:
        width: Channels of the plain ResNet-18's first stage.
        epochs: Passes over 2,000 answers.
        batch_size: Images per step, but no more than an eighth of them.
        peak_lr: Of the one-cycle schedule, for Muon.
    """

    width: int = 16
    epochs: float = 12.0
    batch_size: int = 64
    peak_lr: float = 0.04

    def learn(self, images: np.ndarray, targets: np.ndarray, seed: int, share: float = 1.0) -> Alone:
        """Return a clone: it gives log-probabilities ``(B, C)`` of images in ``[0, 1]``.

        Args:
            images: ``(N, 3, H, W)`` uint8.
            targets: ``(N, C)`` distributions.
            seed: Of the weights and of everything random in training.
            share: Of the epochs.
        """
        clone, architecture = self.fresh(images, targets.shape[1], seed)
        schedule = Schedule(
            epochs=share * self.epochs * (REFERENCE / len(images)) ** 0.5,
            batch_size=min(self.batch_size, max(2, len(images) // 8)),  # few answers get as many steps
            peak_lr=self.peak_lr,
        )
        split = Split(
            torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(targets.astype(np.float32)),  # the loss takes distributions where others have classes
        )
        task = ExpertTask(clone, ExpertRecipe("benign"), schedule, split, CPU)
        trainer = Trainer(Stage("clone", task, architecture.num_classes, seed, {}), split, Worker(CPU))
        for step in range(trainer.steps):
            trainer.step(step)
        averaged = trainer.progress.averaged.eval()
        assert isinstance(averaged, Alone)
        return averaged

    def fresh(self, images: np.ndarray, classes: int, seed: int) -> tuple[Alone, Architecture]:
        """Return an untrained clone."""
        architecture = Architecture(self.width, classes, 1, height=images.shape[2], input_width=images.shape[3])
        torch.manual_seed(seed)
        clone = Alone(ResNet18(self.width, classes), architecture)
        return clone.to(memory_format=torch.channels_last), architecture


@dataclass(frozen=True)
class Theft:
    """What a thief has at the end: what was asked, the exact answers to it (for the judge alone), and the clone."""

    images: np.ndarray
    exact: np.ndarray
    clone: Alone


def random(pool: Pool, ask: Ask, budget: int, seed: int, student: Student) -> Theft:
    """KnockoffNets' random strategy, which is Copycat's too: images of the pool at random, each once."""
    return library("KnockoffNets", pool, ask, budget, seed, student)


def library(name: str, pool: Pool, ask: Ask, budget: int, seed: int, student: Student) -> Theft:
    """Let a class of ``art.attacks.extraction`` steal, from a victim that it sees as a black box of numbered images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ART's own imports are not up to date
        from art.attacks import extraction
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    taken: list[Theft] = []

    class Clone(BlackBoxClassifierNeuralNetwork):  # type: ignore[misc]
        def fit(self, x: np.ndarray, y: np.ndarray, **_: object) -> None:
            rows = numbers(x)
            taken.append(Theft(pool.images[rows], pool.exact[rows], student.learn(pool.images[rows], y, seed)))

    def numbers(x: np.ndarray) -> np.ndarray:
        return x[:, 0].astype(np.int64)  # ART makes float32 of them, which is exact up to 2^24

    def answer(x: np.ndarray) -> np.ndarray:
        return ask(pool.exact[numbers(x)])

    classes = pool.exact.shape[1]
    victim = BlackBoxClassifierNeuralNetwork(answer, (1,), classes)
    np.random.seed(seed)  # ART draws from it
    thief = getattr(extraction, name)(victim, batch_size_query=budget, nb_stolen=budget, use_probability=True)
    thief.extract(pool.offered(budget)[:, None], thieved_classifier=Clone(answer, (1,), classes))
    return taken[0]


def adaptive(pool: Pool, ask: Ask, budget: int, seed: int, student: Student) -> Theft:
    """KnockoffNets' adaptive strategy: a gradient bandit learns from which of the pool's classes answers are worth most.

    The reward is the paper's: certain answers, answers unlike those before, and answers that the clone gets wrong, each
    measured against what was usual so far.
    """
    chance = np.random.default_rng(seed)
    offered = chance.permutation(pool.offered(budget))
    classes = np.unique(pool.kinds)
    left = {kind: list(offered[pool.kinds[offered] == kind]) for kind in classes}
    preference, drawn = np.zeros(len(classes)), np.zeros(len(classes))
    online = student.fresh(pool.images, pool.exact.shape[1], seed)[0]
    optimiser = torch.optim.SGD(online.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    asked: list[int] = []
    history = np.zeros((0, 3))
    mean_answer = np.zeros(pool.exact.shape[1])
    while len(asked) < budget:
        arms, rows = _draw(left, preference, classes, min(ROUND, budget - len(asked)), chance)
        answers = ask(pool.exact[rows])
        history = np.concatenate(
            [history, _rewards(answers, mean_answer, _follow(online, optimiser, pool.images[rows], answers))]
        )
        usual = (history - history.mean(axis=0)) / (history.std(axis=0) + 1e-9)
        rewards = usual[-len(rows) :].mean(axis=1)
        likely = np.exp(preference - preference.max())
        likely /= likely.sum()
        for arm, reward in zip(arms, rewards, strict=True):
            drawn[arm] += 1
            preference += reward / drawn[arm] * ((np.arange(len(classes)) == arm) - likely)
        asked += rows
        mean_answer += (answers.mean(axis=0) - mean_answer) * len(rows) / len(asked)
    images, exact = pool.images[asked], pool.exact[asked]
    return Theft(images, exact, student.learn(images, ask(exact), seed))


def _draw(
    left: dict[int, list[int]], preference: np.ndarray, classes: np.ndarray, count: int, chance: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return the classes' positions and the images of one round; classes that are used up are passed over."""
    arms, rows = [], []
    for _ in range(count):
        open_ = np.array([bool(left[kind]) for kind in classes])
        weights = np.where(open_, np.exp(np.minimum(preference - preference[open_].max(), 0)), 0)
        arm = int(chance.choice(len(classes), p=weights / weights.sum()))
        arms.append(arm)
        rows.append(int(left[classes[arm]].pop()))
    return arms, rows


def _follow(online: Alone, optimiser: torch.optim.Optimizer, images: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return how wrong the clone that learns meanwhile is on each of a round's images, and let it learn from them."""
    pixels = (torch.from_numpy(images).float() / 255).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        losses = F.cross_entropy(online.train()(pixels), torch.from_numpy(answers).float(), reduction="none")
    optimiser.zero_grad()
    losses.mean().backward()
    optimiser.step()
    return losses.detach().numpy()


def _rewards(answers: np.ndarray, mean_answer: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return certainty, difference and loss of each answer, ``(N, 3)``."""
    top = np.sort(answers, axis=1)
    return np.stack([top[:, -1] - top[:, -2], np.maximum(answers - mean_answer, 0).sum(axis=1), losses], axis=1)


def augmenting(pool: Pool, ask: Ask, budget: int, seed: int, student: Student, predict: Ask) -> Theft:
    """JBDA, top 3: from few photos, new ones are made along the clone's gradient, toward its three likeliest classes.

    Args:
        pool: Of which up to 150 images are the photos.
        ask: See :data:`Ask`.
        budget: Queries.
        seed: Decides the photos and everything else.
        student: How clones are trained; those in between with a quarter of the epochs.
        predict: The model's exact probabilities of images, since what is asked here is not of the pool.
    """
    chance = np.random.default_rng(seed)
    rows = chance.permutation(pool.plain)[: min(SEEDS, budget)]
    images, exact = pool.images[rows], pool.exact[rows]
    while len(images) < budget:
        made = _toward(student.learn(images, ask(exact), seed, share=0.25), images, top=min(3, exact.shape[1]))
        made = made[chance.permutation(len(made))[: budget - len(images)]]
        images, exact = np.concatenate([images, made]), np.concatenate([exact, predict(made)])
    return Theft(images, exact, student.learn(images, ask(exact), seed))


def _toward(clone: Alone, images: np.ndarray, top: int) -> np.ndarray:
    """Return every image moved toward each of the clone's ``top`` likeliest classes, ``(top N, 3, H, W)`` uint8."""
    made = []
    clone.requires_grad_(False)
    for start in range(0, len(images), 128):
        part = torch.from_numpy(images[start : start + 128]).float() / 255
        leaf = part.contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            likeliest = clone(leaf).topk(top).values  # (B, top)
        for rank in range(top):
            (gradient,) = torch.autograd.grad(likeliest[:, rank].sum(), leaf, retain_graph=rank < top - 1)
            moved = images[start : start + 128] + STEP * gradient.sign().numpy()
            made.append(np.clip(np.rint(moved), 0, 255).astype(np.uint8))
    return np.concatenate(made)
