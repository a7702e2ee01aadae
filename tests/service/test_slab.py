"""Pixels and answers in shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from model.architecture import Architecture
from service.slab import Slab
from tests.service.conftest import ROOT

TINY = Architecture(width=1, num_classes=5, height=8, input_width=9)
SLOTS = 7


@pytest.fixture
def file() -> Iterator[int]:
    file = Slab.make_file(SLOTS, TINY)
    yield file
    os.close(file)


def pictures(count: int, kind: type) -> np.ndarray:
    """Images (N, 3, 8, 9), no two alike."""
    values = np.arange(count * 216).reshape(count, 3, 8, 9)
    return (values % 251).astype(np.uint8) if kind is np.uint8 else (values / 2000).astype(np.float32)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("slots", [[5, 0, 3], slice(2, 5)])
def test_one_side_reads_exactly_what_the_other_wrote(file: int, kind: type, slots: list[int] | slice) -> None:
    ours, theirs = Slab(file, SLOTS, TINY), Slab(file, SLOTS, TINY)
    images = pictures(3, kind)
    read = theirs.read(slots, ours.write(slots, images))
    assert read.dtype == kind
    np.testing.assert_array_equal(read, images)
    rows = np.linspace(0, 1, 15, dtype=np.float32).reshape(3, 5)
    theirs.write_answers(slots, rows)
    np.testing.assert_array_equal(ours.read_answers(slots), rows)


def test_no_slot_touches_another_whatever_it_holds(file: int) -> None:
    slab = Slab(file, SLOTS, TINY)
    kinds = [np.uint8, np.float32] * 3 + [np.uint8]
    images = [pictures(SLOTS, kind)[index] for index, kind in enumerate(kinds)]
    rows = np.arange(SLOTS * 5, dtype=np.float32).reshape(SLOTS, 5)
    slab.write_answers(list(range(SLOTS)), rows)
    written = {slot: slab.write([slot], images[slot][None]) for slot in (3, 6, 0, 5, 1, 4, 2)}
    for slot, kind in written.items():
        np.testing.assert_array_equal(slab.read([slot], kind)[0], images[slot])
    np.testing.assert_array_equal(slab.read_answers(list(range(SLOTS))), rows)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_what_was_read_from_listed_slots_stays_when_they_are_used_again(file: int, kind: type) -> None:
    slab = Slab(file, SLOTS, TINY)
    images = pictures(2, kind)
    kept = slab.read([1, 4], slab.write([1, 4], images))
    slab.write_answers([1, 4], np.ones((2, 5), np.float32))
    rows = slab.read_answers([1, 4])
    slab.write([1, 4], images[::-1])
    slab.write_answers([1, 4], np.zeros((2, 5), np.float32))
    np.testing.assert_array_equal(kept, images)
    np.testing.assert_array_equal(rows, np.ones((2, 5)))


def test_more_images_than_slots_are_refused(file: int) -> None:
    slab = Slab(file, SLOTS, TINY)
    with pytest.raises(ValueError, match="broadcast"):
        slab.write(slice(0, SLOTS + 1), pictures(SLOTS + 1, np.uint8))


def test_another_process_sees_the_same_memory(file: int) -> None:
    code = f"""
from model.architecture import Architecture
from service.slab import Slab
slab = Slab({file}, {SLOTS}, Architecture(width=1, num_classes=5, height=8, input_width=9))
slab.write_answers([6], slab.read([6], "<f4")[:, 2, 7, :5] * 2)
"""
    slab = Slab(file, SLOTS, TINY)
    images = pictures(1, np.float32)
    slab.write([6], images)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, pass_fds=[file])
    np.testing.assert_array_equal(slab.read_answers([6])[0], images[0, 2, 7, :5] * 2)
