"""Devices: what a setting means, and what tells one processor from another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
import torch

from model import device
from model.device import available, choose_device, gpu_uuid, native_bfloat16, processor

CPU = "processor\t: 0\nmodel name\t: Example 9000\nflags\t\t: fpu avx2 {flags}\n\nprocessor\t: 1\nmodel name\t: Example 9000\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make this machine's processor one with other instruction sets, or with none that can be read."""

    def pretend(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(device, "_CPUINFO", tmp_path / "cpuinfo")
        device._cpu.cache_clear()

    yield pretend
    device._cpu.cache_clear()


def test_auto_is_the_cpu_without_asking_torch_where_no_driver_is() -> None:
    code = """
import sys
from pathlib import Path
from model import device
device._DRIVER_FILES = (Path("/nowhere"),)
assert device.choose_device("auto") == device.choose_device("cpu") == "cpu"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_asks_torch_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_DRIVER_FILES", (tmp_path,))
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_without_torch_a_gpu_is_not_used_and_not_promised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_DRIVER_FILES", (tmp_path,))
    monkeypatch.setattr(device, "has_torch", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"device=cuda:1: torch is not installed"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps", ""])
def test_what_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device={name}: use auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_a_gpu_is_named_by_its_uuid_and_a_processor_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = UUID("8c1bdd93-7f7c-4a8e-9d2e-0a4f3f2b6c11")
    monkeypatch.setattr(torch.cuda, "get_device_properties", {"cuda:1": SimpleNamespace(uuid=uuid)}.__getitem__)
    assert gpu_uuid("cuda:1") == "8c1bdd93-7f7c-4a8e-9d2e-0a4f3f2b6c11"
    assert gpu_uuid("cpu") == ""


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device=cuda:99: this machine has \d+ CUDA devices"):
        choose_device("cuda:99")


def test_bfloat16_is_native_where_the_instruction_is(cpuinfo: Callable[[str], None]) -> None:
    assert native_bfloat16("cpu") == bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    cpuinfo(CPU.format(flags="avx512f"))
    assert not native_bfloat16("cpu")
    assert not any("bfloat16" in name for name in available("cpu"))
    cpuinfo(CPU.format(flags="avx512f avx512_bf16"))
    assert native_bfloat16("cpu")
    assert {"loop-float32", "loop-bfloat16", "grouped-bfloat16"} <= set(available("cpu"))


def test_a_processor_is_another_if_name_instructions_or_cores_differ(
    cpuinfo: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [processor("cpu")[1]]
    cpuinfo(CPU.format(flags="avx512f"))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    name, slug = processor("cpu")
    assert name == "Example 9000, 2 cores"
    assert slug.startswith("example-9000-2-cores-")
    seen.append(slug)
    cpuinfo(CPU.format(flags="avx512f avx512_bf16"))
    seen.append(processor("cpu")[1])
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    seen.append(processor("cpu")[1])
    cpuinfo("CPU implementer : 0x41\nFeatures : fp asimd bf16\n")  # as ARM's are
    seen.append(processor("cpu")[1])
    assert len(set(seen)) == 5
    assert all(part.isalnum() for slug in seen for part in slug.split("-"))


def test_under_top_k_only_what_skips_experts_is_available() -> None:
    assert {name.split("-")[0] for name in available("cpu", 9, 2)} <= {"loop", "openvino"}
    assert not [name for name in available("cpu", 9, 2) if name.endswith(("-x3", "-x9"))]
    stacks = {name.rpartition("-x")[2] for name in available("cpu", 5) if name.startswith("openvino")}
    assert stacks in ({"1", "3", "5"}, set())
