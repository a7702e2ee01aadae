"""One stage of training: the loop that pre-training and joint training share."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.augmentation import crop_and_flip, to_float
from training.data import Split
from training.optimiser import Optimiser
from training.recipe import Schedule
from training.run_folder import RunFolder

LOG_EVERY = 20
SAVE_EVERY = 100
COLLAPSE = 0.6
"""An epoch whose held-out robust accuracy is below this share of the best so far counts as collapsed."""

Values = dict[str, float | list[float]]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[torch.Tensor, Values]]


@dataclass(frozen=True)
class Stage:
    """What one stage trains and how it is judged.

    Attributes:
        name: Names the stage's state file and log lines.
        module: The network; trained in place.
        schedule: How long and how fast.
        loss: Images ``(B, 3, H, W)`` in ``[0, 1]``, labels ``(B,)`` and a generator to a scalar loss and values to log.
        validate: A network to held-out figures; ``robust`` (in ``[0, 1]``), if present, is watched for collapse.
        seed: Everything random in the stage follows from it and the step's number.
        settings: What the stage's result depends on, as JSON values; a saved state with other settings is refused.
    """

    name: str
    module: nn.Module
    schedule: Schedule
    loss: Loss
    validate: Callable[[nn.Module], Values]
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


def run_stage(stage: Stage, data: Split, folder: RunFolder, device: torch.device) -> nn.Module:
    """Train to the end of the schedule and return the averaged network, in eval mode.

    Killed at any point and started again with the same folder, it goes on from the last saved step and, on the same hardware,
    ends with the same weights as an unbroken run: the randomness of a step is a function of the seed and the step's number.
    """
    schedule, module = stage.schedule, stage.module
    steps_per_epoch = len(data) // schedule.batch_size
    steps = total_steps(schedule, len(data))
    progress = _Progress(module, Optimiser(module, schedule), _averaged(module))
    first = progress.restore(folder, stage)
    generator = torch.Generator()
    bar = tqdm(total=steps, initial=first, desc=stage.name, unit="step", dynamic_ncols=True, mininterval=2)
    for step in range(first, steps):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == first:
            order = torch.randperm(len(data), generator=generator.manual_seed(_seed(stage.seed, epoch, 0)))
        generator.manual_seed(_seed(stage.seed, step, 1))
        batch = data.take(order[position * schedule.batch_size : (position + 1) * schedule.batch_size])
        images = to_float(crop_and_flip(batch.images, generator), device)
        module.train()
        loss, values = stage.loss(images, batch.labels.to(device), generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{stage.name}: the loss is {loss.item()} at step {step}: lower peak_lr")
        loss.backward()
        lr = learning_rate(schedule, step, steps)
        progress.optimiser.step(lr)
        progress.average(schedule.ema_decay, step)
        bar.update()
        if step % LOG_EVERY == 0:
            folder.log(stage.name, step, loss=loss.item(), lr=lr, **values)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if position + 1 == steps_per_epoch or step + 1 == steps:
            _end_epoch(stage, progress, folder, step + 1)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            progress.save(folder, stage, step + 1)
    bar.close()
    return progress.ema.eval()


def _end_epoch(stage: Stage, progress: _Progress, folder: RunFolder, step: int) -> None:
    figures = stage.validate(progress.ema.eval())
    folder.log(stage.name, step, **{f"holdout_{name}": value for name, value in figures.items()})
    shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items() if isinstance(v, float))
    tqdm.write(f"{stage.name}: step {step}: held-out {shown}")
    robust = figures.get("robust")
    if not isinstance(robust, float):
        return
    if robust < COLLAPSE * progress.best_robust:
        tqdm.write(f"{stage.name}: robust accuracy collapsed from {progress.best_robust:.3f} to {robust:.3f}: rolled back")
        folder.log(stage.name, step, event="rollback", robust=robust, best_robust=progress.best_robust)
        progress.roll_back()
    elif robust >= progress.best_robust:
        progress.keep(robust)


def _seed(seed: int, number: int, purpose: int) -> int:
    return (seed * 1_000_003 + number) * 2 + purpose


def _averaged(module: nn.Module) -> nn.Module:
    ema = copy.deepcopy(module)
    ema.requires_grad_(False)
    return ema


class _Progress:
    """All that a stage changes: weights, averaged weights, momentum, and the best weights to roll back to."""

    def __init__(self, module: nn.Module, optimiser: Optimiser, ema: nn.Module) -> None:
        self.module, self.optimiser, self.ema = module, optimiser, ema
        self.best_robust = 0.0
        self._best: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def average(self, decay: float, step: int) -> None:
        """Move the averaged weights towards the current ones; early steps count more, so that no start lingers."""
        decay = min(decay, (1 + step) / (10 + step))
        averaged, current = self.ema.state_dict(), self.module.state_dict()
        for name, value in averaged.items():
            if value.is_floating_point():
                value.lerp_(current[name], 1 - decay)
            else:
                value.copy_(current[name])

    def keep(self, robust: float) -> None:
        self.best_robust = robust
        self._best = {name: value.clone() for name, value in self.ema.state_dict().items()}

    def roll_back(self) -> None:
        self.module.load_state_dict(self._best)
        self.ema.load_state_dict(self._best)
        for momentum in self.optimiser.state().values():  # it points to where the collapse came from
            momentum.zero_()

    def save(self, folder: RunFolder, stage: Stage, step: int) -> None:
        groups = {
            "module": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state(),
            "best": self._best,
        }
        tensors = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
        folder.save(stage.name, tensors, {"step": step, "best_robust": self.best_robust, "settings": stage.settings})

    def restore(self, folder: RunFolder, stage: Stage) -> int:
        """Take over a saved state, if there is one, and return the next step's number."""
        saved = folder.load(stage.name)
        if saved is None:
            return 0
        tensors, counters = saved
        if counters["settings"] != json.loads(json.dumps(stage.settings)):
            raise ValueError(f"{folder.path} holds '{stage.name}' trained with other settings: choose a new --run folder")
        groups: dict[str, dict[str, torch.Tensor]] = {"module": {}, "ema": {}, "optimiser": {}, "best": {}}
        for key, value in tensors.items():
            group, _, rest = key.partition("/")
            groups[group][rest] = value
        self.module.load_state_dict(groups["module"])
        self.ema.load_state_dict(groups["ema"])
        self.optimiser.load_state(groups["optimiser"])
        device = next(self.module.parameters()).device
        self._best = {key: value.to(device) for key, value in groups["best"].items()}
        self.best_robust = counters["best_robust"]
        return int(counters["step"])
