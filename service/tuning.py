"""Tuning: executions are timed in turns, judged against the reference, and the fastest that agree are chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture import Architecture
from model.certificate import read_means, read_votes
from model.execution import TOLERANCE
from model.plan import ExecutionName, Plan
from service.stopwatch import Stopwatch

NEGLIGIBLE = 0.03
"""A plan of fewer executions is preferred while it is slower by less than this share at every batch size."""

MOST_POINTS_LOST = 0.3
"""int8 is accepted if its accuracy, clean and under attack, is lower than float32's by at most so many percentage points."""

PAUSE_S = 0.02  # after a turn: threads that still spin in one process would slow the next one's

Answers = Mapping[str, npt.NDArray[np.float32]]
Rates = Mapping[str, Mapping[int, Sequence[float]]]


@dataclass(frozen=True)
class Agreement:
    """How near an execution's answers are to the float32 reference's.

    Attributes:
        largest: The largest difference of a probability.
        clear_labels_differ: Images whose label differs although the reference's two top probabilities are further apart than
            twice the tolerance; of a vote, images whose label differs without a vote that does.
        n: Images compared.
        votes_differ: Of a vote, the share of all votes that went to another class, as they do where an expert's two top
            probabilities are nearly equal.
    """

    largest: float
    clear_labels_differ: int
    n: int
    votes_differ: float = 0.0

    @classmethod
    def between(
        cls, name: str, answers: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], voters: int = 0
    ) -> Agreement:
        """Compare an execution's probabilities ``(N, C)`` with the reference's.

        Of ``voters`` voting experts the means of the experts' probabilities and the votes are compared each on its own: where a
        vote is open, rounding may decide it, and that moves the answer by more than any tolerance.
        """
        if voters:
            return cls._between_votes(answers, reference, voters)
        top = np.sort(reference, axis=1)
        clear = top[:, -1] - top[:, -2] > 2 * tolerance(name)
        differ = answers.argmax(axis=1) != reference.argmax(axis=1)
        return cls(float(np.abs(answers - reference).max()), int((clear & differ).sum()), len(reference))

    @classmethod
    def _between_votes(cls, answers: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], voters: int) -> Agreement:
        means, expected = (read_means(side, voters) for side in (answers, reference))
        moved = np.abs(read_votes(answers, voters) - read_votes(reference, voters)).sum(axis=1) / 2  # (N,) votes
        # Of equal votes the mean decides, so that an open mean may decide otherwise.
        differ = (answers.argmax(axis=1) != reference.argmax(axis=1)) & (moved == 0)
        top = np.sort(read_votes(reference, voters), axis=1)
        differ &= top[:, -1] > top[:, -2]
        return cls(
            float(np.abs(means - expected).max()), int(differ.sum()), len(reference), float(moved.sum() / (voters * len(moved)))
        )

    def holds(self, name: str) -> bool:
        """Tell whether the answers are within the tolerance of the execution's precision.

        An expert's vote is open where its two top probabilities differ by less than twice the tolerance; how often that is
        depends on the images. As many votes may differ as would be open if all differences were equally frequent.
        """
        near = self.largest <= tolerance(name) and self.votes_differ <= 2 * tolerance(name)
        return near and not self.clear_labels_differ


def tolerance(name: str) -> float:
    """Return how far an execution's probabilities may be from the reference's."""
    return TOLERANCE[ExecutionName.parse(name).precision]


def probe(architecture: Architecture, count: int = 65) -> npt.NDArray[np.uint8]:
    """Return random images ``(count, 3, H, W)`` uint8: patches of colour under noise, strong on half of them, else faint."""
    generator = np.random.default_rng(0)
    height, width = architecture.height, architecture.input_width
    coarse = generator.random((count, 3, 4, 4))
    patches = coarse.repeat(-(-height // 4), axis=2).repeat(-(-width // 4), axis=3)[:, :, :height, :width]
    strength = np.where(np.arange(count) % 2, 0.5, 0.1).reshape(-1, 1, 1, 1)
    noise = generator.random((count, 3, height, width))
    return ((1 - strength) * patches * 255 + strength * noise * 255).astype(np.uint8)


@dataclass(frozen=True)
class Judgement:
    """What int8 does to accuracy.

    Attributes:
        n: Images judged by, none of which the model was calibrated on.
        percent: Accuracy in percent by images (``clean``, ``attacked``) and execution (``float32``, ``int8``).
    """

    n: int
    percent: dict[str, dict[str, float]]

    @classmethod
    def between(cls, labels: npt.NDArray[np.int64], float32: Answers, int8: Answers) -> Judgement:
        """Compare answers, probabilities ``(N, C)`` for the clean and the attacked images, with the labels ``(N,)``."""
        percent = {}
        for images in float32:
            right = {
                name: (side[images].argmax(axis=1) == labels).mean() for name, side in (("float32", float32), ("int8", int8))
            }
            percent[images] = {name: round(100 * float(share), 2) for name, share in right.items()}
        return cls(len(labels), percent)

    @property
    def accepted(self) -> bool:
        """Whether accuracy is lost by no more than :data:`MOST_POINTS_LOST`."""
        return all(row["float32"] - row["int8"] <= MOST_POINTS_LOST + 1e-9 for row in self.percent.values())

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {row['int8']:.2f} % (float32: {row['float32']:.2f} %)" for name, row in self.percent.items())
        verdict = "accepted" if self.accepted else f"not accepted, as more than {MOST_POINTS_LOST} points are lost"
        return f"int8 is right on {shown}, n = {self.n}: {verdict}"


def measure(
    stopwatches: Sequence[Stopwatch], batch_sizes: Sequence[int], seconds: float, rounds: int, tick: Callable[[str], object]
) -> dict[str, dict[int, list[float]]]:
    """Let executions take turns and return each one's images/s, one figure a round, by batch size.

    Args:
        stopwatches: The executions.
        batch_sizes: Images per batch.
        seconds: How long a turn takes.
        rounds: How often each has its turn at each batch size.
        tick: Called with the execution's name after every turn.
    """
    rates: dict[str, dict[int, list[float]]] = {watch.name: {batch: [] for batch in batch_sizes} for watch in stopwatches}
    for _ in range(rounds):
        for batch in batch_sizes:
            for watch in stopwatches:
                rates[watch.name][batch].append(watch.rate(batch, seconds))
                tick(watch.name)
                time.sleep(PAUSE_S)
    return rates


def choose(rates: Rates) -> dict[str, Plan]:
    """Return the fastest plan of each precision, by the median rates.

    At every batch size a plan is at most :data:`NEGLIGIBLE` slower than the fastest execution, and it has as few different
    executions as that allows.
    """
    plans = {}
    for precision in TOLERANCE:
        names = [name for name in rates if ExecutionName.parse(name).precision == precision]
        if names:
            plans[precision] = _choose({name: {batch: median(v) for batch, v in rates[name].items()} for name in names})
    return plans


def fastest(plans: Mapping[str, Plan], rates: Rates) -> str:
    """Return the precision whose plan has the largest geometric mean of images/s over the batch sizes."""

    def speed(plan: Plan) -> float:
        return sum(log(median(rates[plan.pick(batch)][batch])) for batch in next(iter(rates.values())))

    return max(plans, key=lambda precision: speed(plans[precision]))


def _choose(rates: Mapping[str, Mapping[int, float]]) -> Plan:
    batches = sorted(next(iter(rates.values())))
    best = {batch: max(row[batch] for row in rates.values()) for batch in batches}

    def speed(names: Sequence[str]) -> float:
        return sum(log(max(rates[name][batch] for name in names)) for batch in batches)

    for count in range(1, len(rates) + 1):
        enough = [
            names
            for names in combinations(rates, count)
            if all(max(rates[name][batch] for name in names) >= (1 - NEGLIGIBLE) * best[batch] for batch in batches)
        ]
        if enough:
            kept = max(enough, key=speed)
            return Plan.of([(batch, max(kept, key=lambda name: rates[name][batch])) for batch in batches])
    raise AssertionError("all executions together are as fast as the fastest")


def summary(rates: Rates, agreements: Mapping[str, Agreement], judgements: Mapping[str, Judgement]) -> dict[str, Any]:
    """Return what was found out as JSON values: images/s as minimum, median and maximum over the rounds."""
    return {
        "images_per_s": {
            name: {str(batch): [round(f(values), 1) for f in (min, median, max)] for batch, values in row.items()}
            for name, row in rates.items()
        },
        "largest_difference": {name: agreement.largest for name, agreement in agreements.items()},
        "accuracy": {
            name: {"n": judgement.n, "percent": judgement.percent, "accepted": judgement.accepted}
            for name, judgement in judgements.items()
        },
    }
