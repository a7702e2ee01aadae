"""Arms of benchmarks.poisoning: what is trained on poisoned data, and what it then is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.poisoning_defences import partition_run
from benchmarks.poisons import TARGET, triggered
from model.architecture import Architecture
from model.checkpoint import load_checkpoint
from model.fast import fold_batch_norms
from training.attack import Attack
from training.data import Dataset, Split
from training.measure import Bench
from training.pipeline import Run
from training.pretrain import expert_stage
from training.recipe import RECIPES, Recipe
from training.run_folder import RunFolder
from training.stage import Stage, run_stage
from training.worker import Worker

PGD_10 = Attack.pgd(8 / 255, 10, 2 / 255)
SAMPLE = 20
"""Seed of the subset of the test images that is attacked, the same for every cell."""


@dataclass(frozen=True)
class Arm:
    """One way to train on data that an attacker may have touched.

    Attributes:
        name: As `--arms` and the report call it.
        kind: A `plain` network, an `adversarial` one (trained against PGD), the `mixture`, or nine experts that vote, each
            on its own `partition` of the data.
        screened: Train without what `training.screening` puts into quarantine.
        bag: `bag` of the mixture's recipe.
        trim: `trim` of all the mixture's schedules.
        mixup: `mixup` of all the mixture's schedules.
    """

    name: str
    kind: Literal["plain", "adversarial", "mixture", "partition"]
    screened: bool = False
    bag: float = 0.0
    trim: float = 0.0
    mixup: float = 0.0

    @property
    def optional(self) -> bool:
        """Whether the arm is the mixture with one of the robust training options."""
        return bool(self.bag or self.trim or self.mixup)


ARMS = (
    Arm("plain network", "plain"),
    Arm("adversarially trained network", "adversarial"),
    Arm("mixture", "mixture"),
    Arm("mixture, screened", "mixture", screened=True),
    Arm("partitions, vote", "partition"),
    Arm("mixture, bags of a half", "mixture", bag=0.5),
    Arm("mixture, a fifth trimmed", "mixture", trim=0.2),
    Arm("mixture, mixup", "mixture", mixup=1.0),
)


@dataclass(frozen=True)
class Size:
    """How large and how long everything is.

    Attributes:
        images: Training images, of which the attacker touches some.
        width: Channels of the first stage of every network, and of the gate.
        batch_size: Images per step.
        epochs: Passes of every expert of a mixture over all `images`; who sees fewer takes as many steps.
        joint_epochs: Those of joint training.
        single_epochs: Those of a network that stands alone.
        holdout: Training images that are kept aside; as poisoned as the others.
        attacked: Test images for PGD-10; 0 means all.
        judged: Test images for everything else; 0 means all.
        screen_width: Channels of the first stage of the networks that screen.
        screen_epochs: Passes of those.
        screen_folds: Parts of which all but one train a screener that judges the one.
    """

    images: int = 50000
    width: int = 8
    batch_size: int = 64
    epochs: float = 0.6
    joint_epochs: float = 0.225
    single_epochs: float = 1.2
    holdout: int = 500
    attacked: int = 500
    judged: int = 5000
    screen_width: int = 16
    screen_epochs: float = 3.0
    screen_folds: int = 3

    def screening(self, seed: int) -> dict[str, Any]:
        """Return the settings of a screening."""
        return {"width": self.screen_width, "epochs": self.screen_epochs, "folds": self.screen_folds, "seed": seed}

    def recipe(self, arm: Arm, dataset: Dataset) -> Recipe:
        """Return an arm's recipe: the line-up and the losses of `compact` on a short schedule, or one expert of it alone."""
        base, options = RECIPES["compact"], {"batch_size": self.batch_size, "trim": arm.trim, "mixup": arm.mixup}
        # In proportion to the batch. At the rate of larger ones, N-FGSM had not learnt a backdoor after 450 steps.
        slower = self.batch_size / base.pretrain.batch_size
        # Who sees a share of the images makes so many more passes over it: all take as many steps. Else what screening sets
        # aside would shorten the training, and that would be counted as lost to the poison.
        left = len(dataset.train) / self.images
        share = left * (1 / len(base.experts) if arm.kind == "partition" else arm.bag or 1)
        stage = replace(base.pretrain, epochs=self.epochs / share, peak_lr=slower * base.pretrain.peak_lr, **options)
        architecture = Architecture(self.width, gate_width=self.width)
        experts, validation = base.experts, min(100, self.holdout)
        if arm.kind in ("plain", "adversarial"):
            stage = replace(stage, epochs=self.single_epochs / left)
            architecture = replace(architecture, num_experts=1)
            # The last of the line-up is trained against PGD. Against N-FGSM, one alone collapsed: docs/experiments.md.
            experts = (experts[0] if arm.kind == "plain" else experts[-1],)
        joint = replace(base.joint, epochs=self.joint_epochs / left, peak_lr=slower * base.joint.peak_lr, **options)
        recipe = Recipe(
            "poisoning",
            architecture,
            experts,
            stage,
            stage,
            joint,
            bag=arm.bag,
            holdout=self.holdout,
            validation_images=validation,
        )
        height, width = dataset.train.images.shape[2:]
        return recipe.for_data(len(dataset.label_names), height, width)


def train(arm: Arm, size: Size, dataset: Dataset, folder: Path, seed: int, worker: Worker) -> torch.nn.Module:
    """Train an arm to its end, from where `folder` has it, and return the network, in eval mode."""
    recipe = size.recipe(arm, dataset)
    if arm.kind in ("plain", "adversarial"):
        data, _ = dataset.split_holdout(recipe.holdout)
        return run_stage(expert_stage(0, recipe, dataset, worker.device, seed), data, RunFolder(folder), worker)
    run = _run(arm, recipe, dataset, folder, seed, worker)
    run.train()
    run.export(folder / "mixture.safetensors")
    return load_checkpoint(folder / "mixture.safetensors", worker.device)


def stages(arm: Arm, size: Size, dataset: Dataset, folder: Path, worker: Worker) -> Iterator[tuple[Stage, Split]]:
    """Yield an arm's stages and the data of each, untrained, as :func:`training.plan.costs` takes them."""
    recipe = size.recipe(arm, dataset)
    if arm.kind in ("plain", "adversarial"):
        yield expert_stage(0, recipe, dataset, worker.device, 0), dataset.split_holdout(recipe.holdout)[0]
    else:
        yield from _run(arm, recipe, dataset, folder, 0, worker).stages()


def _run(arm: Arm, recipe: Recipe, dataset: Dataset, folder: Path, seed: int, worker: Worker) -> Any:
    make = partition_run if arm.kind == "partition" else Run
    return make(recipe, dataset, folder, seed, worker)


def judge(network: torch.nn.Module, test: Split, size: Size, device: torch.device) -> dict[str, Any]:
    """Return what a network is worth on test images: shares in `[0, 1]`, each with the number of images that it is of.

    `clean`: images classified rightly. `robust`: those under PGD-10 through the network, in float32. `backdoor`: images of
    other classes that are taken for the target class when they carry the patch. `pair`: images taken for the class that
    follows their own, which is where pair flips lead.
    """
    network = fold_batch_norms(network).to(device=device, memory_format=torch.channels_last)
    seen = judged_on(test, size)
    answers, classes = predicted(network, seen, device), int(test.labels.max()) + 1
    marked = triggered(seen)
    attacked = test if size.attacked == 0 else test.take(_sample(test, size.attacked))
    return {
        "clean": _share(answers == seen.labels),
        "robust": _share(Bench(attacked, device).correct(network, PGD_10)),
        "backdoor": _share(predicted(network, marked, device) == TARGET),
        "pair": _share(answers == (seen.labels + 1) % classes),
        "images": {"clean": len(seen), "robust": len(attacked), "backdoor": len(marked), "pair": len(seen)},
    }


def judged_on(test: Split, size: Size) -> Split:
    """Return the test images that everything but attacks is judged on."""
    return test if size.judged == 0 else test.take(_sample(test, size.judged))


@torch.no_grad()
def predicted(network: torch.nn.Module, split: Split, device: torch.device) -> torch.Tensor:
    """Return the classes `(N,)` that a network names."""
    return torch.cat([network(images).argmax(dim=1).cpu() for images, _ in Bench(split, device).batches()])


def caught(touched: np.ndarray, quarantined: np.ndarray) -> dict[str, float | None]:
    """Return which share of the touched images `(N,)` is in quarantine (`None` if none was touched), and of the others."""
    return {
        "caught": float(quarantined[touched].mean()) if touched.any() else None,
        "clean_quarantined": float(quarantined[~touched].mean()),
    }


def _sample(split: Split, count: int) -> torch.Tensor:
    if not 0 < count <= len(split):
        raise ValueError(f"there are {len(split)} test images, not {count}: give fewer, or 0 for all")
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(SAMPLE))[:count].sort().values


def _share(hits: torch.Tensor) -> float:
    return hits.float().mean().item()
