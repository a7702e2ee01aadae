"""Where a mixture runs: the device, what it can do, and what tells one processor from another.

Torch is imported only where there is a GPU to ask about.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

STACKS = (1, 3, 9)
"""How many experts OpenVINO executions stack into one grouped convolution."""

_CPUINFO = Path("/proc/cpuinfo")
_DRIVER_FILES = tuple(map(Path, ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")))


def choose_device(name: str) -> str:
    """Return ``cpu``, ``cuda`` or ``cuda:N`` for what a setting says; raises ``ValueError`` when this machine lacks it.

    ``auto`` means a GPU if there is one; torch is asked only if a driver's file says that there may be one. Without torch, as
    in the image for CPUs, there is none that could be used.
    """
    if name == "auto":
        if not any(path.exists() for path in _DRIVER_FILES) or not has_torch():
            return "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if not found:
        raise ValueError(f"device={name}: use auto, cpu, cuda or cuda:N")
    if name != "cpu":
        if not has_torch():
            raise ValueError(f"device={name}: torch is not installed, as in the image for CPUs; take the one for CUDA")
        import torch

        if int(found[1] or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def native_bfloat16(device: str) -> bool:
    """Tell whether a device multiplies bfloat16 natively."""
    if device == "cpu":
        return "avx512_bf16" in _cpu()[1]
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def gpu_uuid(device: str) -> str:
    """Return the UUID of a GPU, which names it whatever ``CUDA_VISIBLE_DEVICES`` shows of the machine; empty for ``cpu``."""
    if device == "cpu":
        return ""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def has_openvino() -> bool:
    """Tell whether OpenVINO is installed (extra ``cpu``)."""
    return find_spec("openvino") is not None


def has_torch() -> bool:
    """Tell whether torch is installed; on a CPU OpenVINO does without."""
    return find_spec("torch") is not None


def available(device: str, num_experts: int = 9, top_k: int | None = None) -> list[str]:
    """Return the names of the executions that can run on a device and can be made from a checkpoint alone.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_experts: How many experts ``E`` the mixture has.
        top_k: How many of them run per image; ``None`` means all. Fewer than all are run one by one, by torch or OpenVINO.
    """
    precisions = ["float32", "bfloat16"] if native_bfloat16(device) else ["float32"]
    if top_k is not None and top_k < num_experts:
        kinds, stacks = ["loop"], [1]
    else:
        kinds, stacks = ["loop", "grouped"], sorted({min(stack, num_experts) for stack in STACKS})
        if any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            kinds += ["compiled", "aotinductor"]
        if device != "cpu":
            kinds.append("graphs")
    names = [f"{kind}-{precision}" for kind in kinds for precision in precisions]
    if device == "cpu" and has_openvino():
        names += [f"openvino-{precision}-x{stack}" for precision in precisions for stack in stacks]
    return names


def processor(device: str) -> tuple[str, str]:
    """Return the name of the processor of a device, for people, and a slug that is another for every kind of it.

    A CPU is told from others by its name, its instruction sets and the number of cores that this process may use, a GPU by its
    name.
    """
    if device == "cpu":
        name, flags = _cpu()
        shown, identity = f"{name}, {cores()} cores", f"{name}\0{' '.join(sorted(flags))}\0{cores()}"
    else:
        import torch

        shown = identity = torch.cuda.get_device_name(device)
    slug = re.sub(r"[^a-z0-9]+", "-", shown.lower()).strip("-")[:48]
    return shown, f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@cache
def _cpu() -> tuple[str, frozenset[str]]:
    """Return the processor's name and its instruction sets."""
    fields: dict[str, str] = {}
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features", "")
    return fields.get("model name") or platform.processor() or platform.machine(), frozenset(flags.split())
