"""Activations: samples that a layer of a screener sets apart from the rest of their label.

Both methods are the Adversarial Robustness Toolbox's, on the features that a screener gives samples it has not seen; trained
on the other folds' share of the same poison, it has learned what sets them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

SMALLEST_GROUP = 20
"""Samples of a label, in one fold, below which there is no saying what is usual."""
DIMENSIONS = 10
SMALLER = 0.35
"""The larger one of two clusters is the clean one; a smaller cluster is suspicious up to this share of the label's samples."""

Scorer = Callable[[np.ndarray], np.ndarray]


def by_group(features: np.ndarray, labels: np.ndarray, screener: np.ndarray, trusted: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Score samples among those of the same label that the same screener judged, and that nothing speaks against so far.

    Args:
        features: ``(N, F)``.
        labels: ``(N,)`` integers.
        screener: ``(N,)`` integers: whose features they are.
        trusted: ``(N,)`` booleans. The others score 0: they are quarantined already, and would hide what else there is.
        scorer: From ``(M, F)`` to ``(M,)``, larger is more suspicious.
    """
    scores = np.zeros(len(labels))
    for each in np.unique(screener):
        for label in np.unique(labels):
            group = np.flatnonzero((screener == each) & (labels == label) & trusted)
            if len(group) >= SMALLEST_GROUP:
                scores[group] = scorer(features[group])
    return scores


def spectral(features: np.ndarray) -> np.ndarray:
    """Return each sample's share in the main direction in which a group differs from its mean: ``(M, F)`` to ``(M,)``.

    Source: Tran, Li and Madry 2018, "Spectral signatures in backdoor attacks", algorithm 1. The score is divided by the
    group's median, so that groups can be compared.
    """
    from art.defences.detector.poison import SpectralSignatureDefense

    centred = features - features.mean(axis=0)
    scores: np.ndarray = SpectralSignatureDefense.spectral_signature_scores(centred)[:, 0]
    return scores / max(float(np.median(scores)), 1e-9)


def clusters(features: np.ndarray) -> np.ndarray:
    """Return how clearly each sample lies in the smaller one of a group's two clusters: ``(M, F)`` to ``(M,)``, in [-1, 1].

    Source: Chen et al. 2018, "Detecting backdoor attacks on deep neural networks by activation clustering": two clusters of
    the activations, of which a small and well separated one is poison. The score is a sample's silhouette there and its
    negative in the other cluster; 0 for all when the clusters are of similar size.
    """
    from art.defences.detector.poison.activation_defence import cluster_activations
    from sklearn.metrics import silhouette_samples

    dimensions = min(DIMENSIONS, *features.shape)
    with _seeded():
        (found,), (reduced,) = cluster_activations([features], nb_clusters=2, nb_dims=dimensions, reduce="PCA")
    first = float(np.mean(found == 0))
    smaller = found == (0 if first <= 0.5 else 1)
    if not 0 < smaller.mean() <= SMALLER:
        return np.zeros(len(features))
    silhouettes: np.ndarray = silhouette_samples(reduced, found)
    return np.where(smaller, silhouettes, -silhouettes)


@contextmanager
def _seeded() -> Iterator[None]:
    """Make the toolbox's clustering, which draws from NumPy's global generator, repeatable."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)
