"""Which files are run as packages; what packages answer is compared in test_fast.py."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from model.fast_package import PackagedMixture, export_package
from model.mixture import Mixture


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("torch", "1.0", "made for torch 1.0, but this is torch 2"),
        ("device", "cuda", "made for device cuda, but this is device cpu"),
    ],
)
def test_a_package_made_for_something_else_is_not_run(tmp_path: Path, fact: str, value: str, message: str) -> None:
    facts = {"architecture": "{}", "device": "cpu", "dtype": "float32", "torch": torch.__version__, fact: value}
    path = tmp_path / "mixture.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mixture/data/aotinductor/model/it.wrapper_metadata.json", json.dumps(facts))
    with pytest.raises(ValueError, match=rf"mixture.pt2: {message}.*export it anew"):
        PackagedMixture(path)


def test_a_package_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixture.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mixture/data/aotinductor/model/it.wrapper_metadata.json", '{"device": "cpu"}')
    with pytest.raises(ValueError, match=r"mixture.pt2: .*doesn't note its architecture, dtype, torch"):
        PackagedMixture(path)


def test_a_package_must_be_called_one(mixture: Mixture, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixture.so: the name of a package must end in .pt2"):
        export_package(mixture, tmp_path / "mixture.so")


def test_a_file_that_is_no_package_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mixture.pt2"
    with pytest.raises(ValueError, match=r"mixture.pt2: not a package of a mixture .*No such file"):
        PackagedMixture(path)
    path.write_bytes(b"PK" + bytes(200))
    with pytest.raises(ValueError, match=r"mixture.pt2: not a package of a mixture"):
        PackagedMixture(path)
