"""The plots of what benchmarks.poisoning has recorded."""

from __future__ import annotations

import io
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.poisoning_arms import ARMS
from benchmarks.poisons import POISONS

Row = dict[str, Any]
Pictures = dict[str, tuple[np.ndarray, list[str]]]
"""By the attack's name: images before and after it, `(2, K, H, W, 3)` uint8, and what stands under each."""


def draw(rows: list[Row], pictures: Pictures, out: Path) -> dict[str, bytes]:
    """Write those plots that there are figures for as PNG files, and return them by their names."""
    drawn = {
        "pictures": _draw_pictures(pictures),
        "flips": _draw_flips(rows),
        "backdoors": _draw_backdoors(rows),
        "certified": _draw_certified(rows),
    }
    plots = {name: plot for name, plot in drawn.items() if plot is not None}
    for name, plot in plots.items():
        replace_file(out / f"{name}.png", plot)
    return plots


def mean(rows: list[Row], arm: str, attack: str, key: str) -> float | None:
    """Return the mean of a figure over seeds; `None` if there is none."""
    values = [row[key] for row in rows if (row["arm"], row["attack"]) == (arm, attack) and row.get(key) is not None]
    return statistics.mean(values) if values else None


def _draw_pictures(pictures: Pictures) -> bytes | None:
    """Draw every attack's images: before in the upper row, after in the lower one, and their labels below."""
    if not pictures:
        return None
    most = max(images.shape[1] for images, _ in pictures.values())
    figure_ = _pyplot().figure(figsize=(1.4 * most, 3.6 * len(pictures)))
    for part, (name, (images, captions)) in zip(
        np.atleast_1d(figure_.subfigures(len(pictures), 1)), pictures.items(), strict=True
    ):
        part.suptitle(f"{name}: before, and below after", x=0.02, ha="left", fontsize=10, fontweight="bold")
        panels = part.subplots(2, most, squeeze=False)
        part.subplots_adjust(left=0.02, right=0.98, bottom=0.14, top=0.88, wspace=0.06, hspace=0.06)
        for axes in panels.flat:
            axes.set_axis_off()
        for column, caption in enumerate(captions):
            for row in range(2):
                panels[row][column].imshow(images[row, column], interpolation="nearest")
            below = {"ha": "center", "va": "top", "fontsize": 8, "transform": panels[1][column].transAxes}
            panels[1][column].text(0.5, -0.04, caption.replace(", ", ",\n"), **below)
    return _png(figure_)


def _draw_flips(rows: list[Row]) -> bytes | None:
    """Draw clean accuracy against the share of flipped labels, a line for each arm that has several."""
    shares = {poison.name: 100 * poison.share for poison in POISONS if poison.kind in ("none", "random flips")}
    lines = {
        arm.name: sorted(
            (share, 100 * value) for name, share in shares.items() if (value := mean(rows, arm.name, name, "clean")) is not None
        )
        for arm in ARMS
    }
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure_, axes = _pyplot().subplots(figsize=(7, 4))
    for name, points in lines.items():
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="labels flipped at random, %", ylabel="right on test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure_.tight_layout()
    return _png(figure_)


def _draw_backdoors(rows: list[Row]) -> bytes | None:
    """Draw how often the patch decides: a group of bars for each arm, a bar for each attack."""
    arms, heights = bars(rows)
    if not arms:
        return None
    figure_, axes = _pyplot().subplots(figsize=(9, 4))
    shown = {attack: known for attack, known in heights.items() if known}
    wide = 0.8 / len(shown)
    for number, (attack, known) in enumerate(shown.items()):
        places = [arms.index(arm) + wide * (number - (len(shown) - 1) / 2) for arm in known]
        label = "no poison" if attack == "clean" else attack
        axes.bar(places, [100 * share for share in known.values()], 0.9 * wide, label=label)
    axes.set_xticks(
        np.arange(len(arms)), [name.replace(", ", ",\n").replace("trained ", "trained\n") for name in arms], fontsize=8
    )
    axes.set(ylabel="patched images taken for the target, %", ylim=(0, 100))
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure_.tight_layout()
    return _png(figure_)


def bars(rows: list[Row]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Return the arms that a backdoor was tried on, and for each attack the success in those that were measured."""
    attacks = ["clean", *(poison.name for poison in POISONS if poison.backdoor)]
    found = {attack: {arm.name: mean(rows, arm.name, attack, "backdoor") for arm in ARMS} for attack in attacks}
    arms = [arm.name for arm in ARMS if any(found[attack][arm.name] is not None for attack in attacks[1:])]
    return arms, {
        attack: {arm: share for arm in arms if (share := shares[arm]) is not None} for attack, shares in found.items()
    }


def _draw_certified(rows: list[Row]) -> bytes | None:
    """Draw the share of test images that are right whatever so many poisons are, a line for each attack."""
    own = [row for row in rows if row.get("certified")]
    if not own:
        return None
    figure_, axes = _pyplot().subplots(figsize=(7, 4))
    for row in own:
        shares = [100 * share for share in row["certified"]]
        axes.step(range(len(shares)), shares, where="mid", marker="o", label=f"{row['attack']}, seed {row['seed']}")
    axes.set(xlabel="changed parts of the data", ylabel="right and certain, % of test images", ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure_.tight_layout()
    return _png(figure_)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure_: Any) -> bytes:
    stream = io.BytesIO()
    figure_.savefig(stream, dpi=110, format="png")
    _pyplot().close(figure_)
    return stream.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: processes that share the folder may end together."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    scratch.write_bytes(content)
    os.replace(scratch, path)
