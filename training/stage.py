"""One stage of training: the loop that pre-training and joint training share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training.augmentation import crop_and_flip, cutmix, idbh, mixup, to_float
from training.data import Split
from training.progress import Progress
from training.recipe import Schedule
from training.run_folder import RunFolder
from training.task import Task, Terms
from training.weight_perturbation import ascended
from training.worker import StopRequested, Worker

LOG_EVERY = 20
SAVE_EVERY = 100
SAVE_SECONDS = 30.0
"""A state is saved after so many steps, but no sooner than so long after the last: a GPU is faster than its disk."""
TRIM_FROM = 0.3
"""Share of the steps after which losses are trimmed: before, a high loss says more about the network than about the sample."""
JUDGEMENTS = 4
"""A stage of fewer epochs is judged so many times instead, or a collapse would have nothing to be rolled back to."""


@dataclass(frozen=True)
class Stage:
    """What one stage trains, and from which seed.

    Attributes:
        name: Names the stage's state file and log lines.
        task: What is trained; its network is changed in place.
        num_classes: Number of classes ``C``.
        seed: Everything random in the stage follows from it and the step's number.
        settings: What the stage's result depends on, as JSON values; a saved state with other settings is refused.
    """

    name: str
    task: Task
    num_classes: int
    seed: int
    settings: dict[str, Any]


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """Return the one-cycle learning rate of step ``step`` of ``steps``: linear up, then linear down."""
    done = step / steps
    if done < schedule.warmup:
        return schedule.peak_lr * (step + 1) / (schedule.warmup * steps + 1)
    falling = (done - schedule.warmup) / (1 - schedule.warmup)
    return schedule.peak_lr * (1 - falling * (1 - schedule.final_lr))


def total_steps(schedule: Schedule, images: int) -> int:
    """Return the number of steps of a stage on ``images`` images; raise ``ValueError`` when they don't fill a batch."""
    if images < schedule.batch_size:
        raise ValueError(f"{images} training images do not fill one batch of {schedule.batch_size}: lower batch_size")
    return math.ceil(schedule.epochs * (images // schedule.batch_size))


def run_stage(stage: Stage, data: Split, folder: RunFolder, worker: Worker) -> nn.Module:
    """Train to the end of the schedule and return the averaged network, in eval mode.

    Killed at any point and started again with the same folder, it goes on from the last saved step and, on the same hardware,
    ends with the same weights as an unbroken run: the randomness of a step is a function of the seed and the step's number.

    Raises:
        StopRequested: The worker was asked to stop; the state is saved.
        FloatingPointError: The loss became infinite or NaN.
        ValueError: The folder holds a state of other settings, or the workers' folders differ.
    """
    with worker.stop.listening():
        return _run_stage(stage, data, folder, worker)


def _run_stage(stage: Stage, data: Split, folder: RunFolder, worker: Worker) -> nn.Module:
    trainer = Trainer(stage, data, worker)
    progress, steps = trainer.progress, trainer.steps
    first = progress.restore(folder)
    if worker.agreed(first) != first:
        raise ValueError(f"{folder.path}: this worker's state is at step {first}, another's is not: share the run folder")
    saved = time.monotonic()
    bar = tqdm(
        total=steps,
        initial=first,
        desc=stage.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=2,
        disable=not worker.first,
    )
    with bar:
        for step in range(first, steps):
            loss, terms = trainer.step(step)
            bar.update()
            if step % LOG_EVERY == 0 and worker.first:
                _log(stage, folder, step, loss, terms, trainer.rate(step))
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            done = step + 1
            if trainer.judged(done):
                _judge(stage, progress, folder, done, worker)
            reason = worker.agreed(worker.stop.reason) if done < steps else None
            due = done % SAVE_EVERY == 0 and time.monotonic() - saved >= SAVE_SECONDS
            if done < steps and worker.first and (reason or due):
                progress.save(folder, done)
                saved = time.monotonic()
            if reason:
                worker.wait()
                raise StopRequested(reason)
        if first < steps:
            progress.finish(folder, steps, write=worker.first)
            worker.wait()
    return progress.averaged.eval()


class Trainer:
    """Takes the steps of one stage.

    Args:
        stage: What to train.
        data: The training images; kept on the worker's device.
        worker: Where to train.

    Raises:
        ValueError: The batch can't be divided as the schedule and the number of workers ask.
    """

    def __init__(self, stage: Stage, data: Split, worker: Worker) -> None:
        self._stage, self._worker, self._schedule = stage, worker, stage.task.schedule
        self._parts = worker.count * self._schedule.accumulate
        if self._schedule.batch_size % self._parts:
            raise ValueError(
                f"batch_size {self._schedule.batch_size} can't be divided among {worker.count} workers that each accumulate "
                f"{self._schedule.accumulate}: choose a multiple of {self._parts}"
            )
        self.steps_per_epoch = len(data) // self._schedule.batch_size
        self.steps = total_steps(self._schedule, len(data))
        self.progress = Progress(stage.task.network, self._schedule, stage.name, stage.settings)
        self._data = data.to(worker.device)
        self._choices, self._noise = torch.Generator(), torch.Generator(worker.device)
        self._epoch, self._order = -1, torch.empty(0)
        if worker.compile:
            for expert in stage.task.experts():
                expert.compile(dynamic=False)  # attacks and updates have batches of two sizes, each worth its own code
        self._parallel = worker.parallel(stage.task)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(self._schedule, step, self.steps)

    def judged(self, done: int) -> bool:
        """Tell whether to judge after so many steps: after each epoch and at the end, or where those are few, each quarter."""
        if self.steps < JUDGEMENTS * self.steps_per_epoch:
            return done * JUDGEMENTS // self.steps > (done - 1) * JUDGEMENTS // self.steps
        return done % self.steps_per_epoch == 0 or done == self.steps

    def step(self, step: int) -> tuple[torch.Tensor, Terms]:
        """Take one step and return the loss and its terms, of this worker's last part of the batch."""
        images, targets = self._batch(step)
        self._stage.task.trim = self._schedule.trim if step >= TRIM_FROM * self.steps else 0.0
        self._stage.task.iterated = self.progress.rollbacks > 0
        self._stage.task.train()
        parts = list(self._attacked(images, targets, step))
        loss, terms = self._gradients(parts)
        if self._looks(step) and not torch.isfinite(loss):
            raise FloatingPointError(f"{self._stage.name}: the loss is {loss.item()} at step {step}: lower peak_lr")
        if self._schedule.weight_perturbation:
            with ascended(self._stage.task.network, self._schedule.weight_perturbation):
                self._gradients(parts)
        self.progress.optimiser.step(self.rate(step))
        self._worker.share_statistics(self._stage.task.network)
        self.progress.average(step, self.steps)
        return loss, terms

    def _looks(self, step: int) -> bool:
        """Tell whether to look at a step's loss: always, but on a GPU, which would wait, only before something is kept."""
        done = step + 1
        kept = done % SAVE_EVERY == 0 or self.judged(done)
        return self._worker.device.type == "cpu" or step % LOG_EVERY == 0 or kept

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole step's augmented images and targets; every worker draws the same."""
        schedule = self._schedule
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(len(self._data), generator=self._choices.manual_seed(self._seed(epoch, 0)))
            self._epoch, self._order = epoch, order.to(self._worker.device)
        batch = self._data.take(self._order[position * schedule.batch_size : (position + 1) * schedule.batch_size])
        generator = self._noise.manual_seed(self._seed(step, 1))
        images = (idbh if schedule.augmentation == "idbh" else crop_and_flip)(batch.images, generator)
        targets = batch.labels
        if schedule.cutmix:
            images, targets = cutmix(images, targets, self._stage.num_classes, schedule.cutmix, generator)
        elif schedule.mixup:
            images, targets = mixup(images, targets, self._stage.num_classes, schedule.mixup, generator)
        return to_float(images, self._worker.device), targets

    def _attacked(
        self, images: torch.Tensor, targets: torch.Tensor, step: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield attacked images, clean images and targets of this worker's parts of a batch.

        A part's noise follows from its number in the batch, so that two workers and one that accumulates twice do the same.
        """
        accumulate = self._schedule.accumulate
        first = self._worker.rank * accumulate
        shares = list(zip(images.chunk(self._parts), targets.chunk(self._parts), strict=True))
        for number, (clean, labels) in enumerate(shares[first : first + accumulate], start=first):
            self._choices.manual_seed(self._seed(step, 2))
            self._noise.manual_seed(self._seed(step, 3 + number))
            if self._stage.task.teacher is not None:
                with self._stage.task.autocast():
                    labels = self._stage.task.teacher.soften(clean, labels)
            yield self._stage.task.attack(clean, labels, self._choices, self._noise), clean, labels

    def _gradients(self, parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, Terms]:
        """Add up the gradients of all parts, averaged over the workers, and return the last part's loss and terms."""
        for number, part in enumerate(parts, start=1):
            with self._held_back() if number < len(parts) else nullcontext():
                loss, terms = self._parallel(*part)
                (loss / len(parts)).backward()
        return loss.detach(), terms

    def _held_back(self) -> AbstractContextManager[None]:
        """Return the context in which gradients are added up, but not yet averaged over the workers."""
        if isinstance(self._parallel, DistributedDataParallel):
            held_back: AbstractContextManager[None] = self._parallel.no_sync()
            return held_back
        return nullcontext()

    def _seed(self, number: int, purpose: int) -> int:
        return ((self._stage.seed * 1_000_003 + number) * 1024 + purpose) % 2**63


def _log(stage: Stage, folder: RunFolder, step: int, loss: torch.Tensor, terms: Terms, rate: float) -> None:
    values: dict[str, float | list[float]] = {name: term.tolist() for name, term in terms.items()}
    folder.log(stage.name, step, loss=loss.item(), lr=rate, **values)


def _judge(stage: Stage, progress: Progress, folder: RunFolder, step: int, worker: Worker) -> None:
    figures = worker.agreed(stage.task.judge(progress.averaged.eval()) if worker.first else {})
    robust = figures.get("robust")
    collapsed = robust is not None and progress.judge(robust, len(stage.task.holdout))
    if not worker.first or not figures:
        return
    folder.log(stage.name, step, **{f"holdout_{name}": value for name, value in figures.items()})
    tqdm.write(f"{stage.name}: step {step}: held-out {', '.join(f'{k} {v:.3f}' for k, v in figures.items())}")
    if robust is not None and collapsed:
        best = progress.best_robust
        fell = f"robust accuracy collapsed from {best:.3f} to {robust:.3f}"
        tqdm.write(f"{stage.name}: {fell}: rolled back; attacks of one step take two from now on")
        folder.log(stage.name, step, event="rollback", robust=robust, best_robust=best)
