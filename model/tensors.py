"""What a checkpoint stores: named blocks of bytes, each with a type and a shape. Nothing here needs torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import TensorSpec, deserialize, serialize_file

from model.architecture import Architecture

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
READABLE = tuple(_NAMES.values())
"""The types that :meth:`StoredTensor.float32` reads."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file.

    Attributes:
        dtype: The type, by torch's name for it if it is one of :data:`READABLE`, else by safetensors'.
        shape: The shape.
        data: The little-endian bytes, uint8 in one dimension.
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def float32(self) -> npt.NDArray[np.float32]:
        """Return the values in a new array of this shape; raises ``ValueError`` for a type that is not :data:`READABLE`."""
        if self.dtype not in READABLE:
            raise ValueError(f"type {self.dtype} is not read; only {', '.join(READABLE)} are")
        if self.dtype != "bfloat16":
            return self.data.view(np.dtype(self.dtype).newbyteorder("<")).astype(np.float32).reshape(self.shape)
        bits = self.data.view("<u2").astype(np.uint32)
        bits <<= 16  # a bfloat16 is the upper half of a float32
        return bits.view(np.float32).reshape(self.shape)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file by name; raises ``SafetensorError`` or ``OSError`` if it can't be read."""
    return {
        name: StoredTensor(
            _NAMES.get(stored["dtype"], stored["dtype"]), tuple(stored["shape"]), np.frombuffer(stored["data"], np.uint8)
        )
        for name, stored in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; every type must be one of :data:`READABLE`."""
    specs = {
        name: TensorSpec(dtype=stored.dtype, shape=stored.shape, data_ptr=stored.data.ctypes.data, data_len=stored.data.nbytes)
        for name, stored in tensors.items()  # the addresses stay good, since `tensors` outlives the call
    }
    serialize_file(specs, path, metadata)


def digest_of(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the SHA-256 over name, type, shape and bytes of every tensor, in order of name."""
    digest = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        digest.update(f"{name}\0{stored.dtype}\0{list(stored.shape)}\0".encode())
        digest.update(stored.data.data)
    return digest.hexdigest()


def stored_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this architecture has."""
    shapes = {} if architecture.votes else dict(_gate_shapes(architecture))
    for index in range(architecture.num_experts):
        shapes |= {f"experts.{index}.{name}": shape for name, shape in _expert_shapes(architecture)}
    return shapes


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _gate_shapes(architecture: Architecture) -> Shapes:
    channels = 3
    for position, factor in ((0, 1), (3, 2), (6, 4)):
        outputs = architecture.gate_width * factor
        yield from _convolution(f"gate.features.{position}", f"gate.features.{position + 1}", (outputs, channels, 3, 3))
        channels = outputs
    yield from _linear("gate.head", architecture.num_experts, channels)


def _expert_shapes(architecture: Architecture) -> Shapes:
    yield from _convolution("stem.0", "stem.1", (architecture.width, 3, 3, 3))
    blocks = architecture.blocks()
    for index, block in enumerate(blocks):
        name = f"blocks.{index}"
        yield from _convolution(f"{name}.conv1", f"{name}.bn1", (block.outputs, block.inputs, 3, 3))
        yield from _convolution(f"{name}.conv2", f"{name}.bn2", (block.outputs, block.outputs, 3, 3))
        if block.projects:
            yield from _convolution(f"{name}.downsample.0", f"{name}.downsample.1", (block.outputs, block.inputs, 1, 1))
    yield from _linear("head", architecture.num_classes, blocks[-1].outputs)


def _convolution(name: str, norm: str, shape: tuple[int, int, int, int]) -> Shapes:
    """Yield a convolution without bias and the batch norm after it."""
    yield f"{name}.weight", shape
    for vector in ("weight", "bias", "running_mean", "running_var"):
        yield f"{norm}.{vector}", shape[:1]


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
