"""What each ingredient of the recipes adds, to clean accuracy and to accuracy under PGD-20, for its cost.

    python -m benchmarks.ablation --data data/cifar10.npz --out runs/ablation [--seeds 3] [--arms "baseline;TRADES, beta 6"]

Part one trains single experts of width 8 on a fixed subset of the training images; each arm changes one thing in the baseline
(N-FGSM at 8/255, Muon, one-cycle, averaged weights, batch-norm statistics held while attacking). Part two trains small
mixtures of three such experts jointly. Judged on held-out training images, never on test images: PGD-20, step 2/255, random
start, in bfloat16. The same images, seeds and starting noise for every arm, so differences are paired by seed.

The column ``at equal compute`` compares with the baseline trained for as many minutes of processor time, on the line through
the baseline and the baseline with twice the epochs. With 500 held-out images a figure's 95 % interval is about 4 points wide
to either side; the same images stand under every arm, so differences vary less. Every result is a line in
``results.jsonl``; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import describe
from benchmarks.record import Record
from model.architecture import Architecture
from model.mixture import Mixture
from training.attack import Attack
from training.data import Dataset, Split
from training.joint import JointTask
from training.loading import load_dataset
from training.measure import accuracy_under
from training.pretrain import Alone, ExpertTask
from training.recipe import ExpertRecipe, JointLoss, Recipe, Schedule
from training.run_folder import git_revision
from training.stage import Stage, Trainer
from training.task import Task
from training.worker import Worker

CPU = torch.device("cpu")
PGD_20 = Attack.pgd(8 / 255, 20, 2 / 255)
BASE, TWICE, JOINT_BASE = "baseline", "baseline, twice the epochs", "joint: baseline"
N_FGSM = ExpertRecipe("fgsm", epsilons=(8 / 255,))


@dataclass(frozen=True)
class Arm:
    """One thing changed: settings of the schedule, of the expert's recipe, of the architecture, of joint training."""

    name: str
    schedule: dict[str, Any] = field(default_factory=dict)
    expert: dict[str, Any] = field(default_factory=dict)
    activation: str = "relu"
    loss: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    task: type[JointTask] = JointTask


class LogitMixing(JointTask):
    """Mixes logits instead of probabilities: the weighted mean of log-probabilities, normalised."""

    def mix(self, gate: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Return the log-softmax of ``sum_k g_k z_k``."""
        return (gate.exp().unsqueeze(2) * experts).sum(dim=1).log_softmax(dim=1)


SINGLE = (
    Arm(BASE),
    Arm(TWICE, schedule={"twice": True}),
    Arm("FGSM without noise", expert={"noise": False}),
    Arm("PGD-AT, 3 steps", expert={"family": "pgd", "steps": (3,)}),
    Arm("TRADES, beta 6", expert={"loss": "trades"}),
    Arm("MART, beta 5", expert={"loss": "mart", "beta": 5.0}),
    Arm("AWP, gamma 0.005", schedule={"weight_perturbation": 0.005}),
    Arm("label smoothing 0.1", schedule={"label_smoothing": 0.1}),
    Arm("without averaging", schedule={"ema_decay": 0.0}),
    Arm("SWA over the last quarter", schedule={"swa_from": 0.75}),
    Arm("CutMix, alpha 1", schedule={"cutmix": 1.0}),
    Arm("IDBH, weak", schedule={"augmentation": "idbh"}),
    Arm("SiLU", activation="silu"),
    Arm("statistics not held", schedule={"hold_statistics": False}),
    Arm("SGD, peak 0.2", schedule={"optimiser": "sgd", "peak_lr": 0.2}),
    Arm("constant learning rate", schedule={"warmup": 0.0, "final_lr": 1.0}),
)
JOINT = (
    Arm(JOINT_BASE),
    Arm("joint: logits mixed", task=LogitMixing),
    Arm("joint: temperature 0.25", recipe={"gate_temperature": 0.25}),
    Arm("joint: no load balancing", loss={"balance": 0.0}),
    Arm("joint: diversity 0.05", loss={"diversity": 0.05}),
    Arm("joint: top-2 in training", loss={"top_k": 2}),
    Arm("joint: no per-expert term", loss={"experts": 0.0}),
    Arm("joint: no clean term", loss={"clean": 0.0}),
)


@dataclass(frozen=True)
class Bench:
    """The data and sizes that all arms share."""

    train: Split
    holdout: Split
    num_classes: int
    width: int
    epochs: float
    joint_epochs: float
    batch_size: int

    def architecture(self, activation: str = "relu") -> Architecture:
        """Return a mixture of three experts."""
        height, width = self.train.images.shape[2:]
        sizes = {"height": height, "input_width": width, "num_experts": 3, "gate_width": self.width}
        return Architecture(self.width, self.num_classes, **sizes, activation=activation)  # type: ignore[arg-type]

    def single(self, arm: Arm, seed: int) -> tuple[dict[str, float], Alone]:
        """Train one expert and return its figures and itself."""
        changes = dict(arm.schedule)
        epochs = self.epochs * (2 if changes.pop("twice", False) else 1)
        schedule = replace(Schedule(epochs=epochs, batch_size=self.batch_size), **changes)
        architecture = self.architecture(arm.activation)
        torch.manual_seed(seed)
        network = Alone(Mixture(architecture).experts[0], architecture).to(memory_format=torch.channels_last)
        task = ExpertTask(network, replace(N_FGSM, **arm.expert), schedule, self.holdout, CPU)
        averaged, seconds = self._train(task, seed)
        assert isinstance(averaged, Alone)
        return self._figures(averaged, seconds), averaged

    def joint(self, arm: Arm, seed: int, experts: list[Alone]) -> dict[str, float | list[float]]:
        """Train a mixture of copies of ``experts`` jointly and return its figures."""
        architecture = self.architecture()
        torch.manual_seed(seed)
        mixture = Mixture(architecture).to(memory_format=torch.channels_last)
        for expert, trained in zip(mixture.experts, experts, strict=True):
            expert.load_state_dict(trained.expert.state_dict())
        schedule = Schedule(epochs=self.joint_epochs, batch_size=self.batch_size, peak_lr=0.02)
        loss = replace(JointLoss(), **arm.loss)
        recipe = replace(Recipe("ablation", architecture, (N_FGSM,) * 3, schedule, schedule, schedule, loss), **arm.recipe)
        mixture.gate.set_temperature(recipe.gate_temperature)
        task = arm.task(mixture, recipe, self.holdout, CPU)
        averaged, seconds = self._train(task, seed)
        assert isinstance(averaged, Mixture)
        with torch.no_grad():
            gate = averaged.components(self.holdout.images[:500].float() / 255)[0].exp().mean(dim=0)
        figures = self._figures(lambda images: task.mix(*averaged.components(images)), seconds)
        return {**figures, "gate": [round(weight, 3) for weight in gate.tolist()]}

    def _train(self, task: Task, seed: int) -> tuple[torch.nn.Module, float]:
        trainer = Trainer(Stage("ablation", task, self.num_classes, seed, {}), self.train, Worker(CPU))
        started = time.process_time()  # of both cores; unlike the clock, it does not count waiting for other programs
        for step in range(trainer.steps):
            trainer.step(step)
        return trainer.progress.averaged.eval(), time.process_time() - started

    def _figures(self, log_probs: Any, seconds: float) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            clean = accuracy_under(log_probs, self.holdout, None, CPU)
            robust = accuracy_under(log_probs, self.holdout, PGD_20, CPU)
        return {"clean": 100 * clean, "pgd20": 100 * robust, "minutes": seconds / 60}


def main() -> None:
    """Train every arm with every seed, print the tables and end with one JSON line."""
    options = _options()
    dataset = load_dataset(options.data)
    bench = _bench(dataset, options)
    record = Record(options.out / "results.jsonl")
    unknown = options.arms - {arm.name for arm in (*SINGLE, *JOINT)}
    if unknown:
        raise SystemExit(f"no arm {sorted(unknown)[0]!r}; there are: {'; '.join(arm.name for arm in (*SINGLE, *JOINT))}")
    wanted = [arm for arm in (*SINGLE, *JOINT) if not options.arms or arm.name in options.arms]
    settings = {k: getattr(options, k) for k in ("width", "images", "epochs", "joint_epochs", "holdout", "batch_size")}
    settings |= {"data_sha256": dataset.digest, "torch": torch.__version__, "git_revision": git_revision()}
    rows = [row for row in record.rows if row["settings"] == settings]
    for seed in range(options.seeds):
        experts: list[Alone] = []
        for arm in wanted:
            if any(row["arm"] == arm.name and row["seed"] == seed for row in rows):
                continue
            if arm in JOINT and not experts:
                experts = [bench.single(SINGLE[0], 100 * seed + number)[1] for number in range(3)]
            figures = bench.joint(arm, seed, experts) if arm in JOINT else bench.single(arm, 100 * seed)[0]
            rows.append({"arm": arm.name, "seed": seed, "settings": settings, **figures})
            record.add(rows[-1])
    print(table(rows, BASE, TWICE), table(rows, JOINT_BASE, None), sep="\n\n")
    print(json.dumps({"benchmark": "ablation", "settings": settings, "hardware": describe(), "rows": rows}))


def table(rows: list[dict[str, Any]], base: str, twice: str | None) -> str:
    """Return a Markdown table of one part: mean and range over seeds, differences from ``base`` paired by seed.

    Args:
        rows: All results.
        base: The arm that the others are compared with; its part is the arms whose names share its prefix.
        twice: The arm that says what more of the baseline would have brought.
    """
    joint = base.startswith("joint: ")
    part: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["arm"].startswith("joint: ") == joint:
            part.setdefault(row["arm"], {})[row["seed"]] = row
    lines = [
        "| arm | processor minutes | clean | PGD-20 | clean, added | PGD-20, added | PGD-20 at equal compute |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in part.items():
        cells = [f"{statistics.mean(row['minutes'] for row in seeds.values()):.2f}"]
        cells += [_range([row[key] for row in seeds.values()]) for key in ("clean", "pgd20")]
        shared = [seed for seed in seeds if seed in part.get(base, {})]
        for key in ("clean", "pgd20"):
            cells.append(_range([seeds[seed][key] - part[base][seed][key] for seed in shared], sign="+"))
        cells.append(_at_equal_compute(part, seeds, base, twice))
        lines.append(f"| {name.removeprefix('joint: ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at_equal_compute(
    part: dict[str, dict[int, dict[str, Any]]], seeds: dict[int, dict[str, Any]], base: str, twice: str | None
) -> str:
    if twice is None or twice not in part or base not in part:
        return "-"

    def mean(rows: dict[int, dict[str, Any]], key: str) -> float:
        return statistics.mean(row[key] for row in rows.values())

    slope = (mean(part[twice], "pgd20") - mean(part[base], "pgd20")) / (
        mean(part[twice], "minutes") - mean(part[base], "minutes")
    )
    expected = mean(part[base], "pgd20") + slope * (mean(seeds, "minutes") - mean(part[base], "minutes"))
    return f"{mean(seeds, 'pgd20') - expected:+.1f}"


def _range(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.1f} ({min(values):{sign}.1f} to {max(values):{sign}.1f})" if values else "-"


def _bench(dataset: Dataset, options: argparse.Namespace) -> Bench:
    train, holdout = dataset.split_holdout(options.holdout)
    part = train.take(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: options.images])
    sizes = (options.width, options.epochs, options.joint_epochs, options.batch_size)
    return Bench(part, holdout, len(dataset.label_names), *sizes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--joint-epochs", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--holdout", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", type=lambda text: set(text.split(";")), default=set(), help="names, separated by ;")
    return parser.parse_args()


if __name__ == "__main__":
    main()
