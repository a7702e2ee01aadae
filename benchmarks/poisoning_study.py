"""The study of benchmarks.poisoning: a folder of cells, each an arm trained on what an attack left of the data.

A finished cell is a JSON file, one that was begun a folder of states to go on from, and a lock keeps a cell to one process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import poisoning_defences
from benchmarks.poisoning_arms import ARMS, Size, caught, judge, judged_on, stages, train
from benchmarks.poisons import KNOWLEDGE, POISONS, Poison, Poisoned, apply, subset, with_training
from training.data import Dataset
from training.plan import costs
from training.pretrain import Alone
from training.run_folder import RunFolder, git_revision
from training.worker import Worker

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
        return "--".join(_slug(str(part)) for part in (self.arm, self.attack, self.seed))


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
        self.revision = git_revision()  # of what was loaded, whatever is committed while it runs
        # Cells without screening don't depend on how it is done, so screened cells say that themselves.
        shared = {name: value for name, value in asdict(size).items() if not name.startswith("screen_")}
        (proxy,) = [arm for arm in ARMS if arm.kind == "adversarial"]
        attacker = {**KNOWLEDGE, "proxy": asdict(size.recipe(proxy, self.dataset).experts[0])}
        digests = {"training_sha256": self.dataset.digest, "test_sha256": dataset.test_digest}
        self.settings = json.loads(json.dumps({"size": shared, "attacker": attacker, **digests}))
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
            row = {**asdict(cell), **self._figures(cell), "git_revision": self.revision}
            write(record, row)
            shutil.rmtree(self._folder(cell.stem))
        return row

    def _figures(self, cell: Cell) -> dict[str, Any]:
        (arm,) = [arm for arm in ARMS if arm.name == cell.arm]
        (poison,) = [poison for poison in POISONS if poison.name == cell.attack]
        poisoned, found, screening_minutes = self.poisoned(poison, cell.seed), {}, None
        dataset = poisoned.dataset
        if arm.screened:
            quarantined, found = self._screened(cell, poisoned)
            screening_minutes = found["screening"]["minutes"]
            dataset = dataset.without(torch.from_numpy(np.flatnonzero(quarantined)))
        folder = self._folder(cell.stem) / "training"
        resumed, began = folder.exists(), time.process_time()
        network = train(arm, self.size, dataset, folder, cell.seed, self.worker)
        minutes = {"training": _minutes_since(began, resumed), "screening": screening_minutes}
        if arm.kind == "partition":
            experts = self.size.recipe(arm, dataset).architecture.num_experts
            test = judged_on(dataset.test, self.size)
            found["certified"] = poisoning_defences.certified(network, experts, test, self.worker.device)
        return {
            **judge(network, dataset.test, self.size, self.worker.device),
            **found,
            "poisoned": int(poisoned.touched.sum()),
            "training_images": len(dataset.train),
            "training_sha256": dataset.digest,
            "rolled_back": sorted({row["stage"] for row in RunFolder(folder).metrics() if row.get("event") == "rollback"}),
            "minutes": minutes,
            "threads": torch.get_num_threads(),
        }

    def _screened(self, cell: Cell, poisoned: Poisoned) -> tuple[np.ndarray, dict[str, Any]]:
        """Return which samples are put into quarantine, and what is recorded of it; both are kept for later runs."""
        kept, settings = self.out / "screenings" / f"{cell.stem}.npz", self.size.screening(cell.seed)
        told, data = poisoning_defences.told(settings), poisoned.dataset.digest
        if not kept.exists():
            folder = self._folder(cell.stem) / "screening"
            resumed, began = folder.exists(), time.process_time()
            screening = poisoning_defences.screened(poisoned.dataset, folder, settings, self.worker)
            how = {"data_sha256": data, "git_revision": self.revision, "minutes": _minutes_since(began, resumed)}
            found = {
                **caught(poisoned.touched, screening.quarantined),
                "detectors": {name: caught(poisoned.touched, screening.flagged(name)) for name in screening.scores},
                "wrong_labels": screening.wrong_labels,
                "screeners": told,
                "screening": how,
            }
            save(kept, quarantined=screening.quarantined, found=np.array(json.dumps(found)))
        with np.load(kept, allow_pickle=False) as file:
            quarantined, found = file["quarantined"], json.loads(str(file["found"]))
        if found["screeners"] != told or found["screening"]["data_sha256"] != data:
            raise SystemExit(f"{kept} is of a screening of other data or with other settings: remove it, or use another --out")
        return quarantined, found

    def poisoned(self, poison: Poison, seed: int) -> Poisoned:
        """Return the poisoned data; what a clean-label backdoor made of its images is kept, since a network went into it."""
        if poison.kind != "clean label":
            return apply(poison, self.dataset, seed)
        kept = self._kept(poison, seed)
        with locked(self.out / "poisons.lock", wait=True):
            if not kept.exists():
                made = apply(poison, self.dataset, seed, self._proxy())
                images = made.dataset.train.images.permute(0, 2, 3, 1)[torch.from_numpy(made.touched)].numpy()
                save(kept, images=images, touched=made.touched)
        with np.load(kept, allow_pickle=False) as file:
            images, touched = self.dataset.train.images.permute(0, 2, 3, 1).numpy().copy(), file["touched"]
            images[touched] = file["images"]
        return Poisoned(with_training(self.dataset, images, self.dataset.train.labels.numpy()), touched)

    def _kept(self, poison: Poison, seed: int) -> Path:
        return self.out / "poisons" / f"{_slug(poison.name)}--{seed}.npz"

    def pictures(self, count: int = 6) -> dict[str, tuple[np.ndarray, list[str]]]:
        """Return some images of each kind of poison, before and after, `(2, K, H, W, 3)`, and captions; none not made yet."""
        found, names = {}, self.dataset.label_names
        for poison in {poison.kind: poison for poison in reversed(POISONS)}.values():
            if poison.kind == "none" or (poison.kind == "clean label" and not self._kept(poison, 0).exists()):
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
        (arm,) = [arm for arm in ARMS if arm.name == name]
        of_arm = [row["minutes"] for row in self.rows() if row["arm"] == name]
        parts = ("training", "screening") if arm.screened else ("training",)
        known = [[each[part] for each in of_arm if each[part] is not None] for part in parts]
        if all(known):
            return sum(statistics.mean(minutes) for minutes in known)
        if arm.screened:
            return None
        scratch = self._folder("plan")
        return sum(cost.minutes for cost in costs(stages(arm, self.size, self.dataset, scratch, self.worker), self.worker))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _minutes_since(began: float, resumed: bool) -> float | None:
    """Return the processor's minutes since `began`; `None` if something was done before, in a process that is gone."""
    return None if resumed else (time.process_time() - began) / 60


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


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as an `.npz` file in one step, and its folder if there is none."""
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".partial").open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(path.with_suffix(".partial"), path)
