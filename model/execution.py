"""Executions: ways to run a checkpoint that compute the same function.

Importing this does not import torch; only executions that need it do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from model.checkpoint import read_weights
from model.device import has_torch
from model.plan import ExecutionName

if TYPE_CHECKING:
    import torch

    from model.fast import Prediction as Tensors

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.3}
"""Largest difference of a probability from the reference's, by precision; labels are equal where the two top ones differ by
twice as much. What int8 does to accuracy is measured for each checkpoint before it is used."""

COMPILED_STACK = 3
"""Experts per grouped convolution in the compiled executions: more help small batches and slow large ones down."""


class Prediction(NamedTuple):
    """What a batch came to.

    Attributes:
        probabilities: ``(B, C)`` float32.
        gate: The weights that the gate gave, ``(B, E)`` float32; 0 for experts that did not run, all alike in a vote.
    """

    probabilities: npt.NDArray[np.float32]
    gate: npt.NDArray[np.float32]


class Execution(Protocol):
    """One way to run a mixture."""

    def predict(self, images: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, for any ``B`` from 1."""


def make_executions(
    names: Iterable[str],
    checkpoint: str | Path,
    device: str,
    top_k: int | None = None,
    threads: int = 0,
    max_batch_size: int = 64,
    files: Mapping[str, Path] | None = None,
) -> dict[str, Execution]:
    """Return executions by name.

    Args:
        names: Which.
        checkpoint: ``compact``, the checkpoint inside the package, or a path.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        top_k: How many experts run per image; ``None`` means all.
        threads: CPU threads; 0 means all cores.
        max_batch_size: Images of the largest CUDA graph; larger batches are split.
        files: What ``aotinductor`` and int8 executions are loaded from, by name.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: There is no execution of such a name, or its file is not given.
    """
    parsed = {name: ExecutionName.parse(name) for name in names}
    made: dict[str, Execution] = {}
    openvino = {name: what for name, what in parsed.items() if what.kind == "openvino"}
    if openvino:
        made |= _make_openvino(openvino, checkpoint, top_k, threads, files or {})
    torch_names = parsed.keys() - openvino.keys()
    if torch_names:
        names = {name: parsed[name] for name in torch_names}
        made |= _make_torch(names, checkpoint, device, top_k, threads, max_batch_size, files or {})
    return made


def _make_openvino(
    names: Mapping[str, ExecutionName],
    checkpoint: str | Path,
    top_k: int | None,
    threads: int,
    files: Mapping[str, Path],
) -> dict[str, Execution]:
    from model.openvino import OpenVinoMixture

    header, weights = read_weights(checkpoint)
    made: dict[str, Execution] = {}
    for name, what in names.items():
        if what.precision == "int8":
            made[name] = OpenVinoMixture.from_file(_file(name, files), what.stack, threads)
        else:
            made[name] = OpenVinoMixture(header.architecture, weights, what.precision, what.stack, top_k, threads)
    return made


def _make_torch(
    names: Mapping[str, ExecutionName],
    checkpoint: str | Path,
    device: str,
    top_k: int | None,
    threads: int,
    max_batch_size: int,
    files: Mapping[str, Path],
) -> dict[str, Execution]:
    if not has_torch():
        raise ValueError(
            f"{', '.join(names)}: torch is not installed, as in the image for CPUs, where OpenVINO runs what the processor "
            "multiplies natively; take precision=auto or float32"
        )
    import torch

    from model.checkpoint import load_checkpoint

    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does in the graphs and in an evaluation
    mixture = load_checkpoint(checkpoint, device)
    mixture.top_k = top_k
    made: dict[str, Execution] = {}
    for name, what in names.items():
        if what.kind == "graphs":
            from model.fast_graphs import GraphedMixture

            made[name] = _Torch(GraphedMixture(mixture, _dtype(what), max_batch_size))
        elif what.kind == "aotinductor":
            from model.fast_package import PackagedMixture

            made[name] = _Torch(PackagedMixture(_file(name, files), torch.device(device)))
        elif what.kind == "compiled":
            from model.fast_compiled import CompiledMixture

            made[name] = _Torch(CompiledMixture(mixture, _dtype(what), COMPILED_STACK))
        elif what.kind == "grouped":
            from model.fast_dense import DenseMixture

            made[name] = _Torch(DenseMixture(mixture, _dtype(what)))
        else:
            from model.fast import FastMixture

            made[name] = _Torch(FastMixture(mixture, _dtype(what)))
    return made


def _dtype(what: ExecutionName) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[what.precision]


def _file(name: str, files: Mapping[str, Path]) -> Path:
    if name not in files:
        raise ValueError(f"{name} is loaded from a file that palisade-serve tune makes, and none is given")
    return files[name]


class TensorExecution(Protocol):
    """One way to run a mixture that takes and gives tensors."""

    def predict(self, images: torch.Tensor) -> Tensors:
        """As :meth:`Execution.predict`."""


class _Torch:
    """An execution by torch that takes and gives arrays."""

    def __init__(self, tensors: TensorExecution) -> None:
        self._tensors = tensors

    def predict(self, images: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> Prediction:
        import torch

        writable = np.require(images, requirements=["C_CONTIGUOUS", "WRITEABLE"])  # torch warns of what it could overwrite
        probabilities, gate = self._tensors.predict(torch.from_numpy(writable))
        return Prediction(probabilities.cpu().numpy(), gate.cpu().numpy())
