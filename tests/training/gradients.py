"""Takes joint steps as one of the workers that ``torchrun`` started (or alone) and writes the momenta to files.

After one step the momentum is the gradient: ``python -m tests.training.gradients FOLDER ACCUMULATE``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from model.architecture import Architecture
from model.checkpoint import Header, save_checkpoint
from model.mixture import Mixture
from training.attack import Attack, perturb
from training.data import Split
from training.joint import JointTask
from training.recipe import RECIPES, Schedule
from training.stage import Stage, Trainer
from training.teacher import Teacher
from training.worker import Worker, started


class FrozenTask(JointTask):
    """Holds batch-norm statistics while training too, and attacks without starting noise."""

    def train(self, mode: bool = True) -> FrozenTask:
        del mode
        return super().train(mode=False)

    def attack(
        self, images: torch.Tensor, targets: torch.Tensor, choices: torch.Generator, noise: torch.Generator
    ) -> torch.Tensor:
        del choices
        return perturb(self.network, images, targets, Attack.fgsm(8 / 255), noise)


class Case(NamedTuple):
    task: type[JointTask]
    steps: int
    taught: bool = False


CASES = {
    "frozen-1": Case(FrozenTask, 1),
    "frozen-3": Case(FrozenTask, 3),
    "training-1": Case(JointTask, 1),  # with noise, and batch norms in training mode
    "taught": Case(FrozenTask, 1, taught=True),
}
"""By the name of the file that the momentum goes to."""
ARCHITECTURE = Architecture(width=4, num_classes=3, num_experts=3, gate_width=4, height=16, input_width=16)


def main(folder: Path, accumulate: int) -> None:
    torch.set_num_threads(1)
    with started("cpu") as worker:
        teacher = folder / f"teacher-{worker.rank}.safetensors"
        save_checkpoint(teacher, mixture(4), Header(ARCHITECTURE, ("a", "b", "c"), weights_sha256=""), torch.float32)
        for name, case in CASES.items():
            momentum = train(case, accumulate, worker, Teacher(teacher, 1.0, worker.device) if case.taught else None)
            if worker.first:
                save_file(momentum, folder / name)


def mixture(seed: int) -> Mixture:
    torch.manual_seed(seed)
    made = Mixture(ARCHITECTURE).to(memory_format=torch.channels_last)
    made.gate.head.weight.data.normal_()
    return made


def train(case: Case, accumulate: int, worker: Worker, teacher: Teacher | None) -> dict[str, torch.Tensor]:
    network = mixture(3)
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    data = Split(images, torch.arange(16) % 3)
    # SGD's first momentum is the gradient itself. No load balancing: it is a function of the whole batch, not a mean.
    schedule = Schedule(epochs=3, batch_size=16, optimiser="sgd", weight_decay=0.0, precision="float32", accumulate=accumulate)
    recipe = replace(RECIPES["compact"], architecture=ARCHITECTURE, joint=schedule)
    recipe = replace(recipe, loss=replace(recipe.loss, balance=0.0, clean_share=1.0))
    task = case.task(network, recipe, data, worker.device)
    task.teacher = teacher
    trainer = Trainer(Stage("joint", task, 3, 7, {}), data, worker)
    for step in range(case.steps):
        trainer.step(step)
    return {name: value.contiguous() for name, value in trainer.progress.optimiser.state().items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
