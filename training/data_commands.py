"""``palisade-train data``: what the data are, and which samples look tampered with; and the data as other commands get them."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from training.data import Dataset
from training.loading import load_dataset
from training.manifest import checked, write_manifest
from training.screening.page import write_page
from training.screening.quarantine import without_quarantined, write_quarantine
from training.screening.screening import screen
from training.screening.settings import ScreenSettings
from training.worker import Stop, started


def load(options: argparse.Namespace) -> Dataset:
    """Return a command's data: checked against ``--manifest``, without the samples that ``--quarantine`` names."""
    dataset = load_dataset(options.data, size=options.image_size, allow_overlap=options.allow_overlap)
    if options.manifest is not None:
        dataset = checked(dataset, options.manifest)
    if getattr(options, "quarantine", None) is not None:
        dataset = without_quarantined(dataset, options.quarantine)
    return dataset


def add_data_options(parser: argparse.ArgumentParser, downloads: str) -> None:
    """Add the options of every command that reads data."""
    parser.add_argument("--data", default="cifar10", help=f".npz file, image folder, or {downloads} (downloaded)")
    parser.add_argument("--allow-overlap", action="store_true", help="accept test images that are training images too")
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels to which a folder's images are resized")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="refuse data that differ from this manifest")


def add_quarantine_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that trains, or needs to know what was trained on."""
    parser.add_argument("--quarantine", type=Path, metavar="FILE", help="leave out the training samples that this file names")


def add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    """Add ``data manifest`` and ``data screen``."""
    data = commands.add_parser("data", help="write a manifest of the data, or screen them for tampering")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")

    command = kinds.add_parser("manifest", parents=[shared], help="write the SHA-256 of every image and its label")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write (JSON lines)")
    command.set_defaults(run_command=_manifest)

    usual = ScreenSettings()
    command = kinds.add_parser("screen", parents=[shared], help="set aside training samples that look tampered with")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where quarantine.json and report.html go")
    command.add_argument(
        "--false-positives",
        type=float,
        default=usual.false_positives,
        metavar="SHARE",
        help="share of the honest samples that may be set aside; default: %(default)s",
    )
    command.add_argument("--epochs", type=float, default=usual.epochs, help="of each screener; default: %(default)s")
    command.add_argument("--folds", type=int, default=usual.folds, help="default: %(default)s")
    command.add_argument("--rounds", type=int, default=usual.rounds, help="of screeners of the folds; default: %(default)s")
    command.add_argument("--width", type=int, default=usual.width, help="of the screeners' first stage; default: %(default)s")
    command.add_argument(
        "--layer",
        type=int,
        default=usual.layer,
        help="stage of a screener whose activations are looked at; default: %(default)s",
    )
    command.add_argument("--seed", type=int, default=usual.seed)
    command.add_argument("--minutes", type=float, metavar="M", help="save and end with status 75 after so long")
    command.set_defaults(run_command=_screen)


def _manifest(options: argparse.Namespace) -> None:
    dataset = load(options)
    digest = write_manifest(dataset, options.out)
    print(f"{options.out}: {len(dataset.train)} training and {len(dataset.test)} test images, SHA-256 of the manifest {digest}")


def _screen(options: argparse.Namespace) -> None:
    settings = ScreenSettings(
        false_positives=options.false_positives,
        folds=options.folds,
        rounds=options.rounds,
        epochs=options.epochs,
        width=options.width,
        layer=options.layer,
        seed=options.seed,
    )
    missing = [name for name in ("art", "cleanlab", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"screening needs {', '.join(missing)}: install palisade with its extra 'screen'")
    dataset, folder = load(options), options.out
    folder.mkdir(parents=True, exist_ok=True)
    with started(options.device, stop=Stop(options.minutes)) as worker:
        if worker.count > 1:
            raise ValueError("a screening runs in one process: start it without torchrun")
        found = screen(dataset, settings, folder, worker.device, worker)
    write_quarantine(found, dataset, settings, folder / "quarantine.json")
    write_page(found, dataset, settings, folder / "report.html")
    count = int(found.quarantined.sum())
    print(
        f"{folder / 'quarantine.json'}: {count} of {len(dataset.train)} training samples ({count / len(dataset.train):.1%}) "
        f"look mislabelled or tampered with; {folder / 'report.html'} shows them. Nothing was deleted"
    )
