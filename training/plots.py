"""Plots of a run and of an evaluation, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from training.run_folder import RunFolder

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def plot_run(folder: RunFolder) -> None:
    """Draw ``loss.png``, ``robust.png`` and, after joint training, ``gate.png`` into the run folder."""
    rows = folder.metrics()
    stages = sorted({row["stage"] for row in rows})
    for name, key, label in (
        ("loss", "loss", "training loss"),
        ("robust", "holdout_robust", "held-out accuracy under PGD-10 (epsilon 8/255, bf16)"),
    ):
        figure, axes = plt.subplots(figsize=(8, 4.5))
        for stage in stages:
            points = [(row["step"], row[key]) for row in rows if row["stage"] == stage and key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=stage, marker="o" if key != "loss" else None, linewidth=1)
        _finish(figure, axes, "step", label, folder.path / f"{name}.png")
    gates = [(row["step"], row["gate"]) for row in rows if "gate" in row]
    if gates:
        figure, axes = plt.subplots(figsize=(8, 4.5))
        steps = [step for step, _ in gates]
        for expert, weights in enumerate(zip(*(gate for _, gate in gates), strict=True)):
            axes.plot(steps, weights, label=f"expert {expert}", linewidth=1)
        _finish(figure, axes, "joint step", "mean gate weight under attack", folder.path / "gate.png")


def plot_evaluation(results: dict[str, Any], path: Path) -> None:
    """Draw every network's accuracy under every attack as grouped bars with 95 % intervals."""
    networks, attacks = list(results["accuracy"]), list(results["attacks"])
    figure, axes = plt.subplots(figsize=(max(8, len(networks)), 4.5))
    for position, attack in enumerate(attacks):
        cells = [results["accuracy"][network][attack] for network in networks]
        heights = [cell["percent"] for cell in cells]
        errors = [[h - c["low"] for h, c in zip(heights, cells, strict=True)], [c["high"] - c["percent"] for c in cells]]
        places = [i + (position - (len(attacks) - 1) / 2) * 0.8 / len(attacks) for i in range(len(networks))]
        axes.bar(places, heights, width=0.8 / len(attacks), yerr=errors, label=attack, capsize=2)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(networks)), networks, rotation=30, ha="right")
    _finish(figure, axes, "", f"accuracy in %, n = {results['n']}", path)


def _finish(figure: Any, axes: Any, xlabel: str, ylabel: str, path: Path) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
