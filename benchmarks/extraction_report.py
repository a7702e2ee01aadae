"""Tables and a plot of what benchmarks.extraction has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.extraction_adaptive import price
from benchmarks.extraction_victim import POLICIES

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
    """Draw the best agreement over the budget, a panel for each pool, a line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pools = list(dict.fromkeys(row["pool"] for row in rows))
    figure, panels = plt.subplots(1, len(pools), figsize=(1 + 4.5 * len(pools), 4), sharey=True, squeeze=False)
    for axes, pool in zip(panels[0], pools, strict=True):
        for policy in POLICIES:
            best: dict[int, float] = {}
            for row in rows:
                if (row["pool"], row["policy"]) == (pool, policy):
                    best[row["budget"]] = max(best.get(row["budget"], 0), 100 * row["agreement"])
            if best:
                axes.plot(*zip(*sorted(best.items()), strict=True), marker="o", linewidth=1, label=policy)
        axes.set(xscale="log", xlabel="answers", title=f"pool {pool}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("agreement with the model, %, best seed")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
