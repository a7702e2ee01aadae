"""The report of a screening opens from disk, loads nothing and shows the samples."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from training.data import Dataset, Split
from training.screening.page import write_page
from training.screening.screening import DETECTORS, Screening
from training.screening.settings import ScreenSettings

if TYPE_CHECKING:
    from tests.training.screening.conftest import Screened


def test_the_report_shows_quarantined_samples_with_reasons_and_proposals(screened: Screened) -> None:
    page = (screened.folder / "report.html").read_text()
    record = screened.read()
    assert f"{len(record['samples'])}<small>" in page
    assert 'role="alert"' in page  # for the patch
    assert "are the same in 24 pictures labelled blue and in 0 others" in page
    for row in screened.patched.tolist():
        assert f"train_images[{row}]" in page
    assert page.count("Proposed: relabel to ") >= 10
    with np.load(screened.data) as file:
        images = file["train_images"]
    card = r'src="data:image/png;base64,([^"]+)"><figcaption><strong>\w+</strong> <small>train_images\[(\d+)\]'
    shown = re.search(card, page)
    assert shown
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[1]))))
    assert np.array_equal(pixels, images[int(shown[2])])


def test_the_report_loads_nothing(screened: Screened) -> None:
    page = (screened.folder / "report.html").read_text()
    assert "default-src 'none'" in page
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "://" not in page


def test_names_are_shown_as_text_and_a_clean_screening_says_so(tmp_path: Path) -> None:
    names = ("<b>cat</b>", "dog")
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    dataset = Dataset("<i>mine</i>", split, split, names, split.digest(), split.digest())
    scores = {name: np.zeros(4) for name in DETECTORS}
    thresholds = {name: np.ones(4) for name in DETECTORS}
    found = Screening(scores, thresholds, np.zeros(4, bool), [()] * 4, [""] * 4, (), {"folds": 0.0, "confident": 0.0})
    write_page(found, dataset, ScreenSettings(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>cat" not in page
    assert "<i>mine" not in page
    assert 'role="alert"' not in page
