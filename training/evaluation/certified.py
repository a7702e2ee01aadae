"""Certified accuracy: how many test images are classified rightly, and would be whatever so many poisoned samples were."""

from __future__ import annotations

from typing import Any

import torch

from model.certificate import read_votes, tolerated_partitions
from model.mixture import Mixture
from training.evaluation.markup import Plots, figure, interval, paragraph, section, table
from training.evaluation.significance import interval as wilson
from training.measure import Bench

MEANING = (
    "A poison is a training sample that is inserted, removed or relabelled (one whose pixels are changed counts as two). An "
    "image counts at r poisons if it is classified rightly and its vote tolerates any r of them. The images are as they are: "
    "the certificate bounds changes of the training data, not of the image."
)
SURROGATE = (
    "The experts vote. Attacks are judged by the vote, but climb what has a gradient, which counting has not: those by "
    "cross-entropy (PGD) lower the mean of the probabilities that experts give the true class; others climb theirs on "
    "log(v + m), with the votes v held constant beside the means m, so those by margin (CW) log(v_o + m_o) - log(v_y + m_y) "
    "for the true class y and the other class o that leads."
)


@torch.no_grad()
def certified_accuracy(mixture: Mixture, bench: Bench) -> dict[str, Any]:
    """Return the certified accuracy of voting experts against the number of poisons, as JSON values.

    Source: Levine and Feizi, "Deep Partition Aggregation" (2021), section 4, whose certified fraction this is.

    Args:
        mixture: Experts that vote, each trained on its own partition of the data.
        bench: The images.

    Returns:
        ``partitions``; ``n``; and ``points``, for each number of ``poisons`` from 0 to the most that any vote tolerates its
        accuracy in ``percent``, with a 95 % Wilson interval from ``low`` to ``high``.
    """
    experts = mixture.architecture.num_experts
    right, tolerated = [], []
    for images, labels in bench.batches():
        told = mixture(images).exp().cpu()  # (B, C)
        right.append(told.argmax(dim=1) == labels.cpu())
        tolerated.append(torch.from_numpy(tolerated_partitions(read_votes(told.numpy(), experts))))
    correct, radius = torch.cat(right), torch.cat(tolerated)
    points = [{"poisons": r, **wilson(correct & (radius >= r))} for r in range((experts - 1) // 2 + 1)]
    return {"partitions": experts, "n": len(bench), "points": points}


def certified_markdown(results: dict[str, Any]) -> str:
    """Return the table as Markdown; nothing if there are no figures."""
    if not (found := results.get("certified")):
        return ""
    lines = [
        f"Certified accuracy, {found['partitions']} partitions. {MEANING}",
        "",
        "| poisons | certified accuracy |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {point['poisons']} | {interval(point)} |" for point in found["points"])])


def certified_section(results: dict[str, Any], plots: Plots) -> str:
    """Return the page's section; nothing if there are no figures."""
    if not (found := results.get("certified")):
        return ""
    rows = [[str(point["poisons"]), interval(point)] for point in found["points"]]
    first, last = found["points"][0], found["points"][-1]
    return section(
        "Certified accuracy under poisoned training data",
        paragraph(f"Each of {found['partitions']} experts was trained on its own part of the data, and they vote. {MEANING}"),
        figure(
            plots,
            "certified",
            f"Certified accuracy from {first['percent']:.1f} % without poison to {last['percent']:.1f} % at {last['poisons']}.",
        ),
        table(f"Certified accuracy in % with 95 % Wilson intervals, n = {found['n']}", ["poisons", "accuracy"], rows),
    )
