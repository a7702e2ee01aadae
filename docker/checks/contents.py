"""Run inside the service's image: it must hold nothing that builds, nothing that installs, and nothing of training."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TOOLS = (
    "gcc",
    "g++",
    "cc",
    "c++",
    "clang",
    "ld",
    "as",
    "make",
    "cmake",
    "ptxas",
    "nvcc",
    "git",
    "curl",
    "wget",
    "pip",
    "pip3",
    "uv",
    "palisade-train",
)
MODULES = (
    "pip",
    "ensurepip",
    "setuptools",
    "hatchling",
    "training",
    "matplotlib",
    "scipy",
    "tqdm",
    "tensorboard",
    "pyautoattack",
    "pytest",
    "triton",
)
CUDA = ("torch", "torchvision", "nvidia")
USER = (10001, 10001)


def set_id_files() -> Iterator[Path]:
    """Yield the programs that run as their owner."""
    for folder in ("/bin", "/sbin", "/usr", "/opt"):
        for path in Path(folder).rglob("*"):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                yield path


def problems() -> Iterator[str]:
    """Yield what is wrong with the image."""
    yield from (f"there is the command {tool}" for tool in TOOLS if shutil.which(tool))
    absent = MODULES + (CUDA if os.environ["PALISADE_DEVICE"] == "cpu" else ())
    yield from (f"there is the module {module}" for module in absent if find_spec(module))
    yield from (f"{path} may be written" for path in sys.path if os.access(path, os.W_OK))
    yield from (f"{path} runs as its owner" for path in set_id_files())
    if (os.getuid(), os.getgid()) != USER:
        yield f"the user is {os.getuid()}:{os.getgid()} and not {USER[0]}:{USER[1]}"


def main() -> int:
    """Print what is wrong, one a line; return the exit status."""
    found = list(problems())
    for problem in found:
        print(f"in the image {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
