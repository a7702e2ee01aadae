"""Plots of a run and of an evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from training.evaluation.page import Exhibit
from training.run_folder import RunFolder

matplotlib.use("Agg")

import matplotlib.pyplot as plt

RIGHT, WRONG = "#0b6e4f", "#b3261e"


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
    """Draw every network's accuracy under every attack that it was measured under, as grouped bars with 95 % intervals."""
    networks, attacks = list(results["accuracy"]), list(results["attacks"])
    figure, axes = plt.subplots(figsize=(max(8, len(networks)), 4.5))
    for position, attack in enumerate(attacks):
        measured = [i for i, network in enumerate(networks) if attack in results["accuracy"][network]]
        cells = [results["accuracy"][networks[i]][attack] for i in measured]
        heights = [cell["percent"] for cell in cells]
        errors = [[h - c["low"] for h, c in zip(heights, cells, strict=True)], [c["high"] - c["percent"] for c in cells]]
        places = [i + (position - (len(attacks) - 1) / 2) * 0.8 / len(attacks) for i in measured]
        axes.bar(places, heights, width=0.8 / len(attacks), yerr=errors, label=attack, capsize=2)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(networks)), networks, rotation=30, ha="right")
    _finish(figure, axes, "", f"accuracy in %, n = {results['n']}", path)


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Draw the mixture's accuracy against the attack's radius and against its steps, with 95 % intervals as bands.

    Args:
        results: The evaluation's figures. ``results["curves"]`` has ``n`` and, for ``epsilon`` (in 255ths) and ``steps`` (at
            least 1), a list of points with ``x``, ``percent``, ``low`` and ``high``.
        path: The PNG file to write.
    """
    curves = results["curves"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, key, label in (
        (panels[0], "epsilon", "attack radius epsilon, in 255ths"),
        (panels[1], "steps", "attack steps"),
    ):
        x, percent, low, high = ([point[part] for point in curves[key]] for part in ("x", "percent", "low", "high"))
        axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
        axes.plot(x, percent, marker="o", markersize=4)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[1].set_xscale("log")
    steps = [point["x"] for point in curves["steps"]]
    panels[1].set_xticks(steps, [f"{step:g}" for step in steps])
    panels[1].minorticks_off()
    panels[0].set_ylim(0, 100)
    panels[0].set_ylabel(f"mixture's accuracy in %, n = {curves['n']}")
    figure.tight_layout()
    _save(figure, path)


def plot_certified(results: dict[str, Any], path: Path) -> None:
    """Draw the certified accuracy against the number of poisons, with 95 % intervals.

    Args:
        results: The evaluation's figures. ``results["certified"]`` is what
            :func:`training.evaluation.certified.certified_accuracy` returns.
        path: The PNG file to write.
    """
    certified = results["certified"]
    poisons, percent, low, high = (
        [point[part] for point in certified["points"]] for part in ("poisons", "percent", "low", "high")
    )
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.fill_between(poisons, low, high, alpha=0.25, linewidth=0, step="post")
    axes.step(poisons, percent, where="post", marker="o", markersize=4)
    axes.set_xticks(poisons)
    axes.set_ylim(0, 100)
    label = "training samples inserted, removed or relabelled"
    _finish(figure, axes, label, f"certified accuracy in %, n = {certified['n']}", path)


def plot_gate(results: dict[str, Any], path: Path) -> None:
    """Draw the gate's mean weights, classes by experts, one heat map for each condition that was measured.

    Args:
        results: The evaluation's figures. ``results["gate"]`` has for ``clean`` and each attack ``per_class``, for each class a
            row of weights in ``[0, 1]``, one per expert; ``results["class_names"]`` names the rows.
        path: The PNG file to write.
    """
    gate = results["gate"]
    rows, experts = np.asarray(next(iter(gate.values()))["per_class"]).shape
    brightest = max(np.max(condition["per_class"]) for condition in gate.values())
    height = min(2 + 0.3 * rows, 20)
    figure, panels = plt.subplots(
        1, len(gate), figsize=(2 + 0.5 * experts * len(gate), height), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, condition) in zip(panels[0], gate.items(), strict=True):
        weights = np.asarray(condition["per_class"])  # (C, E)
        shown = axes.imshow(weights, vmin=0, vmax=brightest, aspect="auto")
        if rows <= 20:
            _write_cells(axes, weights, brightest, lambda weight: f"{weight:.2f}".removeprefix("0"))
        axes.set_title(name)
        axes.set_xticks(range(experts))
        axes.set_xlabel("expert")
    if rows <= 20:
        panels[0][0].set_yticks(range(rows), [_short(name) for name in results["class_names"]], parse_math=False)
    panels[0][0].set_ylabel("true class")
    figure.colorbar(shown, ax=panels[0].tolist(), label="mean gate weight")
    _save(figure, path)


def plot_gallery(gallery: Sequence[Exhibit], path: Path) -> None:
    """Draw a row for each exhibit: the clean image, what the attack adds (amplified, on grey), and the attacked image.

    Predictions stand above the images, with a tick or a cross for right or wrong. An empty gallery draws nothing.
    """
    if not gallery:
        return
    figure, grid = plt.subplots(len(gallery), 3, figsize=(7, 2.2 * len(gallery)), squeeze=False, layout="constrained")
    for (left, middle, right), exhibit in zip(grid, gallery, strict=True):
        clean = exhibit.clean.astype(np.float32) / 255  # (H, W, 3)
        added = exhibit.attacked - clean
        largest = float(np.abs(added).max())
        for axes, image in ((left, clean), (middle, 0.5 + added / (2 * largest or 1)), (right, exhibit.attacked)):
            axes.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        left.set_ylabel(_short(exhibit.label), parse_math=False)
        middle.set_title(f"added, at most {255 * largest:.1f}/255", fontsize="small")
        for axes, state, prediction, confidence in (
            (left, "clean", exhibit.clean_prediction, exhibit.clean_confidence),
            (right, "attacked", exhibit.attacked_prediction, exhibit.attacked_confidence),
        ):
            is_right = prediction == exhibit.label
            title = f"{state} {'✓' if is_right else '✗'} {_short(prediction)}, {100 * confidence:.0f} %"
            axes.set_title(title, fontsize="small", color=RIGHT if is_right else WRONG, parse_math=False)
    _save(figure, path)


def plot_corruptions(results: dict[str, Any], path: Path) -> None:
    """Draw the mixture's accuracy under every corruption at every severity as a heat map.

    Args:
        results: The evaluation's figures. ``results["corruptions"]`` has ``names``, five percentages for each corruption,
            their ``mean`` and ``n``.
        path: The PNG file to write.
    """
    corruptions = results["corruptions"]
    names = corruptions["names"]
    percents = np.array(list(names.values()))  # (corruptions, severities)
    figure, axes = plt.subplots(figsize=(6.5, 1.5 + 0.32 * len(names)), layout="constrained")
    shown = axes.imshow(percents, vmin=0, vmax=100, aspect="auto")
    _write_cells(axes, percents, 100, lambda percent: f"{percent:.1f}")
    axes.set_xticks(range(percents.shape[1]), [str(severity + 1) for severity in range(percents.shape[1])])
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xlabel("severity")
    axes.set_title(f"mean {corruptions['mean']:.1f} %, n = {corruptions['n']}", fontsize="medium")
    figure.colorbar(shown, label="mixture's accuracy in %")
    _save(figure, path)


def _write_cells(axes: Any, values: Any, brightest: float, show: Callable[[float], str]) -> None:
    """Write every value of a heat map into its cell, dark on bright and bright on dark."""
    for (row, column), value in np.ndenumerate(values):
        ink = "black" if value > 0.6 * brightest else "white"
        axes.text(column, row, show(value), ha="center", va="center", fontsize=7, color=ink)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _finish(figure: Any, axes: Any, xlabel: str, ylabel: str, path: Path) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=2)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
