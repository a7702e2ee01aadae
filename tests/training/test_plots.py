"""The evaluation's plots: what they show, read from the figures before they are closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import BarContainer

from tests.training.evaluation.example_results import CLASSES, exhibits, full_results, quick_results
from training import plots
from training.evaluation.corruptions import CORRUPTIONS


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, in order."""
    figures: list[Any] = []
    close = plt.close

    def keep(figure: Any) -> None:
        figures.append(figure)
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    return figures


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def cells(axes: Any) -> dict[tuple[int, int], str]:
    """Return a heat map's texts by row and column."""
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}


def test_curves_show_points_and_intervals(drawn: list[Any], tmp_path: Path) -> None:
    results, path = full_results(), tmp_path / "curves.png"
    plots.plot_curves(results, path)
    assert is_png(path)
    epsilon, steps = drawn[0].axes
    assert epsilon.get_xscale() == "linear"
    assert steps.get_xscale() == "log"
    assert "255ths" in epsilon.get_xlabel()
    assert [label.get_text() for label in steps.get_xticklabels()] == ["1", "10", "100"]
    assert "n = 500" in epsilon.get_ylabel()
    for axes, key in ((epsilon, "epsilon"), (steps, "steps")):
        points = results["curves"][key]
        (line,) = axes.lines
        assert line.get_xydata().tolist() == [[point["x"], point["percent"]] for point in points]
        (band,) = axes.collections
        corners = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
        assert {(point["x"], point[side]) for point in points for side in ("low", "high")} <= corners


def test_the_gate_is_drawn_by_class_and_expert_on_one_scale(drawn: list[Any], tmp_path: Path) -> None:
    results, path = full_results(), tmp_path / "gate.png"
    results["gate"]["PGD-20"]["per_class"] = [[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]]
    plots.plot_gate(results, path)
    assert is_png(path)
    clean, attacked = drawn[0].axes[:2]
    assert [clean.get_title(), attacked.get_title()] == ["clean", "PGD-20"]
    assert [label.get_text() for label in clean.get_yticklabels()] == CLASSES  # one of them is no valid TeX
    assert cells(clean)[0, 1] == ".30"
    assert cells(attacked) == {(0, 0): ".10", (0, 1): ".90", (1, 0): ".50", (1, 1): ".50", (2, 0): "1.00", (2, 1): ".00"}
    assert {axes.images[0].get_clim() for axes in (clean, attacked)} == {(0, 1.0)}


def test_a_gate_of_many_classes_is_drawn_without_names_and_numbers(drawn: list[Any], tmp_path: Path) -> None:
    results, path = full_results(), tmp_path / "gate.png"
    results["class_names"] = [f"class {i}" for i in range(100)]
    results["gate"] = {"clean": {"per_class": [[0.5, 0.5]] * 100}}
    plots.plot_gate(results, path)
    assert is_png(path)
    assert cells(drawn[0].axes[0]) == {}
    assert drawn[0].axes[0].images[0].get_array().shape == (100, 2)


def test_the_gallery_shows_image_perturbation_and_attacked_image(drawn: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "gallery.png"
    plots.plot_gallery(exhibits(), path)
    assert is_png(path)
    clean, added, attacked, *others = drawn[0].axes
    assert len(others) == 3
    assert clean.get_ylabel() == "frog"
    assert [axes.get_title() for axes in (clean, added, attacked)] == [
        "clean ✓ frog, 98 %",
        "added, at most 8.0/255",
        "attacked ✗ airplane, 61 %",
    ]
    np.testing.assert_allclose(clean.images[0].get_array(), 0.2, atol=1e-6)
    amplified = np.full((8, 8, 3), 0.5)  # the largest change to the end of the scale, half of it half as far
    amplified[0, 0, 0], amplified[7, 7, 2] = 1.0, 0.25
    np.testing.assert_allclose(added.images[0].get_array(), amplified, atol=1e-4)
    np.testing.assert_allclose(attacked.images[0].get_array(), exhibits()[0].attacked, atol=1e-6)
    np.testing.assert_allclose(others[1].images[0].get_array(), 0.5, atol=1e-4)  # nothing was added


def test_an_empty_gallery_draws_nothing(tmp_path: Path) -> None:
    plots.plot_gallery([], tmp_path / "gallery.png")
    assert not list(tmp_path.iterdir())


def test_corruptions_are_drawn_by_name_and_severity(drawn: list[Any], tmp_path: Path) -> None:
    results, path = full_results(), tmp_path / "corruptions.png"
    plots.plot_corruptions(results, path)
    assert is_png(path)
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [name.replace("_", " ") for name in CORRUPTIONS]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert len(cells(axes)) == 75
    assert cells(axes)[14, 4] == "48.0"  # 80 - 2 * 14 - 4
    assert axes.get_title() == "mean 64.4 %, n = 300"


def test_bars_stand_over_the_networks_that_were_measured(drawn: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "accuracy.png"
    plots.plot_evaluation(quick_results(), path)
    assert is_png(path)
    (axes,) = drawn[0].axes
    bars = {group.get_label(): group for group in axes.containers if isinstance(group, BarContainer)}
    assert [bar.get_height() for bar in bars["clean"]] == [81.26, 80.5, 79.2]
    assert [bar.get_height() for bar in bars["PGD-10"]] == [47.34, 46.1]  # expert 0 was not attacked
    assert [round(bar.get_x() + bar.get_width() / 2, 3) for bar in bars["PGD-10"]] == [0.2, 1.2]
