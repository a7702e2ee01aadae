"""Sequences whose images are heard of late and out of order, as replicas hear of each other's."""

from __future__ import annotations

import numpy as np

from service.watch.fingerprint import Fingerprinter
from service.watch.sequences import Sequences, Sighting
from tests.service.watch.test_watch import search

LIMIT, HALF_LIFE_S = 20, 60.0


def looked_at(sequences: Sequences, images: np.ndarray, now: float) -> list[Sighting]:
    prints = Fingerprinter(b"secret").take(images)
    return [sequences.look(*each, now) for each in zip(prints.exact, prints.free, prints.fixed, strict=True)]


def test_an_image_from_before_the_others_does_not_make_a_short_run_a_long_one() -> None:
    sequences, steps = Sequences(LIMIT, HALF_LIFE_S, 128), search(12)
    looked_at(sequences, steps[:8], 1000.0)
    assert Sighting.REFUSED not in looked_at(sequences, steps[8:10], 400.0)
    assert Sighting.REFUSED not in looked_at(sequences, steps[10:], 1000.0)


def test_an_image_from_before_the_others_does_not_make_a_run_fade() -> None:
    sequences, steps = Sequences(LIMIT, HALF_LIFE_S, 128), search(60)
    assert Sighting.REFUSED in looked_at(sequences, steps[:40], 1000.0)
    assert looked_at(sequences, steps[40:41], 100.0) == [Sighting.REFUSED]
    assert looked_at(sequences, steps[41:42], 1000.0 + HALF_LIFE_S / 2) == [Sighting.REFUSED]
