"""The report of a screening: one HTML file for a person who decides about the samples; it loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from training.data import Dataset
from training.evaluation.markup import document, paragraph, section, table, words
from training.screening.patches import Patch
from training.screening.screening import DETECTORS, Screening, settings_json
from training.screening.settings import SHARES, ScreenSettings

SHOWN = 48
"""Thumbnails per detector."""
LARGEST = 64
"""Side of a thumbnail in pixels; larger images are made smaller."""
PAIRS = 15

TITLES = {
    "folds": "The label is not what the picture shows",
    "parts": "Nine screeners, one for each ninth of the data, do not share the label",
    "confident": "Confident learning counts the label as an error",
    "spectral": "Sticks out of its label (spectral signature)",
    "clusters": "Lies in a small cluster of its own (activation clustering)",
    "duplicates": "The same picture is there again, with another label or as a copy",
    "patches": "The same small patch is in many pictures",
}
MEANING = {
    "folds": "Networks that were trained on other samples say that another class is more likely, by so many nats.",
    "parts": "The same, of networks that each saw a ninth of the data: an attacker's samples reach few of them at a time.",
    "confident": "The same networks' probabilities, corrected for how sure they are of each class (cleanlab). From 0 to 1.",
    "spectral": "Within its label, how far it lies along the direction in which the label's samples differ most; 1 is usual.",
    "clusters": "Within its label, how clearly it belongs to a small group apart from the others. From -1 to 1.",
    "duplicates": "The share of pictures that show the same but have another label; 1 for an exact copy.",
    "patches": "How unlikely it is that so many pictures have these pixels there by chance: 6 means one in a million.",
}


def write_page(screening: Screening, dataset: Dataset, settings: ScreenSettings, out: Path) -> None:
    """Write the report in one step.

    Args:
        screening: What was found.
        dataset: The data that were screened.
        settings: How.
        out: The file to write.
    """
    page = _Page(screening, dataset, settings)
    scratch = out.with_name(f"{out.name}.partial")
    scratch.write_text(document(f"Screening of {dataset.name}", page.body()), encoding="utf-8")
    os.replace(scratch, out)


class _Page:
    """Builds the report's sections."""

    def __init__(self, screening: Screening, dataset: Dataset, settings: ScreenSettings) -> None:
        self._found, self._dataset, self._settings = screening, dataset, settings
        self._labels = dataset.train.labels.cpu().numpy()
        self._flagged = {name: screening.flagged(name) for name in DETECTORS}

    def body(self) -> str:
        """Return the page's HTML."""
        galleries = [self._gallery(name) for name in ("patches", *(name for name in DETECTORS if name != "patches"))]
        parts = (self._summary(), self._detectors(), self._classes(), self._relabelled(), *galleries, self._method())
        return "\n".join(part for part in parts if part)

    def _summary(self) -> str:
        count, total = int(self._found.quarantined.sum()), len(self._labels)
        wrong = self._found.wrong_labels
        cards = {
            "samples": f"{total:,}",
            "quarantined": f"{count:,}<small>{count / total:.1%} of them</small>",
            "repeated patches": f"{len(self._found.patches)}",
            "labels estimated to be wrong": f"{wrong['folds']:.1%}<small>confident learning: {wrong['confident']:.1%}</small>",
        }
        shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in cards.items())
        text = (
            "These training samples look as if they were mislabelled or tampered with. Nothing was deleted. Training with "
            "--quarantine quarantine.json leaves them out. To train with one of them all the same, change its decision in that "
            "file from quarantine to keep. To relabel one, change your data and screen them again."
        )
        allowed = self._settings.false_positives
        caution = (
            f"Some honest samples are among them: about {allowed:.1%} of all right ones, as was asked for, the hardest to "
            "recognise first. A clean set loses that many too."
        )
        alarm = ""
        if self._found.patches:
            alarm = '<p class="alarm" role="alert">A repeated patch was found: somebody may have planted a backdoor.</p>'
        return alarm + f'<dl class="cards">{shown}</dl>' + paragraph(text) + paragraph(caution)

    def _detectors(self) -> str:
        rows = []
        for name in DETECTORS:
            share = f"{SHARES[name] * self._settings.false_positives:.2%}" if name in SHARES else "none expected"
            rows.append([TITLES[name], f"{int(self._flagged[name].sum()):,}", share, MEANING[name]])
        head = ["what was looked for", "samples", "honest samples allowed", "what its score says"]
        return section("What was found", table("A sample can be found by several detectors", head, rows, "prose"))

    def _classes(self) -> str:
        rows = []
        for label, name in enumerate(self._dataset.label_names):
            own = self._labels == label
            found = int((own & self._found.quarantined).sum())
            cells = [f"{int((own & self._flagged[detector]).sum()):,}" for detector in DETECTORS]
            rows.append([name, f"{int(own.sum()):,}", f"{found:,}", f"{found / own.sum():.1%}", *cells])
        text = "If one label stands out here, look at it first: a backdoor's samples share a label."
        head = ["label", "samples", "quarantined", "share", *DETECTORS]
        return section(
            "Label by label", table("Quarantined samples by their label and by detector", head, rows), paragraph(text)
        )

    def _relabelled(self) -> str:
        pairs = Counter(
            (self._dataset.label_names[self._labels[row]], self._found.proposed[row].removeprefix("relabel to "))
            for row in np.flatnonzero(self._found.quarantined).tolist()
            if self._found.proposed[row].startswith("relabel to ")
        )
        if not pairs:
            return ""
        rows = [[f"{given} is rather {seems}", f"{count:,}"] for (given, seems), count in pairs.most_common(PAIRS)]
        text = "Mix-ups of one pair far above the rest can mean that somebody swapped just these two."
        caption = f"The {len(rows)} most frequent of {len(pairs)} pairs"
        return section("Labels that seem to be others", table(caption, ["label", "samples"], rows), paragraph(text))

    def _gallery(self, name: str) -> str:
        rows = np.flatnonzero(self._flagged[name])
        if not len(rows):
            return ""
        rows = rows[np.argsort(-self._found.scores[name][rows], kind="stable")][:SHOWN]
        note = f"The {len(rows)} highest of {int(self._flagged[name].sum()):,}; all are in quarantine.json."
        patches = "".join(self._patch(patch) for patch in self._found.patches) if name == "patches" else ""
        cards = "".join(self._card(row) for row in rows.tolist())
        return section(TITLES[name], paragraph(f"{MEANING[name]} {note}"), patches, f'<div class="gallery">{cards}</div>')

    def _patch(self, patch: Patch) -> str:
        text = (
            f"{patch.height} x {patch.width} pixels from row {patch.row}, column {patch.column} (counted from 0, top left) are "
            f"the same in {len(patch.members):,} pictures labelled {self._dataset.label_names[patch.label]} and in "
            f"{patch.others:,} others; by chance about {patch.expected:.1f} would be."
        )
        images = self._dataset.train.images[patch.members.tolist()].float()
        common = images.median(dim=0).values[:, patch.row : patch.row + patch.height, patch.column : patch.column + patch.width]
        picture = _png(common.permute(1, 2, 0).byte().cpu().numpy())
        return f'<figure class="sample"><img alt="the patch" src="{picture}"><figcaption>{escape(text)}</figcaption></figure>'

    def _card(self, row: int) -> str:
        pixels = self._dataset.train.images[row].permute(1, 2, 0).cpu().numpy()
        name, place = self._dataset.label_names[self._labels[row]], self._dataset.place("train", row)
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in self._found.reasons[row])
        scores = ", ".join(f"{detector} {self._found.scores[detector][row]:.2f}" for detector in DETECTORS)
        return (
            f'<figure class="sample"><img alt="sample labelled {escape(name)}" src="{_png(pixels)}"><figcaption>'
            f"<strong>{escape(name)}</strong> <small>{escape(place)}</small><ul>{reasons}</ul>"
            f"<p>Proposed: {escape(self._found.proposed[row])}</p><small>scores: {escape(scores)}</small></figcaption></figure>"
        )

    def _method(self) -> str:
        facts = {
            "data": f"{self._dataset.name}, {len(self._labels):,} training samples, SHA-256 {self._dataset.digest}",
            "settings": words(settings_json(self._settings)),
        }
        text = (
            "Samples are judged only by networks that have not seen them, or by their pixels. What this can't see: patches "
            "that are blended in faintly or are somewhere else in every picture, unless they show in the networks' last layer; "
            "wrong labels on pictures that look like their wrong label; a poison that most of the data share."
        )
        return section("How it was done", table("The screening", ["what", "value"], facts.items(), "prose"), paragraph(text))


def _png(pixels: np.ndarray) -> str:
    """Return ``(H, W, 3)`` uint8 as a PNG's data address."""
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
