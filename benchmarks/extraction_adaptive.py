"""What thieves do about the defences, for benchmarks.extraction: guess probabilities, average repeats, use many identities."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from benchmarks.budgets import row, span
from benchmarks.detection_callers import Predict
from benchmarks.extraction_victim import shown
from service.answers import AnswerCache, digest
from service.policy import Policy
from service.settings import SUSPECT, Settings

SIMULATED = 20_000
NEIGHBOURS = 20
BATCH_SIZES = (1, 2, 5, 8, 16, 33, 64)
"""In how large batches a repeated image rides: its exact answer differs with them in the last bits."""


def recovery(policy: Policy, classes: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what guesses exact probabilities from answers under a policy that the thief knows.

    The thief makes up plausible probabilities, from very sure to very unsure, passes them through the policy, and takes the
    mean of those whose answers come closest to the one received. Only sorted values are compared: the policies do not know
    the classes apart. Classes that the answer does not tell apart get the same guess.

    Args:
        policy: The service's, which its documentation tells.
        classes: ``C``.
        seed: Of what is made up.
    """
    chance = np.random.default_rng(seed)
    sharpness = np.exp(chance.uniform(np.log(0.2), np.log(8), (SIMULATED, 1)))
    scores = np.exp(sharpness * chance.normal(size=(SIMULATED, classes)))
    plausible = -np.sort(-scores / scores.sum(axis=1, keepdims=True), axis=1)  # (S, C), largest first
    simulated = -np.sort(-shown(policy, plausible), axis=1)

    def recover(answers: np.ndarray) -> np.ndarray:
        order = np.argsort(-answers, axis=1, kind="stable")
        guesses = np.empty_like(answers)
        for start in range(0, len(answers), 250):
            rows = slice(start, start + 250)
            asked = np.take_along_axis(answers[rows], order[rows], axis=1)
            distance = (simulated**2).sum(axis=1) - 2 * asked @ simulated.T  # (B, S), less what is the same for all
            nearest = np.argpartition(distance, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
            np.put_along_axis(guesses[rows], order[rows], plausible[nearest].mean(axis=1), axis=1)
        alike = answers[:, :, None] == answers[:, None, :]  # (N, C, C)
        return np.asarray((alike * guesses[:, None, :]).sum(axis=2) / alike.sum(axis=2))

    return recover


def repeats(predict: Predict, images: np.ndarray, policy: Policy, times: int, seed: int) -> dict[str, float]:
    """Return what asking again and averaging brings: the L1 distance of the mean answer from the exact one.

    Each image is asked ``times`` times, in batches of different sizes: with the answer cache, as the service has it, without,
    and, with it, as near copies (each value moved by at most one level), which the cache can't know to be the same.

    Args:
        predict: The model.
        images: ``(N, 3, H, W)`` uint8.
        policy: What leaves.
        times: How often.
        seed: Of the batches and the near copies.
    """
    exact = predict(images).astype(np.float64)

    def distance(answers: np.ndarray) -> float:
        return float(np.abs(answers - exact).sum(axis=1).mean())

    found = {"times": float(times), "one_answer": distance(shown(policy, exact))}
    for name, capacity, moved in (("cached", 10_000, 0), ("not_cached", 0, 0), ("near_copies", 10_000, 1)):
        chance, cache = np.random.default_rng(seed), AnswerCache(capacity)
        rounds = []
        for number in range(times):
            noise = chance.integers(-moved, moved + 1, images.shape)
            asked = np.clip(images.astype(np.int16) + noise, 0, 255).astype(np.uint8)
            rounds.append(shown(policy, _served(predict, cache, asked, BATCH_SIZES[number % len(BATCH_SIZES)])))
        answers = np.stack(rounds)  # (T, N, C)
        found[name] = distance(answers.mean(axis=0))
        found[f"{name}_differing_share"] = float((answers != answers[0]).any(axis=(0, 2)).mean())
    return found


def _served(predict: Predict, cache: AnswerCache, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Return the exact answers as the service's scheduler does: from the cache what it has, the rest in batches."""
    keys = [digest(image) for image in images]
    unknown = [number for number, key in enumerate(keys) if cache.get(key) is None]
    rows: dict[int, np.ndarray] = {}
    for start in range(0, len(unknown), batch_size):
        batch = unknown[start : start + batch_size]
        rows |= {number: cache.keep(keys[number], row) for number, row in zip(batch, predict(images[batch]), strict=True)}
    return np.stack([rows[number] if number in rows else cache.get(key) for number, key in enumerate(keys)])  # type: ignore[misc]


def price(budgets: list[int], before: int) -> str:
    """Return a Markdown table of what splitting over identities costs: their answers are the same, so this is all.

    Args:
        budgets: Answers wanted.
        before: Images after which an identity is left, before the detectors suspect it.
    """
    lines = [
        f"| answers | tier | one identity | identities for one day | identities of {before} images, never suspected |",
        "|---|---|---|---|---|",
    ]
    for tier, policy in Settings().policies().items():
        for answers in budgets if tier != SUSPECT else []:
            cost = asyncio.run(row(policy.windows, answers))
            lines.append(
                f"| {answers} | {tier} | {span(cost['one_identity_s'])} | {cost['identities_day']} | {-(-answers // before)} |"
            )
    return "\n".join(lines)
