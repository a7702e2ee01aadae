"""The evaluation's page: it shows what was measured, says what failed, escapes everything and loads nothing."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.training.evaluation.example_results import check, full_results, paired, quick_results
from training.evaluation.page import write_page

VOID = {"meta", "img"}
ONLY_FULL = {"AutoAttack", "Transferred attacks", "Sanity checks", "Stronger and longer attacks", "The gate and its experts"}


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}  # by the innermost element
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    @property
    def text(self) -> str:
        return " ".join(part for tag, parts in self.words.items() if tag != "style" for part in parts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def banner(self) -> str | None:
        """Return ``alarm``, ``fine`` or ``note``."""
        (kind,) = [a["class"] for a in self.all("p") if a.get("class")]
        return kind


def written(results: dict[str, Any], folder: Path) -> Page:
    return Page(write_page(results, folder))


@pytest.fixture
def plots(tmp_path: Path) -> Path:
    """A folder with a file for every plot; a browser would refuse them, the page does not look inside."""
    for stem in ("accuracy", "curves", "gate", "corruptions", "gallery"):
        (tmp_path / f"{stem}.png").write_bytes(f"plot {stem}".encode())
    return tmp_path


def test_every_figure_is_on_the_page(plots: Path) -> None:
    page = written(full_results(), plots)
    for shown in (
        *("81.3 (78.3-84.3)", "47.3 (44.3-50.3)", "46.1 (43.1-49.1)"),  # accuracy, rounded for reading
        *("apgd-ce", "439", "43.9 (40.9-46.9)", "61.7 (58.7-64.7)"),  # AutoAttack, transfer
        *("31", "17", "+1.2", "0.04"),  # paired tests
        *("more steps", "robust share = 0.1235", "gate only is raised", "gate only means it"),  # sanity checks
        *("0.512", "0.598", "0.687", "0.321", "0.654", "0.456", "0.550"),  # gate and diversity
        *("80.0 (77.0-83.0)", "53.0 (50.0-56.0)", "62.0 (59.0-65.0)"),  # curves
        *("gaussian noise", "48.0", "64.4 %"),  # corruptions: the last one's last severity and the mean
    ):
        assert shown in page.text, shown
    assert "expert 0 (best on held-out)" in page.text


def test_a_part_of_autoattack_is_not_called_autoattack(plots: Path) -> None:
    results = full_results()
    results["autoattack"]["name"] = "APGD-CE + APGD-T"
    page = written(results, plots)
    assert "APGD-CE + APGD-T, n = 1000" in page.text
    assert "AutoAttack" not in page.text


def test_the_page_says_how_it_was_measured(tmp_path: Path) -> None:
    results = quick_results()
    text = written(results, tmp_path).text
    for shown in (
        *(results["checkpoint_sha256"], results["data"]["test_sha256"], "colours", "n = 1234", "17", "float32"),
        *(
            "torch = 2.99.0",
            "device = CPU, 2 threads",
            "epsilon = 8/255",
            "step size = 2/255",
            "steps = 10",
            "restarts = 1",
            "quick",
        ),
        "expert 0, chosen on 500 held-out training images, PGD-10",
    ):
        assert shown in text, shown


def test_headline_figures_are_the_mixtures_and_autoattacks_last(tmp_path: Path) -> None:
    page = written(full_results(), tmp_path)
    assert page.words["dt"] == ["clean", "PGD-10", "AutoAttack, n = 1000"]
    assert page.words["dd"] == ["81.3 %", "47.3 %", "43.9 %"]
    assert page.words["small"] == ["78.3 to 84.3", "44.3 to 50.3", "40.9 to 46.9"]


def test_sections_without_figures_are_left_out(plots: Path) -> None:
    headings = {*written(full_results(), plots).words["h2"]}
    assert {*ONLY_FULL, "Common corruptions", "Gallery"} <= headings
    page = written(quick_results(), plots)
    assert not ({*ONLY_FULL, "Common corruptions"} & {*page.words["h2"]})
    assert "Accuracy of every network" in page.words["h2"]
    # A plot of an earlier, larger evaluation is not shown as this one's.
    assert [image["src"] for image in page.all("img")] == [embedded("accuracy"), embedded("gallery")]


def embedded(stem: str) -> str:
    return "data:image/png;base64," + base64.b64encode(f"plot {stem}".encode()).decode()


def test_plots_are_embedded_once_and_described(plots: Path) -> None:
    (plots / "loss.png").write_bytes(b"plot loss")
    images = written(full_results(), plots).all("img")
    stems = ("accuracy", "curves", "gate", "corruptions", "gallery", "loss")
    assert [image["src"] for image in images] == [embedded(stem) for stem in stems]
    assert all(len(image["alt"] or "") > 5 for image in images)
    assert "from 80.0 % at epsilon in 255ths 1 to 53.0 % at 8" in (images[1]["alt"] or "")


def test_no_plots_are_no_broken_images(tmp_path: Path) -> None:
    assert written(full_results(), tmp_path).all("img") == []


def test_a_failed_check_raises_the_alarm(tmp_path: Path) -> None:
    results = full_results()
    results["sanity"] = [check("more steps", True), check("larger radius", False)]
    page = written(results, tmp_path)
    assert page.banner() == "alarm"
    assert "Masked gradients suspected: failed larger radius." in page.text
    assert "FAILED" in page.text


def test_passed_checks_are_said_and_information_is_no_failure(tmp_path: Path) -> None:
    page = written(full_results(), tmp_path)
    assert page.banner() == "fine"
    assert "1 of 1 sanity checks passed" in page.text
    assert "Masked gradients suspected" not in page.text
    assert "FAILED" not in page.text


def test_without_checks_nothing_is_claimed(tmp_path: Path) -> None:
    page = written(quick_results(), tmp_path)
    assert page.banner() == "note"
    assert "not ruled out" in page.text
    assert "passed" not in page.text


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([("clean", 0.8, 0.31), ("PGD-10", 1.2, 0.04)], "The gate adds something over uniform averaging"),
        ([("clean", 0.8, 0.31), ("PGD-10", 1.2, 0.05)], "do not show that the gate adds anything"),
        ([("clean", 0.0, 1.0)], "do not show that the gate adds anything"),
        (
            [("clean", -2.0, 0.01), ("PGD-10", 1.2, 0.2)],
            "The gate adds nothing over uniform averaging of the experts: it does worse",
        ),
        ([("clean", -2.0, 0.01), ("PGD-10", 1.2, 0.01)], "beats uniform averaging of the experts on some images and loses"),
    ],
    ids=["a gain", "p of 0.05", "no difference", "a loss", "both"],
)
def test_the_verdict_on_the_gate_follows_the_tests(tmp_path: Path, tests: list[tuple[str, float, float]], said: str) -> None:
    # A significant gain over a single expert says nothing about the gate.
    against_expert = paired("clean", 9.0, 1e-9, against="expert 0")
    results = quick_results() | {"paired_tests": [*(paired(*test) for test in tests), against_expert]}
    (verdict,) = [text for text in written(results, tmp_path).words["p"] if "At p < 0.05" in text]
    assert said in verdict
    assert all(f"{abs(points):.1f} points" in verdict for _, points, _ in tests)


def test_nothing_but_its_own_parts_is_loaded(plots: Path) -> None:
    page = written(full_results(), plots)
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#"))
    assert "http" not in " ".join(page.words["style"])
    assert "url(" not in " ".join(page.words["style"])


def test_names_cannot_become_markup(plots: Path) -> None:
    hostile = '<script>alert(1)</script>"><img src="http://evil.example/x.png" onerror=\'alert(2)\'>&amp;'
    results = full_results()
    results["class_names"] = [hostile, "b", "c"]
    results["data"]["name"] = hostile
    results["accuracy"][hostile] = results["accuracy"].pop("expert 0")
    results["attacks"][hostile] = {hostile: hostile}
    results["sanity"] = [check(hostile, False)]
    results["versions"][hostile] = hostile
    results["paired_tests"] = [paired(hostile, 1.0, 0.01), paired("clean", 1.0, 0.01, against=hostile)]
    for key in ("transfer", "gate", "corruptions"):
        holder = results[key]["names"] if key == "corruptions" else results[key]
        holder[hostile] = next(iter(holder.values()))
    results["autoattack"]["attacks"][0]["name"] = hostile
    (plots / '"onload=x <b>.png').write_bytes(b"plot")
    page = written(results, plots)
    assert page.text.count(hostile) >= 12  # shown as it is written
    assert not page.all("script")
    assert not page.all("b")
    assert len(page.all("img")) == 6
    assert all(image.keys() == {"alt", "src"} for image in page.all("img"))


def test_tables_and_page_are_accessible(plots: Path) -> None:
    page = written(full_results(), plots)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(header["scope"] in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("h1")) == 1
    style = " ".join(page.words["style"])
    assert "prefers-color-scheme: dark" in style
    anchors = {attributes.get("id") for _, attributes in page.elements}
    assert all((link["href"] or "")[1:] in anchors for link in page.all("a"))


def test_a_second_page_replaces_the_first_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_page(quick_results(), tmp_path)
    assert path == tmp_path / "report.html"
    write_page(quick_results() | {"seed": 987654}, tmp_path)
    assert "987654" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
