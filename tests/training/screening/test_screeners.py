"""Screeners: nobody judges what it was trained on, and what is said of a sample is said of that sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.backbone import ResNet18
from tests.conftest import colour_arrays
from training.augmentation import to_float
from training.data import Split
from training.pretrain import Alone
from training.run_folder import RunFolder
from training.screening.labels import confident
from training.screening.screeners import Opinion, Screeners
from training.screening.settings import ScreenSettings
from training.worker import Worker

QUICK = ScreenSettings(parts=9, folds=3, epochs=1.0, width=4, batch_size=16)


class Overheard(Screeners):
    """Screeners that tell what each was trained on."""

    def __init__(self, split: Split, folder: Path, settings: ScreenSettings) -> None:
        worker = Worker(torch.device("cpu"))
        super().__init__(split, 3, settings, RunFolder(folder), worker)
        self.taught: list[tuple[Split, float]] = []
        self.networks: list[Alone] = []

    def _train(self, name: str, data: Split, epochs: float) -> Alone:
        self.taught.append((data, epochs))
        self.networks.append(super()._train(name, data, epochs))
        return self.networks[-1]


@pytest.fixture(scope="module")
def split() -> Split:
    """Samples that all differ, so that their pixels tell which they are."""
    arrays = colour_arrays(train=207)
    images = torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    split = Split(images, torch.from_numpy(arrays["train_labels"].astype(np.int64)))
    assert len(set(split.digests())) == len(split)
    return split


def positions(split: Split, of: Split) -> set[int]:
    """Return where samples stand in the split that they come from."""
    known = {digest: position for position, digest in enumerate(of.digests())}
    return {known[digest] for digest in split.digests()}


def test_a_parts_screener_sees_its_part_alone_and_votes_on_all_others(split: Split, tmp_path: Path) -> None:
    screeners = Overheard(split, tmp_path, QUICK)
    opinions = list(screeners.parts())
    parts = [positions(data, split) for data, _ in screeners.taught]
    assert len(parts) == 9
    assert sorted(position for part in parts for position in part) == list(range(len(split)))
    for part, opinion in zip(parts, opinions, strict=True):
        assert set(opinion.positions) == set(range(len(split))) - part


def test_a_folds_screener_sees_what_is_kept_of_the_others_and_judges_its_fold(split: Split, tmp_path: Path) -> None:
    screeners = Overheard(split, tmp_path, QUICK)
    kept = np.arange(len(split)) % 5 != 0
    opinions = list(screeners.folds(kept, 1))
    assert sorted(position for opinion in opinions for position in opinion.positions) == list(range(len(split)))
    for (data, _), opinion in zip(screeners.taught, opinions, strict=True):
        assert positions(data, split) == set(np.flatnonzero(kept)) - set(opinion.positions)


@pytest.mark.parametrize("layer", [3, 4])
def test_opinions_are_of_the_samples_at_their_positions(split: Split, tmp_path: Path, layer: int) -> None:
    screeners = Overheard(split, tmp_path, replace(QUICK, layer=layer))
    opinion = next(screeners.folds(np.ones(len(split), bool), 0))
    expert = screeners.networks[0].expert
    assert isinstance(expert, ResNet18)
    images = to_float(split.images[torch.from_numpy(opinion.positions)], torch.device("cpu"))
    with torch.no_grad():
        both = (screeners.networks[0](images).exp() + screeners.networks[0](images.flip(3)).exp()) / 2
        normal = (images - screeners.networks[0].mean) / screeners.networks[0].std
        features = expert.blocks[: 2 * layer](expert.stem(normal)).mean(dim=(2, 3))
    assert opinion.features.shape == (len(opinion.positions), 4 * 2 ** (layer - 1))
    assert np.abs(opinion.probabilities - both.numpy()).max() < 0.05  # they were asked in bfloat16
    assert correlation(opinion, features.numpy()) > 0.99


def correlation(opinion: Opinion, features: np.ndarray) -> float:
    """Return the least correlation of any sample's features with those wanted."""
    return min(float(np.corrcoef(one, other)[0, 1]) for one, other in zip(opinion.features, features, strict=True))


def test_a_layer_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 4, not 5"):
        ScreenSettings(layer=5)


def test_confident_learning_flags_wrong_labels_and_counts_them() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 5, 2000)
    probabilities = generator.dirichlet(np.full(5, 0.3), 2000) * 0.4
    probabilities[np.arange(2000), true] += 0.6
    labels = true.copy()
    labels[:300] = (labels[:300] + generator.integers(1, 5, 300)) % 5
    found = confident(probabilities, labels, 0.02, 0)
    assert found.flagged[:300].mean() > 0.9
    assert found.flagged[300:].mean() < 0.03
    assert found.wrong == pytest.approx(0.15, abs=0.03)
