"""The plan of a run: its stages with an estimate of time and memory, measured on a few steps that are thrown away."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable

import torch

from training.data import Split
from training.stage import Stage, Trainer
from training.worker import Worker

TIMED_STEPS = 3


def plan(stages: Iterable[tuple[Stage, Split]], worker: Worker) -> str:
    """Return a table of the stages, given with their training images: steps, seconds per step, minutes, and the peak of memory.

    Experts of one family with one schedule cost the same, so only the first of them is tried.
    """
    measured: dict[str, tuple[float, float]] = {}
    lines = ["| stage | steps | s/step | minutes | memory, MiB |", "|---|---|---|---|---|"]
    total = 0.0
    for stage, data in stages:
        trainer = Trainer(stage, data, worker)
        kind = repr((stage.settings.get("expert", stage.name), stage.settings.get("schedule")))
        if kind not in measured:
            measured[kind] = _try(trainer, worker)
        seconds, memory = measured[kind]
        minutes = seconds * trainer.steps / 60
        total += minutes
        lines.append(f"| {stage.name} | {trainer.steps} | {seconds:.3f} | {minutes:.1f} | {memory:.0f} |")
    lines.append(f"| all | | | {total:.1f} | |")
    where = "of the GPU" if worker.device.type == "cuda" else "of the process"
    lines.append(
        f"\nFrom {TIMED_STEPS} steps of each kind on {worker.device}; judging on held-out images not counted. Memory {where}."
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
    started = time.perf_counter()
    for step in range(1, 1 + TIMED_STEPS):
        trainer.step(step)
    if cuda:
        torch.cuda.synchronize(worker.device)
    seconds = (time.perf_counter() - started) / TIMED_STEPS
    peak = torch.cuda.max_memory_allocated(worker.device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, peak / 2**20
