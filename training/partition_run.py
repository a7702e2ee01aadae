"""A run in partition mode: every expert is trained on its own partition of the data, and the experts vote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Header, read_header, save_checkpoint
from model.mixture import Mixture
from training.data import Dataset, Split
from training.partition import RULE, check_classes, partitions
from training.plots import plot_run
from training.pretrain import expert_name, expert_schedule, expert_settings, expert_stage
from training.progress import finished
from training.recipe import Recipe
from training.run_folder import RunFolder, git_revision
from training.stage import Stage, run_stage, total_steps
from training.worker import Worker


class PartitionRun:
    """One run: a recipe, data and a seed in a folder.

    An expert is a function of its own partition, its number, the recipe and the seed: its order of images, its number of steps,
    its held-out images and what is rolled back for them come from that partition alone. All that experts share is fixed before
    any data are read: the architecture with its normalisation, the schedules, and how many images a partition holds out.

    Args:
        recipe: The recipe, fitted to the data; of its settings those of the gate and of joint training have no meaning here.
        dataset: The data.
        path: The run folder.
        seed: The seed.
        worker: Where to train.

    Raises:
        ValueError: A class has no test image, the data can't be divided so, or a partition is too small for a batch.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, path: Path, seed: int, worker: Worker) -> None:
        count = recipe.architecture.num_experts
        if recipe.holdout < count:
            raise ValueError(f"holdout={recipe.holdout}: each of {count} partitions holds out its share; give {count} or more")
        if recipe.bag:
            raise ValueError(f"bag={recipe.bag}: every expert has its own partition already; set bag to 0")
        check_classes(dataset)
        self.dataset, self.worker = dataset, worker
        # One share for all, whatever the partitions hold: it also fixes the shapes that a compiler sees.
        self._recipe = replace(
            recipe, holdout=recipe.holdout // count, architecture=replace(recipe.architecture, aggregation="vote")
        )
        self._path, self._seed = path, seed
        self.parts = partitions(dataset, count)
        for index, part in enumerate(self.parts):
            self._check_size(index, part)

    @cached_property
    def _folder(self) -> RunFolder:
        return RunFolder(self._path)

    def train(self) -> None:
        """Train the experts one after the other; those that are finished are left as they are."""
        if self.worker.first:
            self._folder.write_config({**self._told(), "recipe": self._recipe.to_json(), "workers": self.worker.count})
        for stage, data in self.stages():
            run_stage(stage, data, self._folder, self.worker)
        if self.worker.first:
            plot_run(self._folder)
            self._folder.close()

    def stages(self) -> Iterator[tuple[Stage, Split]]:
        """Yield what :meth:`train` runs, untrained, each with its training images."""
        for index, part in enumerate(self.parts):
            stage = expert_stage(index, self._recipe, part, self.worker.device, self._seed)
            yield stage, part.split_holdout(self._recipe.holdout)[0]

    def export(self, out: Path) -> Header:
        """Write the finished experts as a checkpoint without metrics, whose experts vote, and return its header."""
        if not self.worker.first:
            self.worker.wait()
            return read_header(out)
        mixture = Mixture(self._recipe.architecture)
        for index, expert in enumerate(mixture.experts):
            tensors = self._weights(index)
            expert.load_state_dict({key.removeprefix("ema/expert."): value for key, value in tensors.items()})
        header = Header(
            architecture=self._recipe.architecture,
            class_names=self.dataset.label_names,
            weights_sha256="",
            recipe={**self._recipe.to_json(), "mode": "partition", "seed": self._seed, "git_revision": git_revision()},
            data=self._told()["data"],
        )
        header = save_checkpoint(out, mixture, header)
        self.worker.wait()
        return header

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        part = self.parts[index]
        settings = expert_settings(index, self._recipe, part, self._seed)
        steps = total_steps(expert_schedule(index, self._recipe), len(part.train) - self._recipe.holdout)
        return finished(self._folder, expert_name(index), settings, steps, "partition")

    def _told(self) -> dict[str, Any]:
        """Return what the run folder and the checkpoint say of the data."""
        data = {
            **self.dataset.described(),
            "held_out_training_images": self._recipe.holdout * len(self.parts),
            "partitions": len(self.parts),
            "partition_rule": RULE,
            "partition_images": [len(part.train) for part in self.parts],
            "partition_sha256": [part.digest for part in self.parts],
        }
        return {"data": data, "seed": self._seed}

    def _check_size(self, index: int, part: Dataset) -> None:
        left, batch = len(part.train) - self._recipe.holdout, expert_schedule(index, self._recipe).batch_size
        if left < batch:
            raise ValueError(
                f"{part.name}: {len(part.train)} images, {self._recipe.holdout} of them held out, do not fill one batch of "
                f"{batch}: lower holdout, pretrain.batch_size and benign.batch_size, or bring more data"
            )
