"""What an evaluation leaves behind: figures, table, plots and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.mixture import Mixture
from training.evaluation.levels import PGD_20
from training.evaluation.page import Exhibit, write_page
from training.evaluation.request import Request
from training.evaluation.table import table
from training.measure import Bench
from training.plots import plot_certified, plot_corruptions, plot_curves, plot_evaluation, plot_gallery, plot_gate

EXHIBITS = 8
"""The gallery shows the first so many images of the subset, so that nobody chose them."""


def write(results: dict[str, Any], request: Request, mixture: Mixture, bench: Bench) -> None:
    """Write what was asked for.

    Args:
        results: The evaluation's figures.
        request: Where to write.
        mixture: The mixture, for the gallery.
        bench: The images, likewise.
    """
    if request.json:
        _write_json(results, request.json)
    if request.plot:
        plot_evaluation(results, request.plot)
    if request.folder:
        _write_folder(results, request.folder, _gallery(mixture, bench.first(EXHIBITS), results["class_names"]))


def _write_folder(results: dict[str, Any], folder: Path, gallery: list[Exhibit]) -> None:
    _write_json(results, folder / "evaluation.json")
    (folder / "table.md").write_text(table(results) + "\n")
    plot_evaluation(results, folder / "accuracy.png")
    for name, plot in (
        ("curves", plot_curves),
        ("gate", plot_gate),
        ("corruptions", plot_corruptions),
        ("certified", plot_certified),
    ):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier evaluation into this folder
        if name in results:
            plot(results, path)
    plot_gallery(gallery, folder / "gallery.png")
    write_page(results, folder)


def _write_json(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n")


def _gallery(mixture: Mixture, bench: Bench, class_names: list[str]) -> list[Exhibit]:
    """Return images before and after PGD-20, with what the mixture says of them."""
    attacked = bench.attacked(mixture, PGD_20)  # (N, 3, H, W)
    with torch.no_grad():
        before, after = (
            torch.cat([mixture(part).exp().cpu() for part, _ in bench.batches(images)]).max(dim=1)
            for images in (None, attacked)
        )
    return [
        Exhibit(
            label=class_names[bench.split.labels[i]],
            clean=bench.split.images[i].permute(1, 2, 0).numpy(),
            attacked=attacked[i].permute(1, 2, 0).numpy(),
            clean_prediction=class_names[before.indices[i]],
            clean_confidence=before.values[i].item(),
            attacked_prediction=class_names[after.indices[i]],
            attacked_confidence=after.values[i].item(),
        )
        for i in range(len(bench))
    ]
