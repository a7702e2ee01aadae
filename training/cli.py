"""``palisade-train``: the command line of the training package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torch

from model.checkpoint import CheckpointError
from training.data import Dataset
from training.data_commands import add_data_commands, add_data_options, add_quarantine_option, load
from training.evaluation.autoattack import parse_attacks
from training.evaluation.levels import Level
from training.evaluation.report import evaluate_checkpoint
from training.evaluation.request import Request
from training.evaluation.sanity import MaskedGradientsError
from training.loading import DOWNLOADS
from training.partition_command import register as register_partition
from training.parts import join
from training.pipeline import Run
from training.plan import plan
from training.recipe import RECIPES, Recipe
from training.replay import write_replay
from training.teacher import Teacher
from training.worker import Stop, StopRequested, Worker, started


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage, 3 masked gradients suspected, 75 out of ``--minutes`` (run it again),
        130 interrupted.
    """
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.run_command(options)
    except (ValueError, CheckpointError, OSError, FloatingPointError) as error:
        print(f"palisade-train: {error}", file=sys.stderr)
        return 1
    except MaskedGradientsError as suspicion:
        print(f"palisade-train: {suspicion}", file=sys.stderr)
        return 3
    except StopRequested as stop:
        why = f"{options.minutes:g} minutes are over" if stop.reason == "time" else f"stopped by {stop.reason}"
        print(f"palisade-train: {why}; the state is saved, the same command goes on", file=sys.stderr)
        return 75 if stop.reason == "time" else 130
    except KeyboardInterrupt:
        print("palisade-train: interrupted; the same command goes on from the last saved step", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="palisade-train", description="Train and evaluate robust mixtures of experts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    add_data_options(shared, ", ".join(DOWNLOADS))
    shared.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    shared.add_argument("--threads", type=_threads, default=0, help="CPU threads; default: all cores")

    _add_run_commands(commands, shared)

    _add_join(commands)
    _add_evaluate(commands, shared)
    _add_replay(commands, shared)
    add_data_commands(commands, shared)
    return parser


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    command = commands.add_parser("evaluate", parents=[shared], help="measure a checkpoint's accuracy and robustness")
    add_quarantine_option(command)
    command.add_argument("--checkpoint", default="compact", help="path, or 'compact'; default: %(default)s")
    command.add_argument("--level", choices=get_args(Level), default="quick", help="how thoroughly to attack; default: quick")
    command.add_argument("--attacks", metavar="LIST", help="of level full, only these, as apgd-ce,apgd-t; default: AutoAttack")
    command.add_argument("--corruptions", action="store_true", help="also measure 15 common corruptions (75 clean passes)")
    command.add_argument(
        "--compare", action="append", default=[], metavar="CHECKPOINT", help="also measure this one; may be repeated"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="write figures, table, plots and report.html there")
    command.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    command.add_argument("--plot", type=Path, metavar="OUT", help="draw the figures here (PNG)")
    command.add_argument("--n", type=int, default=0, help="test images, a fixed random subset; default: all")
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument("--stamp", action="store_true", help="also write the figures into the checkpoint's header")
    command.set_defaults(run_command=_evaluate)


def _add_join(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("join", help="put a file together from its parts and check every digest")
    command.add_argument("manifest", type=Path, help="the .manifest.json beside the parts")
    command.add_argument("--out", type=Path, required=True, metavar="FILE")
    command.set_defaults(run_command=_join, threads=0)


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "replay", parents=[shared], help="keep held-out training images and attacks on them, for palisade-serve tune"
    )
    add_quarantine_option(command)
    command.add_argument("--checkpoint", default="compact", help="path, or 'compact'; default: %(default)s")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    command.add_argument("--n", type=int, default=0, help="images; default: all that training held out")
    command.add_argument("--steps", type=int, default=10, help="steps of the attack, PGD; default: %(default)s")
    command.add_argument("--seed", type=_seed, default=0)
    command.set_defaults(run_command=_replay)


def _add_run_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    run = argparse.ArgumentParser(add_help=False, parents=[shared])
    run.add_argument("--run", type=Path, required=True, help="run folder; the same folder resumes")
    run.add_argument("--recipe", choices=sorted(RECIPES), default="compact", help="default: %(default)s")
    run.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="as joint.epochs=2")
    run.add_argument("--seed", type=_seed, default=0)
    add_quarantine_option(run)

    taught = argparse.ArgumentParser(add_help=False)
    taught.add_argument("--teacher", metavar="CHECKPOINT", help="learn what this one says of the clean images: distillation")
    taught.add_argument("--teacher-share", type=float, metavar="S", help="of each target, the label has the rest; default: 1")

    init = argparse.ArgumentParser(add_help=False, parents=[taught])
    init.add_argument("--init", metavar="CHECKPOINT", help="joint training goes on from this instead of the folder's experts")

    train = argparse.ArgumentParser(add_help=False, parents=[run])
    train.add_argument("--compile", action="store_true", help="run the experts through torch.compile")
    train.add_argument("--minutes", type=float, metavar="M", help="save and end with status 75 after so long")
    train.add_argument("--dry-run", action="store_true", help="print the plan with an estimate of time and memory, and end")

    command = commands.add_parser("pretrain", parents=[train, taught], help="stage 1: train the experts one by one")
    command.add_argument("--experts", default="", help="which, as 0,3,4; default: all")
    command.set_defaults(run_command=_pretrain, init=None)

    command = commands.add_parser("joint", parents=[train, init], help="stage 2: train gate and experts together")
    command.set_defaults(run_command=_joint)

    command = commands.add_parser("export", parents=[run, init], help="write the trained mixture as a checkpoint")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run_command=_export)

    command = commands.add_parser("compact", parents=[train, init], help="everything: pretrain, joint, export, evaluate")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--n", type=int, default=0, help="test images to evaluate on; default: all")
    command.set_defaults(run_command=_compact)

    command = commands.add_parser("slice", parents=[train, init], help="pretrain, joint, export in slices of --minutes")
    command.add_argument("--parts", type=Path, required=True, help="folder in which weights are left and taken up as parts")
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run_command=_slice)

    register_partition(commands, train, _prepared)


def _device(name: str) -> str:
    try:
        torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name} is not a device; write for example cpu or cuda:0") from error
    return name


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a seed: give a number from 0 to {2**31 - 1}")
    return int(text)


def _threads(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads")
    return int(text)


@contextmanager
def _run(options: argparse.Namespace) -> Iterator[Run]:
    """Yield the run that the options describe; with ``--dry-run`` print its plan and end the program instead."""
    with _prepared(options) as (recipe, dataset, worker):
        run = Run(recipe, dataset, options.run, options.seed, worker, options.init, _teacher(options, worker.device))
        if getattr(options, "dry_run", False):
            shown = plan(run.stages(), worker)
            if worker.first:
                print(shown)
            raise SystemExit(0)
        yield run


def _teacher(options: argparse.Namespace, device: torch.device) -> Teacher | None:
    if options.teacher is None:
        if options.teacher_share is not None:
            raise ValueError(f"--teacher-share {options.teacher_share}: give --teacher, too")
        return None
    return Teacher(options.teacher, 1.0 if options.teacher_share is None else options.teacher_share, device)


@contextmanager
def _prepared(options: argparse.Namespace) -> Iterator[tuple[Recipe, Dataset, Worker]]:
    """Yield the recipe, fitted to the data, the data and the worker that the options describe."""
    stop = Stop(getattr(options, "minutes", None))
    recipe: Recipe = RECIPES[options.recipe]
    for assignment in options.settings:
        recipe = recipe.with_setting(assignment)
    with started(options.device, compiled=getattr(options, "compile", False), stop=stop) as worker:
        if not worker.first:
            worker.wait()
        dataset = load(options)  # the first worker downloads, the others find the files
        if worker.first:
            worker.wait()
        height, width = dataset.train.images.shape[2:]
        yield recipe.for_data(len(dataset.label_names), height, width), dataset, worker


def _pretrain(options: argparse.Namespace) -> None:
    count = len(RECIPES[options.recipe].experts)
    try:
        chosen = [int(part) for part in options.experts.split(",") if part] or list(range(count))
    except ValueError as error:
        raise ValueError(f"--experts {options.experts}: give numbers, as 0,3,4") from error
    if not set(chosen) <= set(range(count)):
        raise ValueError(f"--experts {options.experts}: the recipe's experts are 0 to {count - 1}")
    with _run(options) as run:
        run.pretrain(chosen)


def _joint(options: argparse.Namespace) -> None:
    with _run(options) as run:
        run.joint()


def _export(options: argparse.Namespace) -> None:
    with _run(options) as run:
        print(run.export(options.out))


def _compact(options: argparse.Namespace) -> None:
    with _run(options) as run:
        run.train()
        run.export(options.out)
        first, dataset, stop = run.worker.first, run.dataset, run.worker.stop
    if stop.reason:
        raise StopRequested(stop.reason)
    if first:
        evaluate_checkpoint(options.out, dataset, torch.device(options.device), options.n, options.seed, stamp=True)


def _slice(options: argparse.Namespace) -> None:
    with _run(options) as run:
        print(run.slice(options.parts, options.out))


def _join(options: argparse.Namespace) -> None:
    print(f"{join(options.manifest, options.out)}: every part and the whole have the digests of {options.manifest}")


def _evaluate(options: argparse.Namespace) -> None:
    request = Request(
        level=options.level,
        attacks=None if options.attacks is None else parse_attacks(options.attacks),
        corruptions=options.corruptions,
        compare=tuple(options.compare),
        json=options.json,
        plot=options.plot,
        folder=options.out,
    )
    device = torch.device(options.device)
    evaluate_checkpoint(
        options.checkpoint, load(options), device, options.n, options.seed, stamp=options.stamp, request=request
    )


def _replay(options: argparse.Namespace) -> None:
    made = write_replay(
        options.checkpoint, load(options), options.out, torch.device(options.device), options.n, options.steps, options.seed
    )
    n, right = made["n"], made["right"]
    print(
        f"{options.out}: {n} held-out training images; right in float32: {right['clean']} as they are, "
        f"{right['attacked']} under PGD-{options.steps}"
    )


if __name__ == "__main__":
    sys.exit(main())
