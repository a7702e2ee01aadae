"""The steps from data to checkpoint, each resumable on its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Header, load_checkpoint, read_header, save_checkpoint
from model.mixture import Mixture
from training.data import Dataset
from training.joint import JOINT, joint_settings, train_jointly
from training.plots import plot_run
from training.pretrain import expert_schedule, expert_settings, expert_stage, pretrain_expert
from training.recipe import Recipe
from training.run_folder import RunFolder, git_revision
from training.stage import total_steps


def pretrain(
    recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, experts: Sequence[int] | None = None
) -> None:
    """Train the recipe's experts (all, or those given) one after the other."""
    folder = _folder(recipe, dataset, run, seed)
    for index in range(len(recipe.experts)) if experts is None else experts:
        pretrain_expert(index, recipe, dataset, folder, device, seed)
    plot_run(folder)


def joint(recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, init: str | None = None) -> Mixture:
    """Train gate and experts together, from the experts that :func:`pretrain` left in the run folder or from a checkpoint.

    Args:
        recipe: The recipe.
        dataset: The data.
        run: The run folder.
        device: Where to train.
        seed: The run's seed.
        init: A checkpoint to go on from; ``None`` takes the run folder's experts and a new gate.

    Raises:
        ValueError: There is nothing to start from, or it does not fit the recipe.
    """
    folder = _folder(recipe, dataset, run, seed)
    if init is None:
        mixture = _assemble(recipe, dataset, folder, seed)
    else:
        mixture = load_checkpoint(init).requires_grad_(True)
        if mixture.architecture != recipe.architecture:
            raise ValueError(f"{init} has the {mixture.architecture}, the recipe the {recipe.architecture}")
    mixture = train_jointly(mixture, recipe, dataset, folder, device, seed, init and read_header(init).weights_sha256)
    plot_run(folder)
    return mixture


def _assemble(recipe: Recipe, dataset: Dataset, folder: RunFolder, seed: int) -> Mixture:
    """Return a mixture of the run folder's finished experts and an untrained gate."""
    torch.manual_seed(seed)
    mixture = Mixture(recipe.architecture)
    for index, expert in enumerate(mixture.experts):
        settings = expert_settings(index, recipe, dataset, seed)
        wanted = total_steps(expert_schedule(index, recipe), len(dataset.train) - recipe.holdout)
        tensors = _finished(folder, expert_stage(index), settings, wanted, "pretrain")
        prefix = "ema/expert."
        expert.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return mixture


def export(
    recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, out: Path, init: str | None = None
) -> Header:
    """Write the averaged weights of joint training as a checkpoint without metrics and return its header.

    ``init`` is what :func:`joint` was given.
    """
    del device  # every command that works on a run takes the same arguments
    steps = total_steps(recipe.joint, len(dataset.train) - recipe.holdout)
    went_on_from = init and read_header(init).weights_sha256
    tensors = _finished(RunFolder(run), JOINT, joint_settings(recipe, dataset, seed, went_on_from), steps, "joint")
    mixture = Mixture(recipe.architecture)
    mixture.load_state_dict({k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")})
    header = Header(
        architecture=recipe.architecture,
        class_names=dataset.label_names,
        weights_sha256="",
        recipe={
            **recipe.to_json(),
            "seed": seed,
            "joint_steps": steps,
            "went_on_from_sha256": went_on_from,
            "git_revision": git_revision(),
        },
        data={"name": dataset.name, "training_sha256": dataset.digest, "held_out_training_images": recipe.holdout},
    )
    return save_checkpoint(out, mixture, header)


def train_all(recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, out: Path) -> Header:
    """Pre-train, train jointly and export."""
    pretrain(recipe, dataset, run, device, seed)
    joint(recipe, dataset, run, device, seed)
    return export(recipe, dataset, run, device, seed, out)


def _finished(folder: RunFolder, stage: str, settings: dict[str, Any], steps: int, command: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a stage that came to its end with these settings; raise ``ValueError`` for any other."""
    saved = folder.load(stage)
    if saved is None:
        raise ValueError(f"{folder.path} has no {stage}: run 'palisade-train {command}' with this folder first")
    tensors, counters = saved
    if counters["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{folder.path}: {stage} was trained with other settings: give its recipe, --set, --data and --seed")
    if counters["step"] < steps:
        done = counters["step"]
        raise ValueError(f"{folder.path}: {stage} is at step {done} of {steps}: finish it with 'palisade-train {command}'")
    return tensors


def _folder(recipe: Recipe, dataset: Dataset, run: Path, seed: int) -> RunFolder:
    folder = RunFolder(run)
    folder.write_config({"recipe": recipe.to_json(), "data": dataset.name, "data_sha256": dataset.digest, "seed": seed})
    return folder
