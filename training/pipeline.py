"""The steps from data to checkpoint, each resumable on its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Header, load_checkpoint, read_header, save_checkpoint
from model.mixture import Mixture
from training.data import Dataset, Split
from training.joint import JOINT, joint_settings, joint_stage
from training.parts import join, split
from training.plots import plot_run
from training.pretrain import expert_bag, expert_name, expert_schedule, expert_settings, expert_stage
from training.progress import check_settings, finished, fits, slim
from training.recipe import Recipe
from training.run_folder import RunFolder, git_revision
from training.stage import Stage, run_stage, total_steps
from training.teacher import Teacher
from training.worker import StopRequested, Worker

KEPT = ("config.json", "metrics.jsonl")
"""What a run folder leaves beside the parts of its weights."""


class Run:
    """One run: a recipe, data and a seed in a folder.

    Args:
        recipe: The recipe.
        dataset: The data.
        path: The run folder.
        seed: The seed.
        worker: Where to train.
        init: A checkpoint that joint training goes on from; ``None`` takes the run folder's experts and a new gate.
        teacher: Whose answers every stage learns, if anybody's.

    Raises:
        ValueError: The recipe can't be trained so, or what is given does not fit the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        path: Path,
        seed: int,
        worker: Worker,
        init: str | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        if recipe.architecture.votes:
            raise ValueError("aggregation=vote: a vote has no gate to train jointly; use palisade-train partition")
        self.dataset, self.worker = dataset, worker
        self._recipe, self._path, self._seed, self._init, self._teacher = recipe, path, seed, init, teacher
        if teacher is not None:
            self._check_teacher(teacher)
        self._train, _ = dataset.split_holdout(recipe.holdout)
        if init is not None:
            self._check_held_out(read_header(init), "checkpoint to go on from")
        self._went_on_from = init and read_header(init).weights_sha256

    @cached_property
    def _folder(self) -> RunFolder:
        return RunFolder(self._path)

    def pretrain(self, experts: Sequence[int] | None = None) -> None:
        """Train the recipe's experts (all, or those given) one after the other."""
        self._write_config()
        for index in range(len(self._recipe.experts)) if experts is None else experts:
            if not self.worker.agreed(self._ended(index)):
                self._run(self._expert_stage(index), self._bag(index))
        self._plot()

    def joint(self) -> None:
        """Train gate and experts together.

        Raises:
            ValueError: There is nothing to start from, or it does not fit the recipe.
        """
        self._write_config()
        self._run(self._joint_stage(), self._train)
        self._plot()

    def export(self, out: Path) -> Header:
        """Write the averaged weights of joint training as a checkpoint without metrics and return its header."""
        if not self.worker.first:
            self.worker.wait()
            return read_header(out)
        steps = total_steps(self._recipe.joint, len(self._train))
        tensors = finished(self._folder, JOINT, self._joint_settings(), steps, "joint")
        mixture = Mixture(self._recipe.architecture)
        mixture.gate.set_temperature(self._recipe.gate_temperature)
        mixture.load_state_dict({key.removeprefix("ema/"): value for key, value in tensors.items()})
        mixture.gate.set_temperature(1.0)
        header = Header(
            architecture=self._recipe.architecture,
            class_names=self.dataset.label_names,
            weights_sha256="",
            top_k=self._recipe.loss.top_k,
            recipe={
                **self._recipe.to_json(),
                "seed": self._seed,
                "joint_training_steps": steps,  # joint_steps are the attack's
                "went_on_from_sha256": self._went_on_from,
                "taught_by": self._teacher and self._teacher.told,
                "git_revision": git_revision(),
            },
            data={**self.dataset.described(), "held_out_training_images": self._recipe.holdout},
        )
        header = save_checkpoint(out, mixture, header)
        self.worker.wait()
        return header

    def slice(self, parts: Path, out: Path) -> Header:
        """Do all of the above until the worker is asked to stop, leaving every stage's weights as parts in ``parts``.

        So are the log and the configuration. A stage whose state the run folder lacks is taken up from its parts: a finished
        one as it is, one that was cut short with its averaged weights and without momentum.
        """
        self._take_up(parts)
        try:
            self.train()
        except StopRequested:
            self._leave(parts)
            raise
        self._leave(parts)
        header = self.export(out)
        if self.worker.first:
            split(out, parts)
        return header

    def train(self) -> None:
        """Train everything; with ``init`` there are no experts to pre-train."""
        if self._init is None:
            self.pretrain()
        self.joint()

    def stages(self) -> Iterator[tuple[Stage, Split]]:
        """Yield what :meth:`train` would run, untrained, each with the data that it would see."""
        for index in range(len(self._recipe.experts)) if self._init is None else ():
            yield self._expert_stage(index), self._bag(index)
        yield self._joint_stage(trained=False), self._train

    def _ended(self, index: int) -> bool:
        """Tell whether an expert is trained to its end; making its stage again would take seconds for nothing."""
        counters = self._folder.counters(expert_name(index))
        if counters is None:
            return False
        check_settings(self._folder, expert_name(index), counters, self._expert_settings(index))
        return bool(counters["step"] >= total_steps(expert_schedule(index, self._recipe), len(self._bag(index))))

    def _expert_stage(self, index: int) -> Stage:
        return self._taught(expert_stage(index, self._recipe, self.dataset, self.worker.device, self._seed))

    def _joint_stage(self, *, trained: bool = True) -> Stage:
        mixture = self._start() if trained else Mixture(self._recipe.architecture)
        return self._taught(
            joint_stage(mixture, self._recipe, self.dataset, self.worker.device, self._seed, self._went_on_from)
        )

    def _taught(self, stage: Stage) -> Stage:
        """Return the stage with the teacher, if there is one."""
        stage.task.teacher = self._teacher
        return replace(stage, settings=self._depends(stage.settings))

    def _depends(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return what a stage's result depends on, with the teacher."""
        return settings if self._teacher is None else {**settings, "taught_by": self._teacher.told}

    def _check_teacher(self, teacher: Teacher) -> None:
        header, fitting = teacher.header, self._recipe.architecture
        theirs = (header.class_names, header.architecture.height, header.architecture.input_width)
        ours = (self.dataset.label_names, fitting.height, fitting.input_width)
        if theirs != ours:
            raise ValueError(
                f"the teacher knows {theirs} (classes, height, width), the data have {ours}: give another --teacher"
            )
        if self._init is None and any(expert.loss == "mart" for expert in self._recipe.experts):
            raise ValueError("MART needs plain classes: leave --teacher out, or choose another loss for the recipe's experts")
        self._check_held_out(header, "teacher")

    def _check_held_out(self, header: Header, who: str) -> None:
        """Refuse who may have seen images that this run is judged on: of the same data, but with others held out."""
        told = header.data
        these = self.dataset.described()  # of screened data the digest of the whole, quarantined samples included
        if told.get("training_sha256") != these["training_sha256"]:
            return
        theirs = (told.get("held_out_training_images"), told.get("quarantine_sha256"), told.get("partitions"))
        ours = (self._recipe.holdout, these.get("quarantine_sha256"), None)
        if theirs != ours:
            raise ValueError(
                f"the {who} was trained on these data, but held out other images than this run: {theirs} and {ours} (how many, "
                "quarantine, partitions). It may have seen some that this run is judged on: give the same --set holdout=... "
                "and --quarantine, or another checkpoint"
            )

    @cached_property
    def _digests(self) -> list[str]:
        return self._train.digests()

    def _bag(self, index: int) -> Split:
        """Return what expert ``index`` sees of the training images."""
        if not self._recipe.bag:
            return self._train
        return self._train.take(expert_bag(index, self._recipe, self._digests, self._seed))

    def _run(self, stage: Stage, data: Split) -> None:
        run_stage(stage, data, self._folder, self.worker)

    def _start(self) -> Mixture:
        """Return what joint training starts from."""
        if self._init is None:
            return self._assemble()
        mixture = load_checkpoint(self._init).requires_grad_(True)
        if mixture.architecture != self._recipe.architecture:
            raise ValueError(f"{self._init} has the {mixture.architecture}, the recipe the {self._recipe.architecture}")
        mixture.top_k = None
        return mixture

    def _assemble(self) -> Mixture:
        """Return a mixture of the run folder's finished experts and an untrained gate."""
        torch.manual_seed(self._seed)
        mixture = Mixture(self._recipe.architecture)
        for index, expert in enumerate(mixture.experts):
            settings = self._expert_settings(index)
            steps = total_steps(expert_schedule(index, self._recipe), len(self._bag(index)))
            tensors = finished(self._folder, expert_name(index), settings, steps, "pretrain")
            expert.load_state_dict({key.removeprefix("ema/expert."): value for key, value in tensors.items()})
        return mixture

    def _joint_settings(self) -> dict[str, Any]:
        return self._depends(joint_settings(self._recipe, self.dataset, self._seed, self._went_on_from))

    def _expert_settings(self, index: int) -> dict[str, Any]:
        return self._depends(expert_settings(index, self._recipe, self.dataset, self._seed))

    def _settings(self) -> dict[str, dict[str, Any]]:
        """Return every stage's settings by its name."""
        experts = {expert_name(index): self._expert_settings(index) for index in range(len(self._recipe.experts))}
        return {**experts, JOINT: self._joint_settings()}

    def _take_up(self, parts: Path) -> None:
        if self.worker.first:
            for name in KEPT:
                if (parts / name).exists() and not (self._folder.path / name).exists():
                    shutil.copy(parts / name, self._folder.path / name)
            for name, settings in self._settings().items():
                state, manifest = self._folder.path / f"{name}.safetensors", parts / f"{name}.safetensors.manifest.json"
                if state.exists() or not manifest.exists():
                    continue
                join(manifest, state)
                saved = self._folder.load(name)
                if saved is None or not fits(saved[1]["settings"], settings):
                    state.unlink()
                    raise ValueError(f"{parts} holds {name} trained with other settings: choose another --parts folder")
        self.worker.wait()

    def _leave(self, parts: Path) -> None:
        if not self.worker.first:
            self.worker.wait()
            return
        light = RunFolder(parts / "whole")
        for name in self._settings():
            saved = self._folder.load(name)
            if saved is not None:
                light.save(name, slim(saved[0]), saved[1])
                split(light.path / f"{name}.safetensors", parts)
                (light.path / f"{name}.safetensors").unlink()
        light.path.rmdir()
        for name in KEPT:
            if (self._folder.path / name).exists():
                shutil.copy(self._folder.path / name, parts / name)
        self.worker.wait()

    def _write_config(self) -> None:
        if self.worker.first:
            settings = {"recipe": self._recipe.to_json(), "data": self.dataset.name, "data_sha256": self.dataset.digest}
            self._folder.write_config({**settings, "seed": self._seed, "workers": self.worker.count})

    def _plot(self) -> None:
        if self.worker.first:
            plot_run(self._folder)
            self._folder.close()
