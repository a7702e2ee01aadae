"""Parts: what was split comes back byte for byte, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training.parts
from training.parts import join, split

CONTENT = bytes(range(250))
"""As three parts of at most 100 bytes."""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The manifest of ``CONTENT``, beside its parts."""
    file = tmp_path / "weights.bin"
    file.write_bytes(CONTENT)
    return split(file, tmp_path / "parts", limit=100)[-1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite(manifest: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))


def test_a_file_becomes_parts_and_a_manifest_that_describes_them(manifest: Path) -> None:
    pieces = {"weights.bin.000": CONTENT[:100], "weights.bin.001": CONTENT[100:200], "weights.bin.002": CONTENT[200:]}
    assert names(manifest.parent) == {*pieces, "weights.bin.manifest.json"}
    for name, piece in pieces.items():
        assert (manifest.parent / name).read_bytes() == piece
    assert json.loads(manifest.read_text()) == {
        "name": "weights.bin",
        "bytes": 250,
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "parts": [
            {"name": name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()} for name, piece in pieces.items()
        ],
    }


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 320), st.integers(1, 64))
def test_what_was_split_comes_back_whatever_the_sizes(content: bytes, limit: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(training.parts, "BLOCK", block)  # so that a part is several blocks, as a real one is
        folder = Path(name)
        (folder / "any").write_bytes(content)
        *parts, manifest = split(folder / "any", folder / "parts", limit)
        assert b"".join(part.read_bytes() for part in parts) == content
        assert all(0 < part.stat().st_size <= limit for part in parts)
        assert len(parts) == -(-len(content) // limit)
        out = join(manifest, folder / "made" / "again")
        assert out == folder / "made" / "again"
        assert out.read_bytes() == content
        assert names(out.parent) == {"again"}


def test_a_file_of_exactly_one_part_and_a_byte_more(tmp_path: Path) -> None:
    for size, count in ((100, 1), (101, 2), (0, 0)):
        (tmp_path / "x").write_bytes(b"x" * size)
        assert len(split(tmp_path / "x", tmp_path / "parts", 100)) == count + 1


def test_splitting_and_joining_again_changes_nothing(manifest: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in manifest.parent.iterdir()}
    split(tmp_path / "weights.bin", manifest.parent, limit=100)
    assert {path: path.read_bytes() for path in manifest.parent.iterdir()} == before
    for _ in range(2):
        assert join(manifest, tmp_path / "again").read_bytes() == CONTENT
    assert {path: path.read_bytes() for path in manifest.parent.iterdir()} == before


def test_parts_of_an_earlier_split_are_removed_and_nothing_else(manifest: Path, tmp_path: Path) -> None:
    folder = manifest.parent
    others = {"weights.bin.txt", "weights.bin.1", "weights.binx.000", "other.bin.002", "weights.bin.001.txt"}
    for name in others:
        (folder / name).write_bytes(b"mine")
    for name in ("weights.bin.1234", "weights.bin.007.partial"):  # of a longer file, and of a split that was killed
        (folder / name).write_bytes(b"stale")
    (tmp_path / "weights.bin").write_bytes(CONTENT[:150])
    split(tmp_path / "weights.bin", folder, limit=100)
    assert names(folder) == {"weights.bin.000", "weights.bin.001", "weights.bin.manifest.json", *others}
    assert join(manifest, tmp_path / "out").read_bytes() == CONTENT[:150]


def damage(manifest: Path) -> None:
    part = manifest.parent / "weights.bin.001"
    part.write_bytes(part.read_bytes()[:-1] + b"!")


def resize(manifest: Path, size: int) -> None:
    (manifest.parent / "weights.bin.001").write_bytes(b"x" * size)


def swap(manifest: Path) -> None:
    first, second = (manifest.parent / f"weights.bin.{number:03d}" for number in range(2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def swap_entries(manifest: Path) -> None:
    rewrite(manifest, lambda content: content["parts"].insert(0, content["parts"].pop(1)))


def two_splits_mixed(manifest: Path) -> None:
    """Leave what a kill leaves: the new parts under the old manifest."""
    old = manifest.read_bytes()
    file = manifest.parent.parent / "weights.bin"
    file.write_bytes(CONTENT[::-1])
    split(file, manifest.parent, limit=100)
    manifest.write_bytes(old)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (damage, r"weights\.bin\.001 is damaged.*copy it again"),
    "missing": (lambda m: (m.parent / "weights.bin.002").unlink(), r"weights\.bin\.002 is missing: copy it again"),
    "a folder instead": (
        lambda m: ((m.parent / "weights.bin.002").unlink(), (m.parent / "weights.bin.002").mkdir()),
        r"weights\.bin\.002 is missing",
    ),
    "too short": (lambda m: resize(m, 99), r"weights\.bin\.001 has 99 bytes, not 100: copy it again"),
    "too long": (lambda m: resize(m, 101), r"weights\.bin\.001 has 101 bytes, not 100: copy it again"),
    "empty": (lambda m: resize(m, 0), r"weights\.bin\.001 has 0 bytes, not 100"),
    "swapped": (swap, r"weights\.bin\.000 is damaged"),
    "in another order": (swap_entries, r"manifest\.json: the parts do not make the file"),
    "of two splits": (two_splits_mixed, r"weights\.bin\.000 is damaged"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_parts_are_refused_by_name_and_leave_what_was_there(manifest: Path, tmp_path: Path, case: str) -> None:
    spoil, message = SPOILT[case]
    spoil(manifest)
    out = tmp_path / "out"
    out.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        join(manifest, out)
    assert out.read_bytes() == b"before"
    assert not (tmp_path / "out.partial").exists()


NAMES = ["../weights.bin.001", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "weights.bin.001/"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_manifest_cannot_reach_outside_its_folder(manifest: Path, tmp_path: Path, name: str) -> None:
    os.replace(manifest.parent / "weights.bin.001", tmp_path / "weights.bin.001")  # where "../" would find it
    rewrite(manifest, lambda content: content["parts"][1].update(name=name))
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest.*parts\.1\.name.*not a plain file name"):
        join(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "the file's name": (lambda c: c.update(name="../x"), "name"),
    "no digest": (lambda c: c.pop("sha256"), "sha256"),
    "half a digest": (lambda c: c["parts"][0].update(sha256="ab"), r"parts\.0\.sha256"),
    "a negative size": (lambda c: c["parts"][2].update(bytes=-50), r"parts\.2\.bytes"),
    "a size as text": (lambda c: c.update(bytes="250"), "bytes"),
    "an unknown field": (lambda c: c.update(mode="0777"), "mode"),
    "another size": (lambda c: c.update(bytes=251), "its parts have 250 bytes, the file 251"),
    "a part less": (lambda c: c["parts"].pop(), "its parts have 200 bytes, the file 250"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_manifest_that_makes_no_sense_is_refused_by_file_and_field(manifest: Path, tmp_path: Path, case: str) -> None:
    change, message = CHANGES[case]
    rewrite(manifest, change)
    with pytest.raises(ValueError, match=rf"weights\.bin\.manifest\.json.*{message}.*split the file again"):
        join(manifest, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04N.", b'{"name": "weights.bin"'])
def test_a_file_that_is_no_manifest_is_refused_by_name(manifest: Path, tmp_path: Path, content: bytes) -> None:
    manifest.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.bin\.manifest\.json is not a manifest"):
        join(manifest, tmp_path / "out")


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.bin\.manifest\.json is missing"):
        join(tmp_path / "weights.bin.manifest.json", tmp_path / "out")


def test_parts_without_room_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(ValueError, match="at least 1 byte, not 0"):
        split(tmp_path / "x", tmp_path / "parts", 0)
