"""What poisoned training data does to a plain network, an adversarially trained one, the mixture, and its defences.

    python -m benchmarks.poisoning --data data/cifar10.npz --out runs/poisoning
        [--arms "mixture;mixture, screened"] [--attacks "clean;flips 20 %"] [--seeds 3] [--images 50000] [--threads 1]
        [--plan] [--report]

A fixed, class-balanced subset of CIFAR-10's training images (`--images`) is poisoned (`benchmarks.poisons`), an arm is trained
on it (`benchmarks.poisoning_arms`), and the test images say what came of it. A cell is an arm, an attack and a seed, which
chooses the poisoned images and the training's randomness. Main rows (20 % random flips and BadNets, for the mixture and the
screened mixture, and the mixture on clean data) have `--seeds` seeds, all others one; 5 and 40 % of flips are for the plain
network and those two, and the robust options are tried on clean data, 20 % flips and BadNets.

Figures of a cell: share of the test images that are right (`clean`), and of 500 of them under PGD-10, epsilon 8/255, step
2/255, in float32 through the network (`robust`); share of the test images of other classes than the target that carry the patch
and are taken for the target (`backdoor`), and of all test images that are taken for the class that follows theirs (`pair`);
share of the poison and of the clean images that screening put into quarantine, by each detector and together; processor
minutes of training and of screening.

Every finished cell is a JSON file under `--out`; a run that was stopped, or killed, goes on inside the cell it was at. Several
processes may share one `--out`: each takes cells that no other has locked. With one thread each they don't wait for one
another, so two cores are best used by two processes. Before it starts, a process prints how long every cell should take, from a
few measured steps; `--plan` stops there. `--report` runs nothing. Both end with `report.html`, a page with pictures,
`table.md` and one JSON line.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import poisoning_defences, poisoning_report
from benchmarks.hardware import describe
from benchmarks.poisoning_arms import ARMS, Arm, Size, caught, judge, stages, train
from benchmarks.poisons import POISONS, Poison, Poisoned, apply, subset, with_training
from training.data import Dataset
from training.loading import load_dataset
from training.measure import exact_float32
from training.plan import costs
from training.pretrain import Alone
from training.run_folder import git_revision
from training.worker import StopRequested, Worker, started

MAIN_ATTACKS = ("clean", "flips 20 %", "BadNets 1 %")
MAIN_ARMS = ("mixture", "mixture, screened")
MAIN_CELLS = tuple(
    (arm, attack) for arm in MAIN_ARMS for attack in MAIN_ATTACKS if (arm, attack) != ("mixture, screened", "clean")
)
"""Those with several seeds: on clean data the mixture is what the screened one is held against."""
ATTACKER = 1000
"""Added to nothing of the defender's: the seed of the attacker's own network."""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    arm: str
    attack: str
    seed: int

    @property
    def stem(self) -> str:
        """Name of the cell's files."""
        return "--".join(
            re.sub(r"[^a-z0-9]+", "-", str(part).lower()).strip("-") for part in (self.arm, self.attack, self.seed)
        )


def cells(arms: list[Arm], attacks: list[Poison], seeds: int) -> Iterator[Cell]:
    """Yield the grid so that a run that is stopped early has something of each.

    First one seed of all arms but the mixture's options, then the main rows' other seeds, then those options.
    """
    for optional, several in ((False, range(1)), (False, range(1, seeds)), (True, range(1))):
        for seed in several:
            for attack in attacks:
                for arm in arms:
                    if arm.optional == optional and _wanted(arm, attack, seed):
                        yield Cell(arm.name, attack.name, seed)


def _wanted(arm: Arm, attack: Poison, seed: int) -> bool:
    if seed:
        return (arm.name, attack.name) in MAIN_CELLS
    if attack.name in ("flips 5 %", "flips 40 %"):
        return arm.name in MAIN_ARMS or arm.kind == "plain"
    return not arm.optional or attack.name in MAIN_ATTACKS


class Study:
    """The folder of a run, and what its cells share.

    Args:
        out: The folder.
        dataset: The whole data.
        size: How large everything is; a folder that was begun with another is refused.
        worker: Where to train.
    """

    def __init__(self, out: Path, dataset: Dataset, size: Size, worker: Worker) -> None:
        self.out, self.size, self.worker = out, size, worker
        self.dataset = subset(dataset, size.images)
        # Cells without screening don't depend on how it is done, so screened cells say that themselves.
        shared = {name: value for name, value in asdict(size).items() if not name.startswith("screen_")}
        self.settings = {"size": shared, "training_sha256": self.dataset.digest, "test_sha256": dataset.test_digest}
        (out / "cells").mkdir(parents=True, exist_ok=True)
        with locked(out / "settings.lock", wait=True):
            path = out / "settings.json"
            if not path.exists():
                write(path, self.settings)
            found = json.loads(path.read_text())
        if found != self.settings:
            raise SystemExit(f"--out {out} holds cells of other settings ({found}), not {self.settings}: choose another folder")

    def rows(self) -> list[dict[str, Any]]:
        """Return all finished cells."""
        return [json.loads(path.read_text()) for path in sorted((self.out / "cells").glob("*.json"))]

    def run(self, cell: Cell) -> dict[str, Any] | None:
        """Run a cell to its end, record it and return its row; ``None`` if another process is at it, or it was done before."""
        record = self.out / "cells" / f"{cell.stem}.json"
        with locked(record.with_suffix(".lock")) as ours:
            if not ours or record.exists():
                return None
            row = {**asdict(cell), **self._figures(cell), "git_revision": git_revision()}
            write(record, row)
            shutil.rmtree(self._folder(cell.stem))
        return row

    def _figures(self, cell: Cell) -> dict[str, Any]:
        (arm,) = [arm for arm in ARMS if arm.name == cell.arm]
        (poison,) = [poison for poison in POISONS if poison.name == cell.attack]
        poisoned, folder = self.poisoned(poison, cell.seed), self._folder(cell.stem)
        found: dict[str, Any] = {}
        resumed, began = folder.exists(), time.process_time()
        dataset = poisoned.dataset
        if arm.screened:
            settings = self.size.screening(cell.seed)
            screening = poisoning_defences.screened(dataset, folder / "screening", settings, self.worker)
            flagged = {name: caught(poisoned.touched, screening.flagged(name)) for name in screening.scores}
            found = {
                **caught(poisoned.touched, screening.quarantined),
                "detectors": flagged,
                "wrong_labels": screening.wrong_labels,
                "screeners": poisoning_defences.told(settings),
            }
            dataset = dataset.without(torch.from_numpy(np.flatnonzero(screening.quarantined)))
        screened_s, began = time.process_time() - began, time.process_time()
        network = train(arm, self.size, dataset, folder / "training", cell.seed, self.worker)
        training, experts = time.process_time() - began, self.size.recipe(arm, dataset).architecture.num_experts
        if arm.kind == "partition":
            found["certified"] = poisoning_defences.certified(network, experts, dataset.test, self.worker.device)
        judged = judge(network, dataset.test, self.size, self.worker.device)
        minutes = {"training": training / 60, "screening": screened_s / 60 if arm.screened else None, "resumed": resumed}
        return {
            **judged,
            **found,
            "poisoned": int(poisoned.touched.sum()),
            "minutes": minutes,
            "threads": torch.get_num_threads(),
        }

    def poisoned(self, poison: Poison, seed: int) -> Poisoned:
        """Return the poisoned data; what a clean-label backdoor made of its images is kept, since a network went into it."""
        if poison.kind != "clean label":
            return apply(poison, self.dataset, seed)
        kept = self.out / "poisons" / f"{seed}.npz"
        with locked(self.out / "poisons.lock", wait=True):
            if not kept.exists():
                made = apply(poison, self.dataset, seed, self._proxy())
                images = made.dataset.train.images.permute(0, 2, 3, 1)[torch.from_numpy(made.touched)].numpy()
                kept.parent.mkdir(exist_ok=True)
                with kept.with_suffix(".partial").open("wb") as file:
                    np.savez(file, allow_pickle=False, images=images, touched=made.touched)
                os.replace(kept.with_suffix(".partial"), kept)
        with np.load(kept, allow_pickle=False) as file:
            images, touched = self.dataset.train.images.permute(0, 2, 3, 1).numpy().copy(), file["touched"]
            images[touched] = file["images"]
        return Poisoned(with_training(self.dataset, images, self.dataset.train.labels.numpy()), touched)

    def pictures(self, count: int = 6) -> dict[str, tuple[np.ndarray, list[str]]]:
        """Return some images of each poison, before and after, `(2, K, H, W, 3)`, and captions; none that is not made yet."""
        found, names = {}, self.dataset.label_names
        for poison in POISONS:
            if poison.kind == "none" or (poison.kind == "clean label" and not (self.out / "poisons" / "0.npz").exists()):
                continue
            poisoned = self.poisoned(poison, 0)
            rows = torch.from_numpy(np.flatnonzero(poisoned.touched)[:: max(1, poisoned.touched.sum() // count)][:count])
            both = [data.train.take(rows) for data in (self.dataset, poisoned.dataset)]
            labels = [[names[label] for label in split.labels.tolist()] for split in both]
            captions = [old if old == new else f"{old}, labelled {new}" for old, new in zip(*labels, strict=True)]
            found[poison.name] = np.stack([split.images.permute(0, 2, 3, 1).numpy() for split in both]), captions
        return found

    def _proxy(self) -> Alone:
        """Return the attacker's own network: adversarially trained, on the images as they were before."""
        (arm,) = [arm for arm in ARMS if arm.kind == "adversarial"]
        network = train(arm, self.size, self.dataset, self._folder("proxy"), ATTACKER, self.worker)
        assert isinstance(network, Alone)
        return network

    def _folder(self, stem: str) -> Path:
        return self.out / "runs" / stem

    def plan(self, wanted: list[Cell]) -> str:
        """Return a table of the cells that are missing and the minutes that each should take."""
        known: dict[str, float | None] = {}
        lines, total = ["| arm | attack | seed | minutes, estimated |", "|---|---|---|---|"], 0.0
        for cell in wanted:
            if (self.out / "cells" / f"{cell.stem}.json").exists():
                continue
            if cell.arm not in known:
                known[cell.arm] = self._minutes(cell.arm)
            minutes = known[cell.arm]
            total += minutes or 0
            lines.append(f"| {cell.arm} | {cell.attack} | {cell.seed} | {'?' if minutes is None else f'{minutes:.1f}'} |")
        lines.append(f"| all | | | {total:.1f} |")
        return "\n".join(lines) + "\n\nOf one process; ? is not known before the first such cell is done, and not in the sum."

    def _minutes(self, name: str) -> float | None:
        """Return what cells of an arm took, or should take from a few measured steps; ``None`` if neither can be known."""
        done = [row["minutes"] for row in self.rows() if row["arm"] == name and not row["minutes"]["resumed"]]
        if done:
            return sum(each["training"] + (each["screening"] or 0) for each in done) / len(done)
        (arm,) = [arm for arm in ARMS if arm.name == name]
        if arm.screened:
            return None
        scratch = self._folder("plan")
        return sum(cost.minutes for cost in costs(stages(arm, self.size, self.dataset, scratch, self.worker), self.worker))


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a file inside the block, and tell whether it could be had; it goes with the process, however that ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    path.with_suffix(".partial").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".partial"), path)


def main() -> None:
    """Run the cells that are not recorded yet, write the report and end with one JSON line."""
    options = _options()
    torch.set_num_threads(options.threads)
    exact_float32()
    dataset = load_dataset(options.data)
    with started(options.device) as worker:
        size = Size(**{name: getattr(options, name) for name in Size.__dataclass_fields__})
        study = Study(options.out, dataset, size, worker)
        if not options.report:
            wanted = list(cells(options.arms, options.attacks, options.seeds))
            print(study.plan(wanted), flush=True)
            if options.plan:
                return
            try:
                for cell in wanted:
                    if row := study.run(cell):
                        print(json.dumps(row), flush=True)
            except StopRequested as stop:
                raise SystemExit(f"stopped ({stop.reason}): the same command goes on") from stop
        poisoning_report.write(study.rows(), study.settings, study.pictures(), options.out)
    how = {"settings": study.settings, "git_revision": git_revision(), "hardware": describe()}
    print(json.dumps({"benchmark": "poisoning", **how, "rows": study.rows()}))


def _options() -> argparse.Namespace:
    def named(known: tuple[Any, ...]) -> Any:
        def parse(text: str) -> list[Any]:
            names = {each.name: each for each in known}
            for name in text.split(";"):
                if name not in names:
                    raise argparse.ArgumentTypeError(f"no {name!r}; there are: {'; '.join(names)}")
            return [names[name] for name in text.split(";")]

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the .npz file of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", type=named(ARMS), default=list(ARMS), help="separated by ;")
    parser.add_argument("--attacks", type=named(POISONS), default=list(POISONS), help="separated by ;")
    parser.add_argument("--seeds", type=int, default=3, help="of the main rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plan", action="store_true", help="only print how long it should take")
    parser.add_argument("--report", action="store_true", help="only write the report of what is recorded")
    for name, field in Size.__dataclass_fields__.items():
        kind = float if name.endswith("epochs") else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help="see Size in poisoning_arms")
    return parser.parse_args()


if __name__ == "__main__":
    main()
