"""The page of an evaluation: one HTML file that opens from disk and loads nothing from anywhere."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.certified import certified_section
from training.evaluation.markup import Plots, document, figure, interval, length, paragraph, section, table, words
from training.evaluation.table import compared

SIGNIFICANT = 0.05
"""Below this p, a difference between two networks is called one."""


@dataclass(frozen=True)
class Exhibit:
    """One image before and after an attack, with what the mixture says of it.

    Attributes:
        label: Name of the true class.
        clean: ``(H, W, 3)`` uint8.
        attacked: ``(H, W, 3)`` float32 in ``[0, 1]``.
        clean_prediction: Name of the class predicted for ``clean``.
        clean_confidence: Its probability.
        attacked_prediction: Name of the class predicted for ``attacked``.
        attacked_confidence: Its probability.
    """

    label: str
    clean: np.ndarray[Any, np.dtype[np.uint8]]
    attacked: np.ndarray[Any, np.dtype[np.float32]]
    clean_prediction: str
    clean_confidence: float
    attacked_prediction: str
    attacked_confidence: float


def write_page(results: dict[str, Any], folder: Path) -> Path:
    """Write ``report.html`` into ``folder``, in one step, and return its path.

    Args:
        results: The evaluation's figures. Sections whose key is absent are left out. The ``x`` of ``curves["epsilon"]`` is in
            255ths; entropies are in nats.
        folder: Where the plots lie. ``accuracy.png``, ``curves.png``, ``gate.png``, ``corruptions.png`` and ``certified.png``
            are shown beside the figures that they draw, and left out where those are absent; ``gallery.png`` and all other
            ``*.png`` come last.
    """
    plots = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    title = f"Robustness of a mixture on {results['data']['name']}"
    sections = (
        _subject(results),
        _banner(results),
        _headline(results),
        _accuracy(results, plots),
        _autoattack(results),
        certified_section(results, plots),
        _transfer(results),
        _paired(results),
        _sanity(results),
        _curves(results, plots),
        _gate(results, plots),
        _corruptions(results, plots),
        _pictures(plots),
        _method(results),
    )
    body = "\n".join(section for section in sections if section)
    target = folder / "report.html"
    scratch = folder / "report.html.partial"
    scratch.write_text(document(title, body), encoding="utf-8")
    os.replace(scratch, target)
    return target


# --- sections; each returns its HTML, or nothing when its figures are absent


def _subject(results: dict[str, Any]) -> str:
    text = (
        f"Checkpoint {results['checkpoint_sha256'][:12]} on n = {results['n']} {results['data']['name']} test images, "
        f"seed {results['seed']}, attacks in {results['precision']}: "
    )
    return f'<p>{escape(text)}<a href="#method">how it was measured</a>.</p>'


def _banner(results: dict[str, Any]) -> str:
    checks = [check for check in results.get("sanity", ()) if not check["informational"]]
    failed = [check["check"] for check in checks if not check["passed"]]
    if failed:
        text = (
            f"Masked gradients suspected: failed {', '.join(failed)}. "
            "Until this is explained, take the figures below to overstate robustness."
        )
        return f'<p class="alarm" role="alert">{escape(text)}</p>'
    if checks:
        return f'<p class="fine">{len(checks)} of {len(checks)} sanity checks passed: no sign of masked gradients.</p>'
    return '<p class="note">No sanity check was run: masked gradients are not ruled out.</p>'


def _headline(results: dict[str, Any]) -> str:
    cells = dict(results["accuracy"]["mixture"])
    if autoattack := results.get("autoattack", {}).get("attacks"):
        found = results["autoattack"]
        cells[f"{found['name']}, n = {found['n']}"] = autoattack[-1]
    cards = [
        f"<div><dt>{escape(name)}</dt>"
        f"<dd>{cell['percent']:.1f} %<small>{cell['low']:.1f} to {cell['high']:.1f}</small></dd></div>"
        for name, cell in cells.items()
    ]
    text = f"The mixture's accuracy with 95 % intervals; n = {results['n']} test images unless another n is given."
    return section("Headline figures", f'<dl class="cards">{"".join(cards)}</dl>', paragraph(text))


def _accuracy(results: dict[str, Any], plots: Plots) -> str:
    attacks = list(results["attacks"])
    best = (results.get("best_single_expert") or {}).get("name")
    rows = [
        [f"{name} (best on held-out)" if name == best else name, *(interval(row.get(attack)) for attack in attacks)]
        for name, row in results["accuracy"].items()
    ]
    return section(
        "Accuracy of every network",
        table("Accuracy in % with 95 % Wilson intervals, every network attacked through itself", ["network", *attacks], rows),
        figure(plots, "accuracy", f"Bars of the table above: {len(rows)} networks under {', '.join(attacks)}."),
    )


def _autoattack(results: dict[str, Any]) -> str:
    if not (found := results.get("autoattack")):
        return ""
    rows = [[step["name"], str(step["robust_after"]), interval(step)] for step in found["attacks"]]
    text = "Each attack is run on the images that all before it left right; the last row is the robust accuracy."
    caption = f"The mixture under {found['name']}, n = {found['n']}"
    return section(found["name"], paragraph(text), table(caption, ["attack", "images still right", "accuracy in %"], rows))


def _transfer(results: dict[str, Any]) -> str:
    if not (found := results.get("transfer")):
        return ""
    text = (
        "Images attacked through another network, classified by the mixture. Were the mixture less accurate here than under "
        "the same attack on itself, its own gradients would be hiding something."
    )
    rows = [[name, interval(cell)] for name, cell in found.items()]
    caption = "The mixture's accuracy on other networks' adversarial images"
    return section("Transferred attacks", paragraph(text), table(caption, ["attacked through", "accuracy in %"], rows))


def _paired(results: dict[str, Any]) -> str:
    if not (tests := results.get("paired_tests")):
        return ""
    head = ["against", "attack", "right alone: mixture", "right alone: other", "difference in points", "p"]
    rows = [
        [
            test["against"],
            test["attack"],
            str(test["only_mixture"]),
            str(test["only_other"]),
            f"{test['difference_points']:+.1f}",
            f"{test['p']:.2g}",
        ]
        for test in tests
    ]
    caption = "The mixture against others on the same images, exact McNemar tests"
    what = _aggregation(results)
    return section(f"Does the {what} add anything?", paragraph(_verdict(tests, what)), table(caption, head, rows))


def _aggregation(results: dict[str, Any]) -> str:
    return "vote" if "surrogate" in results else "gate"


def _verdict(tests: Sequence[Mapping[str, Any]], what: str) -> str:
    """Say in words whether the gate, or the vote, beats averaging the experts uniformly."""
    against_uniform = [test for test in tests if test["against"] == "uniform average"]
    if not against_uniform:
        return "The mixture was not compared with a uniform average of its experts."
    parts, gains, losses = [], 0, 0
    for test in against_uniform:
        points, p = test["difference_points"], test["p"]
        if p >= SIGNIFICANT:
            parts.append(f"{test['attack']}: no difference shown ({points:+.1f} points, p = {p:.2g})")
        else:
            gains, losses = gains + (points > 0), losses + (points < 0)
            parts.append(f"{test['attack']}: it {'adds' if points > 0 else 'costs'} {abs(points):.1f} points (p = {p:.2g})")
    if gains and losses:
        summary = f"The {what} beats uniform averaging of the experts on some images and loses to it on others"
    elif gains:
        summary = f"The {what} adds something over uniform averaging of the experts"
    elif losses:
        summary = f"The {what} adds nothing over uniform averaging of the experts: it does worse"
    else:
        summary = f"These images do not show that the {what} adds anything over uniform averaging of the experts"
    return f"{summary}. At p < {SIGNIFICANT}: {'; '.join(parts)}."


def _sanity(results: dict[str, Any]) -> str:
    if not (checks := results.get("sanity")):
        return ""
    rows = []
    for check in checks:
        outcome = "passed" if check["passed"] else "raised, for information" if check["informational"] else "FAILED"
        rows.append([check["check"], outcome, words(check["figures"]), check["raised_if"], check["meaning"]])
    head = ["check", "outcome", "figures", "raised if", "what it means"]
    return section("Sanity checks", table("Signs of an attack that fails for the wrong reasons", head, rows, "prose"))


def _curves(results: dict[str, Any], plots: Plots) -> str:
    if not (curves := results.get("curves")):
        return ""
    tables, spans = [], []
    for key, column in (("epsilon", "epsilon in 255ths"), ("steps", "attack steps")):
        points = curves[key]
        caption = f"The mixture's accuracy by {column}, n = {curves['n']}"
        tables.append(table(caption, [column, "accuracy in %"], [[f"{point['x']:g}", interval(point)] for point in points]))
        first, last = points[0], points[-1]
        spans.append(f"from {first['percent']:.1f} % at {column} {first['x']:g} to {last['percent']:.1f} % at {last['x']:g}")
    plot = figure(plots, "curves", f"The mixture's accuracy: {'; '.join(spans)}.")
    return section("Stronger and longer attacks", plot, f'<div class="pair">{"".join(tables)}</div>')


def _gate(results: dict[str, Any], plots: Plots) -> str:
    if not (gate := results.get("gate")):
        return ""
    first = next(iter(gate.values()))["per_class"]
    experts = len(first[0])
    diversity = results.get("diversity", {})
    head = ["images", "entropy for one image", "entropy of the mean weights"]
    head += ["experts' disagreement", "experts' correlation"] if diversity else []
    rows = []
    for name, found in gate.items():
        row = [name, f"{found['image_entropy']:.3f}", f"{found['mean_entropy']:.3f}"]
        if diversity:
            pair = diversity.get(name, {})
            row += [f"{pair[key]:.3f}" if key in pair else "-" for key in ("disagreement", "correlation")]
        rows.append(row)
    text = (
        "Averages over images. Entropies are in nats: 0 when one expert has all the weight, "
        f"ln {experts} = {math.log(experts):.2f} when all have the same."
    )
    if diversity:
        text += (
            " Disagreement is the share of images on which two experts answer different labels, correlation the cosine between "
            "their probabilities of the wrong classes, both over all pairs of experts."
        )
    names = results.get("class_names") or [f"class {index}" for index in range(len(first))]
    details = "".join(
        table(
            f"Mean gate weights by true class, {name}",
            ["class", *(f"expert {e}" for e in range(experts))],
            [[label, *(f"{weight:.3f}" for weight in row)] for label, row in zip(names, found["per_class"], strict=True)],
        )
        for name, found in gate.items()
    )
    alt = f"Heat maps of the gate's mean weights, {len(names)} classes by {experts} experts, for {' and '.join(gate)}."
    return section(
        "The gate and its experts",
        table("How the gate spreads its weight, and how the experts differ", head, rows),
        paragraph(text),
        figure(plots, "gate", alt),
        f"<details><summary>All mean gate weights</summary>{details}</details>",
    )


def _corruptions(results: dict[str, Any], plots: Plots) -> str:
    if not (found := results.get("corruptions")):
        return ""
    rows = [[name.replace("_", " "), *(f"{percent:.1f}" for percent in row)] for name, row in found["names"].items()]
    severities = len(next(iter(found["names"].values())))
    text = f"Mean {found['mean']:.1f} %, n = {found['n']}."
    if "frost" in found["names"]:
        text += " Frost is Palisade's own texture: it, and so the mean, compares with no published figure."
    return section(
        "Common corruptions",
        paragraph(text),
        figure(plots, "corruptions", "Heat map of the table below."),
        table("The mixture's accuracy in % by severity", ["corruption", *map(str, range(1, severities + 1))], rows),
    )


def _pictures(plots: Plots) -> str:
    alt = "Rows of a clean image, the amplified perturbation and the attacked image, with the predictions above them."
    others = [stem for stem in plots if stem not in ("accuracy", "curves", "gate", "corruptions", "certified", "gallery")]
    gallery = section("Gallery", figure(plots, "gallery", alt)) if "gallery" in plots else ""
    return gallery + (section("Other plots", *(figure(plots, stem, f"Plot {stem}") for stem in others)) if others else "")


def _method(results: dict[str, Any]) -> str:
    data, top_k, best = results["data"], results.get("top_k"), results.get("best_single_expert")
    facts = {
        "checkpoint": f"SHA-256 of the weights {results['checkpoint_sha256']}",
        "data": f"{data['name']}, SHA-256 of the test split {data['test_sha256']}",
        "test images": f"n = {results['n']}",
        "seed": str(results["seed"]),
        "precision of the attacks": results["precision"],
        "attacked through": results.get("surrogate"),
        "experts run": "all" if top_k is None else f"{top_k} of largest weight for each image",
        "level": results.get("level"),
        **{name: compared(told) for name, told in results.get("compared", {}).items()},
        "best single expert": best and f"{best['name']}, chosen on {best['chosen_on']}",
        "versions": words(results["versions"]),
    }
    attacks = {name: words({k: length(k, v) for k, v in attack.items()}) for name, attack in results["attacks"].items()}
    return section(
        "What was measured, and how",
        paragraph("Accuracy is measured on the model's log-probabilities, before any rounding or limit of a service."),
        table("The evaluation", ["what", "value"], [[what, str(value)] for what, value in facts.items() if value], "prose"),
        table("The attacks", ["attack", "settings"], [[name, how or "none"] for name, how in attacks.items()], "prose"),
        anchor="method",
    )
