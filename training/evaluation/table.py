"""An evaluation as Markdown: the table of accuracies, the tests, the sanity checks, and how it was all measured."""

from __future__ import annotations

from typing import Any

from training.evaluation.certified import SURROGATE, certified_markdown
from training.evaluation.sanity import failed


def table(results: dict[str, Any]) -> str:
    """Return the figures as Markdown, a suspicion of masked gradients first."""
    parts = [
        suspicion(results),
        _accuracies(results),
        _autoattack(results),
        certified_markdown(results),
        _comparisons(results),
        _method(results),
    ]
    parts += [_sanity(results)]
    return "\n\n".join(part for part in parts if part)


def suspicion(results: dict[str, Any]) -> str:
    """Return which sanity checks failed, or nothing."""
    checks = failed(results.get("sanity", []))
    return f"MASKED GRADIENTS SUSPECTED: {', '.join(checks)}" if checks else ""


def _accuracies(results: dict[str, Any]) -> str:
    attacks = list(results["attacks"])
    best = (results["best_single_expert"] or {}).get("name")
    lines = [f"| network | {' | '.join(attacks)} |", f"|---|{'---|' * len(attacks)}"]
    for name, row in results["accuracy"].items():
        cells = [_cell(row[attack]) if attack in row else "" for attack in attacks]
        mark = " (best on held-out)" if name == best else ""
        lines.append(f"| {name}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _autoattack(results: dict[str, Any]) -> str:
    if "autoattack" not in results:
        return ""
    ensemble = results["autoattack"]
    lines = [
        f"{ensemble['name']} on the mixture, each attack on what those before it left right:",
        "",
        "| after | images still right | % |",
        "|---|---|---|",
    ]
    lines += [f"| {row['name']} | {row['robust_after']} | {_cell(row)} |" for row in ensemble["attacks"]]
    return "\n".join(lines)


def _comparisons(results: dict[str, Any]) -> str:
    lines = [
        f"mixture against {test['against']}, {test['attack']}: right alone {test['only_mixture']} to {test['only_other']}, "
        f"difference {test['difference_points']:+.1f} points, exact McNemar p = {test['p']:.2g}"
        for test in results["paired_tests"]
    ]
    if "transfer" in results:
        cells = ", ".join(f"{name} {_cell(cell)}" for name, cell in results["transfer"].items())
        lines.append(f"mixture on PGD-20 images that were crafted on a single expert: {cells}")
    if "gate" in results:
        for name, gate in results["gate"].items():
            experts = results["diversity"][name]
            lines.append(
                f"{name}: entropy of an image's gate weights {gate['image_entropy']:.2f} nats, of the mean weights "
                f"{gate['mean_entropy']:.2f}; two experts disagree on {100 * experts['disagreement']:.1f} % of the images, "
                f"cosine of their wrong classes' probabilities {experts['correlation']:.2f}"
            )
    if "corruptions" in results:
        lines.append(
            f"mean accuracy under {len(results['corruptions']['names'])} common corruptions at five severities: "
            f"{results['corruptions']['mean']:.1f} %"
        )
    return "\n".join(lines)


def _method(results: dict[str, Any]) -> str:
    return (
        f"Accuracy in % with 95 % Wilson intervals; n = {results['n']} {results['data']['name']} test images, "
        f"seed {results['seed']}, epsilon 8/255, PGD step 2/255 with random start, "
        f"attacks in {results['precision']} on the network's own log-probabilities."
        + (f" {results['surrogate']}" if "surrogate" in results else "")
        + "".join(f" {name}: {compared(told)}." for name, told in results.get("compared", {}).items())
        + ("" if results["level"] == "quick" else " x2: two restarts, both of which must be survived. CW: margin objective.")
    )


def compared(told: dict[str, Any]) -> str:
    """Say which checkpoint a mixture was compared with, and how one that votes was attacked."""
    return f"SHA-256 of the weights {told['sha256']}" + (f". {SURROGATE}".rstrip(".") if told["votes"] else "")


def _sanity(results: dict[str, Any]) -> str:
    if "sanity" not in results:
        return ""
    lines = ["| sanity check | result | figures | raised if | what it means |", "|---|---|---|---|---|"]
    for finding in results["sanity"]:
        verdict = "passed" if finding["passed"] else "raised, for information" if finding["informational"] else "**FAILED**"
        figures = ", ".join(f"{name}: {value:.4g}" for name, value in finding["figures"].items())
        lines.append(f"| {finding['check']} | {verdict} | {figures} | {finding['raised_if']} | {finding['meaning']} |")
    return "\n".join(lines)


def _cell(cell: dict[str, float]) -> str:
    return f"{cell['percent']:.1f} ({cell['low']:.1f}-{cell['high']:.1f})"
