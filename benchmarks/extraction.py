"""What stealing the model by asking is worth under each output policy, and what it costs.

    python -m benchmarks.extraction --data data/cifar10.npz --pool data/cifar100-pool.npz --out runs/extraction
        [--budgets 2000,500,125,10000] [--thieves "random;adaptive;JBDA;random, recovering"] [--pools "cifar100;cifar10;both"]
        [--policies "full;label only"] [--seeds 3] [--report]

A thief asks about images of a pool (20,000 of CIFAR-100, or one half of CIFAR-10's test images, or both) and trains a clone on
the answers, always by the same recipe: a plain ResNet-18 of width 16, Muon, one-cycle, averaged weights, crops and mirror
images, cross-entropy with the answers as distributions. Clones are judged on the other half of the test images. Answers are
those of the checkpoint's fast path, computed once (kept in `build/`), as `service.policy` lets them out. See
`benchmarks.extraction_thief` for the thieves; one that is `recovering` knows the policy and guesses the exact probabilities
first. Mirror images are asked about when a budget is larger than the pool: 49,980 images are all that pool `both` has.

A cell is a thief, a pool, a policy, a budget and a seed. Its figures: accuracy of the clone; agreement (it names the model's
class); `fooled` (images that the model gets right and then not, after PGD-20 with epsilon 8/255, step 2/255 and a random start,
made on the clone in bfloat16; the report says how many the same amount of random signs fools); L1 distance of the answers, and
of what the thief made of them, from the exact ones. Every finished cell is a line of `results.jsonl` in `--out`; a run that was
stopped goes on there. `--report` runs nothing. Both end with Markdown tables, also in `report.md`, with `agreement.png`, and
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import extraction_adaptive, extraction_report, extraction_thief
from benchmarks.detection_callers import Predict
from benchmarks.extraction_thief import Student
from benchmarks.extraction_victim import POLICIES, Scene, as_targets, make_scene, shown
from benchmarks.hardware import describe
from benchmarks.record import Record
from benchmarks.running_service import numbers
from model.fast_path import FastPath, load_fast_path
from service.policy import Policy
from training.attack import Attack
from training.data import Split
from training.loading import load_dataset
from training.measure import Bench
from training.run_folder import git_revision

EPSILON = 8 / 255
PGD_20 = Attack.pgd(EPSILON, 20, 2 / 255)
THIEVES = ("random", "adaptive", "JBDA", "random, recovering")
REPEATS = 10


@dataclass(frozen=True)
class Cell:
    """One theft."""

    thief: str
    pool: str
    policy: str
    budget: int
    seed: int


def main() -> None:
    """Run the cells that are not recorded yet, print the tables and end with one JSON line."""
    options = _options()
    record = Record(options.out / "results.jsonl")
    student = Student(options.width, options.epochs)
    fast_path = load_fast_path(options.checkpoint, "cpu")
    dataset = load_dataset(options.data)
    settings = {
        "checkpoint": fast_path.version,
        "precision": fast_path.precision,
        "test_sha256": dataset.test_digest,
        "student": asdict(student),
        "attacked": options.attacked,
    }
    if not options.report:
        with np.load(options.pool, allow_pickle=False) as file:
            pool = file["images"], file["labels"]
        name = f"{fast_path.version}-{dataset.test_digest[:12]}-{len(pool[0])}"
        scene = make_scene(dataset, pool, _predictor(fast_path), name, options.attacked)
        _run(options, scene, student, record, settings)
    rows = [row for row in record.rows if row["settings"] == settings]
    extraction_report.write(rows, options.budgets, options.before, options.out)
    how = {"settings": settings, "git_revision": git_revision(), "torch": torch.__version__, "hardware": describe()}
    print(json.dumps({"benchmark": "extraction", **how, "rows": rows}))


def _predictor(fast_path: FastPath) -> Predict:
    def predict(images: np.ndarray) -> np.ndarray:
        parts = [np.ascontiguousarray(images[start : start + 64]) for start in range(0, len(images), 64)]
        return np.concatenate([fast_path.predict(part).probabilities for part in parts])

    return predict


def _run(options: argparse.Namespace, scene: Scene, student: Student, record: Record, settings: dict[str, Any]) -> None:
    """Add what is missing to the record."""
    if not record.count(kind="model", settings=settings):
        record.add({"kind": "model", **model_figures(scene), "settings": settings})
    for policy in ("2 decimals", "1 decimal"):
        if not record.count(kind="repeats", policy=policy, settings=settings):
            images = scene.pools["cifar10"].images[: options.attacked]
            found = extraction_adaptive.repeats(scene.predict, images, POLICIES[policy], REPEATS, seed=0)
            record.add({"kind": "repeats", "policy": policy, "images": len(images), **found, "settings": settings})
    for cell in cells(options):
        if not record.count(kind="theft", **asdict(cell), settings=settings):
            record.add({"kind": "theft", **asdict(cell), **steal(cell, scene, student), "settings": settings})


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield the grid, one seed after another, so that a run that is stopped early has every policy.

    Thieves who differ from the random one in what they ask are shown under the most and the least that a policy may tell;
    one who recovers, where guessing can add something; JBDA starts with photos of the kind that the model knows.
    """
    extremes = ("full", "label only")
    coarse = ("1 decimal", "reverse sigmoid", "label only")
    covered = {"random": tuple(POLICIES), "adaptive": extremes, "JBDA": extremes, "random, recovering": coarse}
    for seed in range(options.seeds):
        for budget in options.budgets:
            for thief in options.thieves:
                for pool in options.pools:
                    if (thief == "JBDA" and pool != "cifar10") or (thief == "adaptive" and pool != "cifar100"):
                        continue
                    for policy in options.policies:
                        if policy in covered[thief]:
                            yield Cell(thief, pool, policy, budget, seed)


def steal(cell: Cell, scene: Scene, student: Student) -> dict[str, float]:
    """Return a cell's figures."""
    policy, pool = POLICIES[cell.policy], scene.pools[cell.pool]
    ask = asking(policy, pool.exact.shape[1], cell)
    started, processor = time.perf_counter(), time.process_time()
    chosen = (pool, ask, cell.budget, cell.seed, student)
    if cell.thief == "JBDA":
        theft = extraction_thief.augmenting(*chosen, scene.predict)
    else:
        theft = (extraction_thief.adaptive if cell.thief == "adaptive" else extraction_thief.random)(*chosen)
    seconds = {"seconds": time.perf_counter() - started, "processor_s": time.process_time() - processor}
    return {
        **judge(theft.clone, scene, cell.seed),
        "l1_answers": _distance(shown(policy, theft.exact), theft.exact),
        "l1_targets": _distance(ask(theft.exact), theft.exact),
        **{name: round(value, 1) for name, value in seconds.items()},
    }


def asking(policy: Policy, classes: int, cell: Cell) -> extraction_thief.Ask:
    """Return what a thief makes of exact answers after a policy."""
    if not cell.thief.endswith("recovering"):
        return lambda exact: as_targets(shown(policy, exact))
    recover = extraction_adaptive.recovery(policy, classes, cell.seed)
    return lambda exact: recover(shown(policy, exact))


def _distance(answers: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(answers - exact).sum(axis=1).mean())


def judge(clone: torch.nn.Module, scene: Scene, seed: int) -> dict[str, float]:
    """Return a clone's accuracy, its agreement with the model, and what share of the model's answers attacks on it turn."""
    device = torch.device("cpu")
    named = Split(scene.scored.images, torch.from_numpy(scene.scored_exact.argmax(axis=1)))
    with torch.autocast("cpu", torch.bfloat16):
        accuracy = Bench(scene.scored, device).judge(clone).float().mean().item()
        agreement = Bench(named, device).judge(clone).float().mean().item()
        attacked = Bench(scene.attacked, device, seed).attacked(clone, PGD_20)
    return {"accuracy": accuracy, "agreement": agreement, "fooled": fooled(attacked, scene)}


def fooled(attacked: torch.Tensor, scene: Scene) -> float:
    """Return the share of images, once right, that the model gets wrong as ``attacked``."""
    found = scene.predict(attacked.contiguous().numpy()).argmax(axis=1)
    return float((found != scene.attacked.labels.numpy()).mean())


def model_figures(scene: Scene) -> dict[str, float]:
    """Return the model's own accuracy on the scored images, and what share random signs fool."""
    images = scene.attacked.images.float() / 255
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    right = scene.scored_exact.argmax(axis=1) == scene.scored.labels.numpy()
    noise = fooled((images + EPSILON * signs).clamp(0, 1), scene)
    return {"scored": len(right), "attacked": len(images), "accuracy": float(right.mean()), "fooled_by_signs": noise}


def _options() -> argparse.Namespace:
    def names(known: tuple[str, ...]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(";")
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"no {name!r}; there are: {'; '.join(known)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the .npz file of CIFAR-10")
    parser.add_argument("--pool", required=True, help="an .npz file with images (N, H, W, 3) uint8 and labels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--budgets", type=numbers, default="2000,500,125,10000", help="queries")
    parser.add_argument("--thieves", type=names(THIEVES), default=";".join(THIEVES), help="separated by ;")
    parser.add_argument("--pools", type=names(("cifar100", "cifar10", "both")), default="cifar100;cifar10")
    parser.add_argument("--policies", type=names(tuple(POLICIES)), default=";".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=Student.width, help="of clones")
    parser.add_argument("--epochs", type=float, default=Student.epochs, help="passes over 2,000 answers")
    parser.add_argument("--attacked", type=int, default=500, help="images from which transfer attacks start")
    parser.add_argument("--before", type=int, default=105, help="images that an identity may ask about unsuspected")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is recorded")
    return parser.parse_args()


if __name__ == "__main__":
    main()
