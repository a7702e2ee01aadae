"""What poisoned training data does to a plain network, an adversarially trained one, the mixture, and its defences.

    python -m benchmarks.poisoning --data data/cifar10.npz --out runs/poisoning
        [--arms "mixture;mixture, screened"] [--attacks "clean;flips 20 %"] [--seeds 3] [--images 50000] [--threads 1]
        [--plan] [--report]

A fixed, class-balanced subset of CIFAR-10's training images (`--images`) is poisoned (`benchmarks.poisons`), an arm is trained
on it (`benchmarks.poisoning_arms`), and the test images say what came of it. A cell is an arm, an attack and a seed, which
chooses the poisoned images and the training's randomness. Main rows (20 % random flips and BadNets, for the mixture and the
screened mixture, and the mixture on clean data) have `--seeds` seeds, all others one; 5 and 40 % of flips are for the plain
network and those two, the robust options are tried on clean data, 20 % flips and BadNets, and clean-label backdoors in fewer
images on the two single networks.

Figures of a cell: share of the test images that are right (`clean`), and of 500 of them under PGD-10, epsilon 8/255, step
2/255, in float32 through the network (`robust`); share of the test images of other classes than the target that carry the patch
and are taken for the target (`backdoor`), and of all test images that are taken for the class that follows theirs (`pair`);
share of the poison and of the clean images that screening put into quarantine, by each detector and together; processor
minutes of training and of screening.

Every finished cell is a JSON file in `cells/` under `--out`, and what its screening found is kept in `screenings/`; remove both
to have it made anew. A run that was stopped, or killed, goes on inside the cell it was at. Several processes may share one
`--out`: each takes cells that no other has locked. With one thread each they don't wait for one another, so two cores are best
used by two processes. Before it starts, a process prints how long every cell should take, from a few measured steps; `--plan`
stops there. `--report` runs nothing. Both end with `report.html`, a page with pictures, `table.md` and one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import poisoning_report
from benchmarks.hardware import describe
from benchmarks.poisoning_arms import ARMS, Arm, Size
from benchmarks.poisoning_study import Cell, Study
from benchmarks.poisons import POISONS, Poison
from training.loading import load_dataset
from training.measure import exact_float32
from training.worker import StopRequested, started

MAIN_ATTACKS = ("clean", "flips 20 %", "BadNets 1 %")
MAIN_ARMS = ("mixture", "mixture, screened")
MAIN_CELLS = tuple(
    (arm, attack) for arm in MAIN_ARMS for attack in MAIN_ATTACKS if (arm, attack) != ("mixture, screened", "clean")
)
"""Those with several seeds: on clean data the mixture is what the screened one is held against."""
FAINTER = ("clean-label backdoor 5 %", "clean-label backdoor 1 %")
"""Where a backdoor decides nearly always, nothing can be seen of who is easier to fool."""


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
    if attack.name in FAINTER:
        return arm.kind in ("plain", "adversarial")
    return not arm.optional or attack.name in MAIN_ATTACKS


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
    how = {"settings": study.settings, "git_revision": study.revision, "hardware": describe()}
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
