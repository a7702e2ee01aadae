"""The figures of an invented evaluation, as the report writes them, for the tests of the page and of the plots."""

from __future__ import annotations

from typing import Any

import numpy as np

from training.evaluation.corruptions import CORRUPTIONS
from training.evaluation.page import Exhibit

CLASSES = ["airplane", "$\\bad{", "frog"]


def cell(percent: float, half: float = 3.0) -> dict[str, float]:
    return {"percent": percent, "low": percent - half, "high": percent + half}


def paired(attack: str, points: float, p: float, against: str = "uniform average") -> dict[str, Any]:
    counts = {"only_mixture": 31, "only_other": 17}
    return {"against": against, "attack": attack, **counts, "difference_points": points, "p": p}


def check(name: str, passed: bool, informational: bool = False) -> dict[str, Any]:
    texts = {"raised_if": f"{name} is raised", "meaning": f"{name} means it"}
    return {"check": name, "passed": passed, "informational": informational, "figures": {"robust_share": 0.123456}, **texts}


def quick_results() -> dict[str, Any]:
    pgd = {"epsilon": 8 / 255, "steps": 10, "step_size": 2 / 255, "noise": 8 / 255, "project": True, "restarts": 1}
    return {
        "level": "quick",
        "checkpoint_sha256": "c0ffee" * 10 + "beef",
        "data": {"name": "colours", "test_sha256": "da7a" * 16},
        "n": 1234,
        "seed": 17,
        "precision": "float32",
        "top_k": None,
        "attacks": {"clean": {}, "PGD-10": pgd},
        "accuracy": {
            "mixture": {"clean": cell(81.26), "PGD-10": cell(47.34)},
            "uniform average": {"clean": cell(80.5), "PGD-10": cell(46.1)},
            "expert 0": {"clean": cell(79.2)},
        },
        "best_single_expert": {"name": "expert 0", "chosen_on": "500 held-out training images, PGD-10"},
        "paired_tests": [paired("clean", 0.8, 0.31), paired("PGD-10", 1.2, 0.04)],
        "versions": {"torch": "2.99.0", "python": "3.11.9", "device": "CPU, 2 threads"},
    }


def full_results() -> dict[str, Any]:
    def curve(*xs: int) -> list[dict[str, float]]:
        return [{"x": x, **cell(80.0 - 9 * i)} for i, x in enumerate(xs)]

    gate = {"per_class": [[0.7, 0.3], [0.45, 0.55], [0.2, 0.8]], "image_entropy": 0.512, "mean_entropy": 0.687}
    diversity = {"disagreement": 0.321, "correlation": 0.456}
    return quick_results() | {
        "level": "full",
        "class_names": CLASSES,
        "sanity": [check("more steps", True), check("gate only", False, informational=True)],
        "curves": {"epsilon": curve(1, 2, 4, 8), "steps": curve(1, 10, 100), "n": 500},
        "gate": {"clean": gate, "PGD-20": gate | {"image_entropy": 0.598}},
        "diversity": {"clean": diversity, "PGD-20": diversity | {"disagreement": 0.654}},
        "autoattack": {
            "name": "AutoAttack",
            "attacks": [
                {"name": "apgd-ce", "robust_after": 461, **cell(46.1)},
                {"name": "square", "robust_after": 439, **cell(43.9)},
            ],
            "n": 1000,
        },
        "transfer": {"expert 0": cell(61.7)},
        "corruptions": {
            "names": {name: [80.0 - 2 * i - s for s in range(5)] for i, name in enumerate(CORRUPTIONS)},
            "mean": 64.4,
            "n": 300,
        },
    }


def exhibits() -> list[Exhibit]:
    clean = np.full((8, 8, 3), 51, np.uint8)
    attacked = np.full((8, 8, 3), 0.2, np.float32)
    attacked[0, 0, 0] += np.float32(8 / 255)
    attacked[7, 7, 2] -= np.float32(4 / 255)
    return [
        Exhibit("frog", clean, attacked, "frog", 0.98, "airplane", 0.61),
        Exhibit(CLASSES[1], clean, clean.astype(np.float32) / 255, CLASSES[1], 0.5, CLASSES[1], 0.5),
    ]
