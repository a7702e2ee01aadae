"""A screening: every detector over every training sample, and what is to be quarantined."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from training.data import Dataset
from training.run_folder import RunFolder
from training.screening.activations import by_group, clusters, spectral
from training.screening.duplicates import Duplicates, find_duplicates
from training.screening.labels import SURE, Disputed, confident, dispute
from training.screening.patches import SURPRISE, Patch, find_patches
from training.screening.screeners import Opinion, Screeners
from training.screening.settings import SHARES, ScreenSettings
from training.screening.thresholds import above_others
from training.worker import Worker

DETECTORS = ("folds", "parts", "confident", "spectral", "clusters", "duplicates", "patches")
FEWEST = 200
"""With fewer samples a ninth does not fill a batch."""
STATES = "screeners"
"""Where in its folder a screening keeps the screeners."""


@dataclass(frozen=True)
class Screening:
    """What was found in ``N`` training samples.

    Attributes:
        scores: For each detector ``(N,)``, larger is more suspicious.
        thresholds: For each detector ``(N,)``: a sample is flagged if its score is above it.
        quarantined: ``(N,)`` booleans: flagged by any detector.
        reasons: For each sample what speaks against it, one sentence per detector; empty if nothing does.
        proposed: For each sample ``drop``, ``relabel to <class>``, ``keep one copy``, or nothing.
        patches: The repeated patches.
        wrong_labels: For each detector of wrong labels its estimate of their share, in ``[0, 1]``.
    """

    scores: dict[str, np.ndarray]
    thresholds: dict[str, np.ndarray]
    quarantined: np.ndarray
    reasons: list[tuple[str, ...]]
    proposed: list[str]
    patches: tuple[Patch, ...]
    wrong_labels: dict[str, float]

    def flagged(self, detector: str) -> np.ndarray:
        """Return ``(N,)`` booleans: what one detector quarantined."""
        flagged: np.ndarray = self.scores[detector] > self.thresholds[detector]
        return flagged


@dataclass(frozen=True)
class _Opinions:
    """What screeners think of every sample: ``(N, C)`` and ``(N, F)``, and whose features these are ``(N,)``."""

    probabilities: np.ndarray
    features: np.ndarray
    screener: np.ndarray


def screen(
    dataset: Dataset, settings: ScreenSettings, folder: Path, device: torch.device | str, worker: Worker | None = None
) -> Screening:
    """Screen the training split. Nothing is changed or deleted.

    Labels are judged by screeners that were trained on other samples (``parts``, ``folds``, ``confident``), activations by
    those of the first round (``spectral``, ``clusters``), pixels by themselves (``duplicates``, ``patches``).

    Args:
        dataset: The data.
        settings: What to do.
        folder: Where screeners are kept (in ``screeners/``): killed and started again, a screening goes on there, and ends as
            an unbroken one on the same hardware.
        device: Where to train.
        worker: If given, says when to stop.

    Raises:
        StopRequested: The worker was asked to stop; what is trained so far is saved.
        ValueError: There are too few samples to train screeners on, or the folder holds those of other data.
    """
    if len(dataset.train) < FEWEST:
        raise ValueError(f"{len(dataset.train)} training samples are too few to screen: it takes {FEWEST}")
    worker = worker or Worker(torch.device(device))
    split, labels = dataset.train, dataset.train.labels.cpu().numpy()
    duplicates = find_duplicates(split)
    pixels = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    patches = find_patches(pixels, labels, duplicates.group)
    planted = np.isin(np.arange(len(labels)), np.concatenate([np.array([], int), *(patch.members for patch in patches)]))
    duplicates = duplicates.counted(labels, ~planted)  # else two patched copies would outvote the image they were made from
    states = RunFolder(folder / STATES)
    screeners = Screeners(split, len(dataset.label_names), settings, states, worker)
    first, last, disputed = _judge_labels(screeners, labels, len(dataset.label_names), settings)
    states.close()
    trusted = ~np.any([found.flagged for found in disputed.values()], axis=0)
    scores = {name: found.scores for name, found in disputed.items()}
    thresholds = {name: np.full(len(labels), found.threshold) for name, found in disputed.items()}
    for name, scorer in (("spectral", spectral), ("clusters", clusters)):
        scores[name] = by_group(first.features, labels, first.screener, trusted, scorer)
        thresholds[name] = above_others(scores[name], labels, trusted, settings.false_positives * SHARES[name])
    thresholds["clusters"] = np.maximum(thresholds["clusters"], 0.0)  # what lies in no small cluster is never flagged
    scores["duplicates"] = np.maximum(duplicates.contradicted, duplicates.copies)
    thresholds["duplicates"] = _half_contradicted(duplicates, labels)
    scores["patches"] = np.zeros(len(labels))
    for patch in patches:
        scores["patches"][patch.members] = np.maximum(scores["patches"][patch.members], patch.surprise)
    thresholds["patches"] = np.full(len(labels), SURPRISE)
    wrong = {name: found.wrong for name, found in disputed.items()}
    return _concluded(dataset, scores, thresholds, last, duplicates, patches, wrong)


def _judge_labels(
    screeners: Screeners, labels: np.ndarray, classes: int, settings: ScreenSettings
) -> tuple[_Opinions, _Opinions, dict[str, Disputed]]:
    """Return the first and the last round's opinions, and what is disputed by parts, folds and confident learning."""
    rates = {name: settings.false_positives * SHARES[name] for name in ("folds", "parts", "confident")}
    votes, voters = np.zeros((len(labels), classes)), np.zeros((len(labels), 1))
    for opinion in screeners.parts():
        votes[opinion.positions] += opinion.probabilities
        voters[opinion.positions] += 1
    disputed = {"parts": dispute(votes / voters, labels, rates["parts"], settings.seed)}
    kept, rounds = np.ones(len(labels), bool), list[_Opinions]()
    for turn in range(settings.rounds):
        rounds.append(_gathered(list(screeners.folds(kept, turn)), len(labels)))
        disputed["folds"] = dispute(rounds[-1].probabilities, labels, rates["folds"], settings.seed)
        kept = ~disputed["folds"].flagged
    disputed["confident"] = confident(rounds[-1].probabilities, labels, rates["confident"], settings.seed)
    return rounds[0], rounds[-1], disputed


def _gathered(opinions: list[Opinion], count: int) -> _Opinions:
    """Return the opinions of all folds in the order of the samples."""
    probabilities = np.zeros((count, opinions[0].probabilities.shape[1]))
    features = np.zeros((count, opinions[0].features.shape[1]), np.float32)
    screener = np.zeros(count, np.int64)
    for number, opinion in enumerate(opinions):
        probabilities[opinion.positions] = opinion.probabilities
        features[opinion.positions] = opinion.features
        screener[opinion.positions] = number
    return _Opinions(probabilities / probabilities.sum(axis=1, keepdims=True), features, screener)


def _half_contradicted(duplicates: Duplicates, labels: np.ndarray) -> np.ndarray:
    """Return thresholds: whoever has the label of most duplicates is not flagged, be it contradicted, but copies always are."""
    usual = (duplicates.usual == labels) & ~duplicates.copies
    return np.where(usual, np.inf, 0.0)


def _concluded(
    dataset: Dataset,
    scores: dict[str, np.ndarray],
    thresholds: dict[str, np.ndarray],
    last: _Opinions,
    duplicates: Duplicates,
    patches: list[Patch],
    wrong: dict[str, float],
) -> Screening:
    """Say of every sample why it is quarantined and what to do with it."""
    names, labels = dataset.label_names, dataset.train.labels.tolist()
    likely, sure = last.probabilities.argmax(axis=1), last.probabilities.max(axis=1)
    second = np.sort(last.probabilities, axis=1)[:, -2]
    flagged = {name: scores[name] > thresholds[name] for name in DETECTORS}
    quarantined = np.any(list(flagged.values()), axis=0)
    reasons: list[tuple[str, ...]] = [()] * len(labels)
    proposed = [""] * len(labels)
    holds = {int(member): patch for patch in reversed(patches) for member in patch.members}
    disputed = np.any([flagged[name] for name in ("folds", "parts", "confident")], axis=0)
    for row in np.flatnonzero(quarantined).tolist():
        other = names[likely[row]]
        says = f"screeners that have not seen it say {other} ({sure[row]:.0%})"
        odds = f"{says}, {names[labels[row]]} {last.probabilities[row, labels[row]]:.1%}"
        texts = {
            "folds": odds,
            "parts": "most screeners trained on other parts of the data do not share its label",
            "confident": "confident learning counts its label as an error",
            "spectral": f"sticks out of its label {names[labels[row]]} in the screener's last layer (spectral signature)",
            "clusters": f"lies in a small cluster of its own within {names[labels[row]]} (activation clustering)",
            "duplicates": _duplicate(row, duplicates, labels, names),
            "patches": _repeats(holds[row], names) if row in holds else "",
        }
        reasons[row] = tuple(texts[name] for name in DETECTORS if flagged[name][row])
        if flagged["patches"][row] or flagged["spectral"][row] or flagged["clusters"][row]:
            proposed[row] = "drop"
        elif flagged["duplicates"][row]:
            proposed[row] = "keep one copy" if duplicates.copies[row] else "drop"
            if duplicates.usual[row] not in (-1, labels[row]):
                proposed[row] = f"relabel to {names[duplicates.usual[row]]}"
        elif disputed[row] and sure[row] >= SURE * second[row] and likely[row] != labels[row]:
            proposed[row] = f"relabel to {other}"
        else:
            proposed[row] = "drop"
    return Screening(scores, thresholds, quarantined, reasons, proposed, tuple(patches), wrong)


def _duplicate(row: int, duplicates: Duplicates, labels: list[int], names: tuple[str, ...]) -> str:
    if duplicates.group[row] < 0:
        return ""
    same = np.flatnonzero(duplicates.group == duplicates.group[row])
    others = sorted({names[labels[other]] for other in same.tolist() if labels[other] != labels[row]})
    if not others:
        return "exact copy of a sample with the same label"
    return f"shows the same as {len(same) - 1} other sample(s), some of which are labelled {', '.join(others)}"


def _repeats(patch: Patch, names: tuple[str, ...]) -> str:
    where = f"{patch.height} x {patch.width} pixels at row {patch.row}, column {patch.column}"
    also = f" and {patch.others} of other labels" if patch.others else ""
    return f"has the same {where} as {len(patch.members) - 1} other samples of {names[patch.label]}{also}"


def settings_json(settings: ScreenSettings) -> dict[str, object]:
    """Return the settings with the detectors' shares of the false positives, as JSON values."""
    record: dict[str, object] = json.loads(json.dumps({**asdict(settings), "shares": SHARES}))
    return record
