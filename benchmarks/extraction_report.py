"""Tables and a plot of what benchmarks.extraction has recorded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from benchmarks.budgets import DAY_S
from benchmarks.budgets import row as theft_cost
from benchmarks.extraction_adaptive import price
from benchmarks.extraction_victim import POLICIES
from service.quota import Window
from service.settings import SUSPECT, Settings

Row = dict[str, Any]


def write(rows: list[Row], budgets: list[int], before: int, out: Path) -> None:
    """Print the tables and write them to ``report.md``, and the plot to ``agreement.png``."""
    thefts = [row for row in rows if row["kind"] == "theft" and row["budget"] in budgets]
    parts = [_model(row) for row in rows if row["kind"] == "model"]
    for thief, pool in dict.fromkeys((row["thief"], row["pool"]) for row in thefts):
        parts.append(table([row for row in thefts if (row["thief"], row["pool"]) == (thief, pool)], f"{thief}, {pool}"))
    parts += [_repeats([row for row in rows if row["kind"] == "repeats"]), price(sorted(budgets), before)]
    text = "\n\n".join(part for part in parts if part)
    (out / "report.md").write_text(text + "\n")
    print(text)
    if thefts:
        plot([row for row in thefts if row["thief"] == "random"] or thefts, out / "agreement.png")


def table(rows: list[Row], title: str) -> str:
    """Return a Markdown table of one thief: policies by budgets, the best of all seeds for the thief.

    A cell has the best agreement, with the range over seeds when there are several, then the best accuracy and the largest
    share fooled, in per cent. The distances are means.
    """
    budgets = sorted({row["budget"] for row in rows})
    head = [f"{budget}: agreement / accuracy / fooled" for budget in budgets]
    lines = [f"| {title} | L1 of answers | L1 of targets | {' | '.join(head)} |", "|---|---|---|" + "---|" * len(budgets)]
    for policy in [name for name in POLICIES if any(row["policy"] == name for row in rows)]:
        own = [row for row in rows if row["policy"] == policy]
        cells = [f"{sum(row[key] for row in own) / len(own):.3f}" for key in ("l1_answers", "l1_targets")]
        for budget in budgets:
            seeds = [row for row in own if row["budget"] == budget]
            cells.append(_best(seeds) if seeds else "-")
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(seeds: list[Row]) -> str:
    figures = {key: [100 * row[key] for row in seeds] for key in ("agreement", "accuracy", "fooled")}
    least = f" (from {min(figures['agreement']):.1f})" if len(seeds) > 1 else ""
    return f"{max(figures['agreement']):.1f}{least} / {max(figures['accuracy']):.1f} / {max(figures['fooled']):.1f}"


def _model(row: Row) -> str:
    return (
        f"The model itself: {100 * row['accuracy']:.1f} % right of {row['scored']} scored images. "
        f"Of {row['attacked']} that it gets right, random signs of 8/255 turn {100 * row['fooled_by_signs']:.1f} %."
    )


def _repeats(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [
        f"| policy | one answer | mean of {rows[0]['times']:.0f} repeats, answer cache | repeats, no cache | near copies |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ways = ("cached", "not_cached", "near_copies")
        cells = [f"{row[way]:.4f} ({100 * row[f'{way}_differing_share']:.1f} % differ)" for way in ways]
        lines.append(f"| {row['policy']} | {row['one_answer']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the best agreement over the budget, policies by colour and pools by sign, and over what a budget takes one identity.

    Args:
        rows: Of one thief.
        path: The PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (answers, days) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    pools, colours = list(dict.fromkeys(row["pool"] for row in rows)), {name: f"C{i}" for i, name in enumerate(POLICIES)}
    for policy, colour in colours.items():
        for pool, sign in zip(pools, "osD", strict=False):
            if points := _best_by_budget(rows, policy, pool):
                answers.plot(*zip(*points, strict=True), marker=sign, linewidth=1, color=colour)
    handles = [answers.plot([], [], color=colour, label=name)[0] for name, colour in colours.items()]
    handles += [
        answers.plot([], [], "k", marker=sign, ls="", label=f"pool {pool}")[0] for pool, sign in zip(pools, "osD", strict=False)
    ]
    answers.legend(handles=handles, fontsize=8)
    answers.set(xlabel="answers", ylabel="agreement with the model, %, best seed", xscale="log")
    for tier, quota in Settings().policies().items():
        policy = "label only" if tier == SUSPECT else "2 decimals"
        costs = [(_days(quota.windows, budget), share) for budget, share in _best_by_budget(rows, policy, pools[0])]
        if quota.windows and costs:
            days.plot(*zip(*costs, strict=True), marker="o", linewidth=1, label=f"{tier}, {policy}")
    days.set(xlabel="days that one identity needs", xscale="log")
    days.legend(fontsize=8)
    for axes in (answers, days):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _best_by_budget(rows: list[Row], policy: str, pool: str) -> list[tuple[int, float]]:
    """Return budgets, ascending, each with the best seed's agreement in per cent."""
    own = [row for row in rows if (row["policy"], row["pool"]) == (policy, pool)]
    return [
        (budget, max(100 * row["agreement"] for row in own if row["budget"] == budget))
        for budget in sorted({row["budget"] for row in own})
    ]


def _days(windows: tuple[Window, ...], answers: int) -> float:
    seconds = asyncio.run(theft_cost(windows, answers))["one_identity_s"]
    return float("inf") if seconds is None else max(float(seconds), 1.0) / DAY_S
