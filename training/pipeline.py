"""The steps from data to checkpoint, each resumable on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint import Header, save_checkpoint
from model.mixture import Mixture
from training.data import Dataset
from training.joint import JOINT, train_jointly
from training.plots import plot_run
from training.pretrain import expert_stage, pretrain_expert
from training.recipe import Recipe
from training.run_folder import RunFolder, git_revision


def pretrain(
    recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, experts: Sequence[int] | None = None
) -> None:
    """Train the recipe's experts (all, or those given) one after the other."""
    folder = _folder(recipe, dataset, run, seed)
    train, holdout = dataset.split_holdout(recipe.holdout)
    for index in range(len(recipe.experts)) if experts is None else experts:
        pretrain_expert(index, recipe, train, holdout, folder, device, seed)
    plot_run(folder)


def joint(recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int) -> Mixture:
    """Train gate and experts together, from the experts that :func:`pretrain` left in the run folder."""
    folder = _folder(recipe, dataset, run, seed)
    train, holdout = dataset.split_holdout(recipe.holdout)
    torch.manual_seed(seed)
    mixture = Mixture(recipe.architecture)
    for index, expert in enumerate(mixture.experts):
        saved = folder.load(expert_stage(index))
        if saved is None:
            raise ValueError(f"{run} has no expert {index}: run 'palisade-train pretrain' with this folder first")
        prefix = "ema/expert."
        expert.load_state_dict({k.removeprefix(prefix): v for k, v in saved[0].items() if k.startswith(prefix)})
    mixture = train_jointly(mixture, recipe, train, holdout, folder, device, seed)
    plot_run(folder)
    return mixture


def export(recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, out: Path) -> Header:
    """Write the averaged weights of joint training as a checkpoint without metrics and return its header."""
    del device  # every command that works on a run takes the same arguments
    saved = RunFolder(run).load(JOINT)
    if saved is None:
        raise ValueError(f"{run} has no joint training: run 'palisade-train joint' with this folder first")
    tensors, counters = saved
    mixture = Mixture(recipe.architecture)
    mixture.load_state_dict({k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")})
    header = Header(
        architecture=recipe.architecture,
        class_names=dataset.label_names,
        weights_sha256="",
        recipe={**recipe.to_json(), "seed": seed, "joint_step": counters["step"], "git_revision": git_revision()},
        data={"name": dataset.name, "sha256": dataset.digest, "held_out_training_images": recipe.holdout},
    )
    return save_checkpoint(out, mixture, header)


def train_all(recipe: Recipe, dataset: Dataset, run: Path, device: torch.device, seed: int, out: Path) -> Header:
    """Pre-train, train jointly and export."""
    pretrain(recipe, dataset, run, device, seed)
    joint(recipe, dataset, run, device, seed)
    return export(recipe, dataset, run, device, seed, out)


def _folder(recipe: Recipe, dataset: Dataset, run: Path, seed: int) -> RunFolder:
    folder = RunFolder(run)
    folder.write_config({"recipe": recipe.to_json(), "data": dataset.name, "data_sha256": dataset.digest, "seed": seed})
    return folder
