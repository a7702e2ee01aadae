"""``palisade-train``: the command line of the training package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.checkpoint import CheckpointError
from training.data import DOWNLOADS, Dataset, load_dataset
from training.pipeline import export, joint, pretrain, train_all
from training.recipe import RECIPES, Recipe
from training.report import evaluate_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.run_command(options)
    except (ValueError, CheckpointError, OSError, FloatingPointError) as error:
        print(f"palisade-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("palisade-train: interrupted; the same command goes on from the last saved step", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="palisade-train", description="Train and evaluate robust mixtures of experts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", default="cifar10", help=f".npz file, image folder, or {', '.join(DOWNLOADS)} (downloaded)")
    shared.add_argument("--image-size", type=int, default=32, help="side in pixels to which a folder's images are resized")
    shared.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    shared.add_argument("--threads", type=_threads, default=0, help="CPU threads; default: all cores")

    run = argparse.ArgumentParser(add_help=False, parents=[shared])
    run.add_argument("--run", type=Path, required=True, help="run folder; the same folder resumes")
    run.add_argument("--recipe", choices=sorted(RECIPES), default="compact", help="default: %(default)s")
    run.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="as joint.epochs=2")
    run.add_argument("--seed", type=int, default=0)

    command = commands.add_parser("pretrain", parents=[run], help="stage 1: train the experts one by one")
    command.add_argument("--experts", default="", help="which, as 0,3,4; default: all")
    command.set_defaults(run_command=_pretrain)

    command = commands.add_parser("joint", parents=[run], help="stage 2: train gate and experts together")
    command.add_argument("--init", metavar="CHECKPOINT", help="go on from this instead of the run folder's experts")
    command.set_defaults(run_command=lambda o: joint(*_run(o), o.init))

    command = commands.add_parser("export", parents=[run], help="write the trained mixture as a checkpoint")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--init", metavar="CHECKPOINT", help="what joint training was given")
    command.set_defaults(run_command=lambda o: print(export(*_run(o), o.out, o.init)))

    command = commands.add_parser("compact", parents=[run], help="everything: pretrain, joint, export, evaluate")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--n", type=int, default=0, help="test images to evaluate on; default: all")
    command.set_defaults(run_command=_compact)

    command = commands.add_parser("evaluate", parents=[shared], help="measure a checkpoint: clean, FGSM, PGD-10")
    command.add_argument("--checkpoint", default="compact", help="path, or 'compact'; default: %(default)s")
    command.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    command.add_argument("--plot", type=Path, metavar="OUT", help="draw the figures here (PNG)")
    command.add_argument("--n", type=int, default=0, help="test images, a fixed random subset; default: all")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--stamp", action="store_true", help="also write the figures into the checkpoint's header")
    command.set_defaults(run_command=_evaluate)
    return parser


def _device(name: str) -> str:
    try:
        torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name} is not a device; write for example cpu or cuda:0") from error
    return name


def _threads(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads")
    return int(text)


def _run(options: argparse.Namespace) -> tuple[Recipe, Dataset, Path, torch.device, int]:
    recipe: Recipe = RECIPES[options.recipe]
    for assignment in options.settings:
        recipe = recipe.with_setting(assignment)
    dataset = _data(options)
    height, width = dataset.train.images.shape[2:]
    recipe = recipe.for_data(len(dataset.label_names), height, width)
    return recipe, dataset, options.run, torch.device(options.device), options.seed


def _data(options: argparse.Namespace) -> Dataset:
    return load_dataset(options.data, size=options.image_size)


def _pretrain(options: argparse.Namespace) -> None:
    recipe, dataset, run, device, seed = _run(options)
    try:
        chosen = [int(part) for part in options.experts.split(",") if part] or list(range(len(recipe.experts)))
    except ValueError as error:
        raise ValueError(f"--experts {options.experts}: give numbers, as 0,3,4") from error
    if not set(chosen) <= set(range(len(recipe.experts))):
        raise ValueError(f"--experts {options.experts}: the recipe's experts are 0 to {len(recipe.experts) - 1}")
    pretrain(recipe, dataset, run, device, seed, chosen)


def _compact(options: argparse.Namespace) -> None:
    recipe, dataset, run, device, seed = _run(options)
    train_all(recipe, dataset, run, device, seed, options.out)
    evaluate_checkpoint(options.out, dataset, device, options.n, seed, stamp=True)


def _evaluate(options: argparse.Namespace) -> None:
    evaluate_checkpoint(
        options.checkpoint,
        _data(options),
        torch.device(options.device),
        options.n,
        options.seed,
        stamp=options.stamp,
        json_path=options.json,
        plot_path=options.plot,
    )


if __name__ == "__main__":
    sys.exit(main())
