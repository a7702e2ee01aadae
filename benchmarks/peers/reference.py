"""The model that every peer serves, and what it must answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino

from benchmarks.peers.classifier import decode_all
from model.checkpoint import read_weights
from model.openvino_graph import build_graph

STACK = 3
"""Experts per grouped convolution; the fastest on two cores when batches vary, which is all that the peers can use."""

TOLERANCE = 0.02
"""Of a probability. Rounding to two decimals and bfloat16 change it by 0.006; 99 % of the pairs of images in ``single_images``
differ by over 0.03, so that crossed answers show."""


class WrongAnswer(RuntimeError):
    """A server answered something else than the model does."""


@dataclass(frozen=True)
class Reference:
    """An exported model and the right answers.

    Attributes:
        path: Of the graph; its weights lie beside it.
        labels: Class names, ``C`` of them.
        scores: Probabilities of the images ``(N, C)``, in float32.
    """

    path: Path
    labels: tuple[str, ...]
    scores: npt.NDArray[np.float32]

    def check(self, name: str, answers: Sequence[tuple[str, Mapping[str, float]]], tolerance: float = TOLERANCE) -> None:
        """Compare the answers for all images, each a label and the scores by label.

        Raises:
            WrongAnswer: A label isn't the one with the largest score, or a score is further from the right one than the
                tolerance, as when callers get each other's answers.
        """
        for number, (label, scores) in enumerate(answers):
            if scores.keys() != set(self.labels) or scores[label] < max(scores.values()):
                raise WrongAnswer(f"{name} answered image {number} with the label {label!r} and the scores {dict(scores)}")
        rows = np.array([[scores[label] for label in self.labels] for _, scores in answers])  # (N, C)
        difference = np.abs(rows - self.scores).max(axis=1)  # (N,)
        if difference.max() > tolerance:
            raise WrongAnswer(
                f"{name} answers wrong: {np.count_nonzero(difference > tolerance)} of {len(answers)} answers have scores that "
                f"differ by more than {tolerance} from the model's, one by {difference.max():.2f}"
            )


def export(checkpoint: str, folder: Path, bodies: Sequence[bytes]) -> Reference:
    """Write a checkpoint's mixture to ``folder`` as ``model.xml`` and ``model.bin``, and classify PNG files with it."""
    header, weights = read_weights(checkpoint)
    graph = build_graph(header.architecture, weights, STACK)
    graph.set_rt_info(json.dumps(header.class_names), "labels")
    path = folder / "model.xml"
    openvino.save_model(graph, path, compress_to_fp16=False)
    exact = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores = np.concatenate([exact(decode_all([body]))[0] for body in bodies])  # (N, C)
    return Reference(path, tuple(header.class_names), scores)
