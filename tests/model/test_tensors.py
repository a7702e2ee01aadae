"""What a checkpoint stores, read and written without torch; torch says here what is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.architecture import PRESETS, Architecture
from model.mixture import Mixture
from model.tensors import digest_of, read_tensors, stored_shapes, write_tensors

VALUES = [0.0, -0.0, 1.0, -1.5, 3.14159274, 1e-40, -65504.0, 1e38]
EMPTY_DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stored_values_are_read_as_torch_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor(VALUES).clamp(-6e4, 6e4 if dtype == torch.float16 else None).to(dtype).reshape(2, 2, 2)
    save_file({"a": tensor, "scalar": torch.tensor(2.5)}, tmp_path / "a")
    read = read_tensors(tmp_path / "a")
    assert read.keys() == {"a", "scalar"}
    assert read["a"].shape == (2, 2, 2)
    assert read["a"].float32().dtype == np.float32
    assert read["a"].float32().tobytes() == tensor.float().numpy().tobytes()
    assert read["scalar"].float32() == np.float32(2.5)


def test_every_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    save_file({"a": every}, tmp_path / "a")
    np.testing.assert_array_equal(read_tensors(tmp_path / "a")["a"].float32(), every.float().numpy())  # NaNs are equal here


def test_a_read_array_may_be_changed_and_changes_nothing_else(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a")
    stored = read_tensors(tmp_path / "a")["a"]
    stored.float32()[:] = 7
    assert stored.float32().tolist() == [1, 1, 1]


def test_a_type_that_no_checkpoint_has_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int32)}, tmp_path / "a")
    with pytest.raises(ValueError, match="I32"):
        read_tensors(tmp_path / "a")["a"].float32()


def test_what_is_written_torch_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor(VALUES), "a": torch.tensor(VALUES).bfloat16().reshape(4, 2), "c": torch.ones(3).half()}
    save_file(tensors, tmp_path / "first")
    write_tensors(tmp_path / "second", read_tensors(tmp_path / "first"), {"note": "猫"})
    again = load_file(tmp_path / "second")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def test_the_digest_is_that_of_the_documented_bytes(tmp_path: Path) -> None:
    save_file({"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[1.0]]).bfloat16()}, tmp_path / "a")
    # printf 'a\0bfloat16\0[1, 1]\0\x80\x3fb\0float32\0[2]\0\0\0\x80\x3f\0\0\0\x40' | sha256sum
    assert digest_of(read_tensors(tmp_path / "a")) == "fcf33f026722d3746922d2909627a11972b90983cf7b7fcf0299c166a0dd16cc"
    assert digest_of({}) == EMPTY_DIGEST


@pytest.mark.parametrize(
    "architecture",
    [*PRESETS.values(), Architecture(width=3, num_classes=7, num_experts=2, gate_width=5, height=9, input_width=40)],
    ids=["full", "compact", "odd"],
)
def test_the_shapes_are_those_of_the_module(architecture: Architecture) -> None:
    with torch.device("meta"):
        state = Mixture(architecture).state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert stored_shapes(architecture) == expected
