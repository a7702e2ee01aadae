"""``palisade-train partition``: nine experts, each on its own ninth of the data, whose answer is their vote."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from training.data import Dataset
from training.partition_run import PartitionRun
from training.plan import plan
from training.recipe import Recipe
from training.worker import Worker

Prepare = Callable[[argparse.Namespace], AbstractContextManager[tuple[Recipe, Dataset, Worker]]]


def register(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], train: argparse.ArgumentParser, prepare: Prepare
) -> None:
    """Add the command to ``palisade-train``'s sub-parsers.

    Args:
        commands: The sub-parsers.
        train: The options of every command that trains.
        prepare: Yields the recipe, the data and the worker that the options describe.
    """
    command = commands.add_parser(
        "partition",
        parents=[train],
        help="train each expert on its own part of the data and let them vote: bounds what poisoned samples can do",
    )
    command.add_argument("--out", type=Path, required=True, help="the checkpoint to write")

    def run(options: argparse.Namespace) -> None:
        if getattr(options, "quarantine", None) is not None:
            raise ValueError(
                "--quarantine: which samples are quarantined follows from all the data together, so that one sample could "
                "influence every expert and nothing would be certified: train partitions on data that were not screened"
            )
        with prepare(options) as (recipe, dataset, worker):
            run = PartitionRun(recipe, dataset, options.run, options.seed, worker)
            if options.dry_run:
                shown = plan(run.stages(), worker)
                if worker.first:
                    print(shown)
                return
            run.train()
            header = run.export(options.out)
            if worker.first:
                sizes = ", ".join(str(len(part.train)) for part in run.parts)
                print(f"{options.out}: version {header.weights_sha256[:12]}, {len(run.parts)} voting experts on {sizes} images")

    command.set_defaults(run_command=run)
