"""A stage's progress: weights, averaged weights, momentum, and the best weights to roll back to."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import torch
from torch import nn

from training.optimiser import Optimiser
from training.recipe import Schedule
from training.run_folder import RunFolder

COLLAPSE = 0.6
"""A held-out robust accuracy below this share of the best so far is a collapse, unless chance explains the difference."""


class Progress:
    """All that a stage changes, saved and restored exactly.

    Args:
        network: The trained network, channels-last.
        schedule: Names the optimiser and the averaging.
        name: The stage's name in the run folder.
        settings: What the stage's result depends on; a saved state with other settings is refused.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, name: str, settings: dict[str, Any]) -> None:
        self._network, self._schedule, self._name, self._settings = network, schedule, name, settings
        self.optimiser = Optimiser(network, schedule)
        self.averaged: nn.Module = copy.deepcopy(network).requires_grad_(False)
        # Looked up once: all that changes them does so in place, and walking a mixture's names takes longer than averaging it.
        pairs = list(zip(self.averaged.state_dict().values(), network.state_dict().values(), strict=True))
        self._pairs = [[pair for pair in pairs if pair[0].is_floating_point() == floating] for floating in (True, False)]
        self.best_robust = 0.0
        self.rollbacks = 0
        """How often :meth:`judge` rolled back."""
        self._best: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def average(self, step: int, steps: int) -> None:
        """Move the averaged weights towards the current ones.

        An exponential moving average whose early steps count more, so that no start lingers; from the share ``swa_from`` of
        the steps on, the plain mean of all weights since (stochastic weight averaging, Izmailov et al. 2018, algorithm 1;
        every step is averaged, and batch-norm statistics are averaged instead of measured anew).
        """
        start = math.ceil(self._schedule.swa_from * steps)
        decay = min(self._schedule.ema_decay, (1 + step) / (10 + step)) if step < start else 1 - 1 / (step - start + 1)
        (floating, towards), (counts, current) = ([list(side) for side in zip(*pairs, strict=True)] for pairs in self._pairs)
        torch._foreach_lerp_(floating, towards, 1 - decay)
        torch._foreach_copy_(counts, current)

    def judge(self, robust: float, images: int) -> bool:
        """Keep the averaged weights if they are the best so far; roll back and return ``True`` if robustness collapsed.

        Args:
            robust: Robust accuracy, in ``[0, 1]``.
            images: On so many images.
        """
        chance = 2 * math.sqrt(sum(share * (1 - share) for share in (robust, self.best_robust)) / images)  # two standard errors
        if robust < min(COLLAPSE * self.best_robust, self.best_robust - chance):
            self._network.load_state_dict(self._best)
            self.averaged.load_state_dict(self._best)
            for momentum in self.optimiser.state().values():  # it points to where the collapse came from
                momentum.zero_()
            self.rollbacks += 1
            return True
        if robust >= self.best_robust:
            self.best_robust = robust
            self._best = {name: value.clone() for name, value in self.averaged.state_dict().items()}
        return False

    def save(self, folder: RunFolder, step: int) -> None:
        """Save everything, so that training goes on as if it had not been stopped."""
        groups = {
            "module": self._network.state_dict(),
            "ema": self.averaged.state_dict(),
            "optimiser": self.optimiser.state(),
            "best": self._best,
        }
        tensors = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
        folder.save(self._name, tensors, self._counters(step))

    def finish(self, folder: RunFolder, step: int, *, write: bool) -> None:
        """Save what the next stage needs, and make the averaged weights what was saved."""
        state = slim({f"ema/{key}": value for key, value in self.averaged.state_dict().items()})
        if write:
            folder.save(self._name, state, self._counters(step))
        self.averaged.load_state_dict({key.removeprefix("ema/"): value for key, value in state.items()})

    def restore(self, folder: RunFolder) -> int:
        """Take over a saved state, if there is one, and return the next step's number.

        From a slim state (see :func:`slim`) the averaged weights are taken, without momentum.

        Raises:
            ValueError: The state belongs to other settings.
        """
        saved = folder.load(self._name)
        if saved is None:
            return 0
        tensors, counters = saved
        check_settings(folder, self._name, counters, self._settings)
        groups: dict[str, dict[str, torch.Tensor]] = {"module": {}, "ema": {}, "optimiser": {}, "best": {}}
        for key, value in tensors.items():
            group, _, rest = key.partition("/")
            groups[group][rest] = value
        self.averaged.load_state_dict(groups["ema"])
        self._network.load_state_dict(groups["module"] or groups["ema"])
        self.optimiser.load_state(groups["optimiser"])
        device = next(self._network.parameters()).device
        self._best = {key: value.to(device) for key, value in groups["best"].items()}
        self.best_robust = counters["best_robust"] if self._best else 0.0
        self.rollbacks = counters.get("rollbacks", 0)
        return int(counters["step"])

    def _counters(self, step: int) -> dict[str, Any]:
        return {"step": step, "best_robust": self.best_robust, "rollbacks": self.rollbacks, "settings": self._settings}


def slim(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state's averaged weights alone, matrices in bfloat16: about a twelfth of the whole state's size."""
    return {
        key: value.to(torch.bfloat16) if value.ndim > 1 else value for key, value in tensors.items() if key.startswith("ema/")
    }


def finished(folder: RunFolder, stage: str, settings: dict[str, Any], steps: int, command: str) -> dict[str, torch.Tensor]:
    """Return the averaged weights of a stage that came to its end; ``ValueError`` for any other.

    Args:
        folder: The run folder.
        stage: The stage's name.
        settings: What it has to be trained with.
        steps: How many steps it takes.
        command: What trains it.
    """
    saved = folder.load(stage)
    if saved is None:
        raise ValueError(f"{folder.path} has no {stage}: run 'palisade-train {command}' with this folder first")
    tensors, counters = saved
    check_settings(folder, stage, counters, settings)
    if counters["step"] < steps:
        done = f"at step {counters['step']} of {steps}"
        raise ValueError(f"{folder.path}: {stage} is {done}: finish it with 'palisade-train {command}'")
    return slim(tensors)


def check_settings(folder: RunFolder, stage: str, counters: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a saved state was trained with other settings."""
    if not fits(counters["settings"], settings):
        raise ValueError(
            f"{folder.path}: {stage} was trained with other settings: "
            "give its recipe, --set, --data and --seed, or choose a new --run folder"
        )


def fits(saved: Any, settings: Any) -> bool:
    """Tell whether saved settings are these, as JSON values.

    A state that was saved before there was an option lacks it, and fits as long as the option is off: zero, false or nothing.
    """
    wanted = json.loads(json.dumps(settings))
    if not isinstance(saved, dict) or not isinstance(wanted, dict):
        return bool(saved == wanted)
    return saved.keys() <= wanted.keys() and all(
        fits(saved[key], value) if key in saved else not value for key, value in wanted.items()
    )
