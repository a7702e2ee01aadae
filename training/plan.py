"""The plan of a run: its stages with an estimate of time and memory, measured on a few steps that are thrown away."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from training.data import Split
from training.stage import Stage, Trainer, total_steps
from training.worker import Worker

TIMED_STEPS = {"cpu": 3, "cuda": 20}
"""Steps differ in how many an attack takes; a GPU has time for a mean."""


class Cost(NamedTuple):
    """What a stage takes.

    Attributes:
        name: The stage's.
        steps: How many.
        seconds: Of a step.
        memory: The highest in use, in MiB.
    """

    name: str
    steps: int
    seconds: float
    memory: float

    @property
    def minutes(self) -> float:
        """Of the whole stage, judging on held-out images not counted."""
        return self.seconds * self.steps / 60


def costs(stages: Iterable[tuple[Stage, Split]], worker: Worker) -> Iterator[Cost]:
    """Yield what each stage takes on the data that stand beside it.

    Experts of one family with one schedule cost the same, so only the first of them is tried.
    """
    measured: dict[str, tuple[float, float]] = {}
    for stage, data in stages:
        kind = repr((stage.settings.get("expert", stage.name), stage.settings.get("schedule")))
        if kind not in measured:
            measured[kind] = _try(Trainer(stage, data, worker), worker)
        yield Cost(stage.name, total_steps(stage.task.schedule, len(data)), *measured[kind])


def plan(stages: Iterable[tuple[Stage, Split]], worker: Worker) -> str:
    """Return a table of :func:`costs`."""
    lines = ["| stage | steps | s/step | minutes | memory, MiB |", "|---|---|---|---|---|"]
    total = 0.0
    for cost in costs(stages, worker):
        total += cost.minutes
        lines.append(f"| {cost.name} | {cost.steps} | {cost.seconds:.3f} | {cost.minutes:.1f} | {cost.memory:.0f} |")
    lines.append(f"| all | | | {total:.1f} | |")
    where = "of the GPU" if worker.device.type == "cuda" else "of the process"
    lines.append(
        f"\nFrom {TIMED_STEPS[worker.device.type]} steps of each kind on {worker.device}; judging on held-out images not "
        f"counted. Memory {where}."
    )
    return "\n".join(lines)


def _try(trainer: Trainer, worker: Worker) -> tuple[float, float]:
    """Return seconds per step and the peak of memory in MiB."""
    cuda = worker.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(worker.device)
    trainer.step(0)  # the first step allocates, and compiles
    if cuda:
        torch.cuda.synchronize(worker.device)
    started, steps = time.perf_counter(), TIMED_STEPS[worker.device.type]
    for step in range(1, 1 + steps):
        trainer.step(step)
    if cuda:
        torch.cuda.synchronize(worker.device)
    seconds = (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_allocated(worker.device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, peak / 2**20
