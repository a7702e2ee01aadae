"""How a checkpoint is run: executions compute the same function in different ways, and the fast path picks one by batch size.

Importing this does not import torch; only executions that need it do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from model.checkpoint import Header, read_header, read_weights
from model.device import available, choose_device, cores, has_torch
from model.plan import ExecutionName, Plan, default_plan
from model.tuned import Identity, Tuning, artefact, default_folder, find

if TYPE_CHECKING:
    import torch

    from model.fast import Prediction as Tensors
    from model.openvino import OpenVinoMixture

__all__ = [
    "TOLERANCE",
    "Execution",
    "ExecutionName",
    "FastPath",
    "Plan",
    "Prediction",
    "available",
    "choose_device",
    "default_plan",
    "load_fast_path",
    "make_executions",
]

log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.3}
"""Largest difference of a probability from the reference's, by precision; labels are equal where the two top ones differ by
twice as much. What int8 does to accuracy is measured for each checkpoint before it is used."""


NO_INT8_VOTE = "int8's ranges are measured on all experts together, so that one would influence the others' votes"
"""Why experts that vote don't run in int8: the certificate of :mod:`model.certificate` would not hold."""

MOST_LANES = 4
"""Batches that run at a time on a processor with that many cores or more; each lane has its share of them."""

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


class FastPath:
    """A checkpoint's executions and the plan that picks one of them by batch size.

    Attributes:
        header: The checkpoint's header.
        version: The first 12 hex digits of the checkpoint's digest.
        plan: Which execution runs a batch.
        precision: What the experts compute in: ``float32``, ``bfloat16`` or ``int8``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        lanes: How many batches may run at a time.
        description: One line for the log: the plan and where it comes from.
    """

    def __init__(
        self,
        header: Header,
        plan: Plan,
        executions: Mapping[str, Execution],
        device: str,
        origin: str,
        max_batch_size: int,
        lanes: int = 1,
        shared: Mapping[str, Execution] | None = None,
    ) -> None:
        self.header, self.plan, self.device, self.lanes = header, plan, device, lanes
        self.version, self.precision = header.weights_sha256[:12], plan.precision
        self.description = f"{plan}; {origin}"
        self._executions, self._max_batch_size = dict(executions), max_batch_size
        self._shared = self._executions if shared is None else dict(shared)

    def predict(self, images: npt.NDArray[np.uint8] | npt.NDArray[np.float32], alone: bool = True) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, with the execution for their number.

        With one lane, loading, warm-up and every call belong on one thread: torch keeps a team of workers for each thread that
        computes.

        Args:
            images: The batch.
            alone: Take all cores, which is quickest for one batch. Otherwise take one lane's share: up to ``lanes`` threads may
                do so at a time, and get more done together.
        """
        return (self._executions if alone else self._shared)[self.plan.pick(len(images))].predict(images)

    def warm_up(self) -> None:
        """Run batches of every power of two and of the largest size, so that no request waits for a first run."""
        architecture = self.header.architecture
        sizes = {2**power for power in range(self._max_batch_size.bit_length())} | {self._max_batch_size}
        for size in sorted(sizes):
            images = np.zeros((size, 3, architecture.height, architecture.input_width), np.uint8)
            self.predict(images)
            if self._shared is not self._executions:
                self.predict(images, alone=False)


def load_fast_path(
    checkpoint: str | Path = "compact",
    device: str = "auto",
    precision: str = "auto",
    top_k: int | None = None,
    threads: int = 0,
    max_batch_size: int = 64,
    tuned: Path | None = None,
) -> FastPath:
    """Load a checkpoint for serving, in the way that was measured to be fastest here, or in the default one.

    Args:
        checkpoint: ``compact``, the checkpoint inside the package, or a path.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``float32``, ``bfloat16``, or ``int8``, which needs a tuned folder that holds an int8 model.
        top_k: How many experts run per image; ``None`` takes the checkpoint's default.
        threads: CPU threads; 0 means all cores.
        max_batch_size: The largest batch that :meth:`FastPath.warm_up` runs. Larger ones work too.
        tuned: The folder of ``palisade-serve tune``; ``None`` means :func:`model.tuned.default_folder`.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: A setting does not fit this machine or checkpoint; the message names the setting and its value.
    """
    if precision not in ("auto", *TOLERANCE):
        raise ValueError(f"precision={precision}: use auto, {', '.join(TOLERANCE)}")
    device, header = choose_device(device), read_header(checkpoint)
    if precision == "int8" and header.architecture.votes:
        raise ValueError(f"precision=int8: {NO_INT8_VOTE}; use float32 or bfloat16")
    top_k = check_top_k(header, top_k)
    folder = tuned or default_folder()
    identity = Identity.here(header.weights_sha256, device, threads, top_k)
    tuning = find(folder, identity)
    if tuning and (plan := tuning.plans.get(tuning.precision if precision == "auto" else precision)):
        try:
            files = _files(folder, identity, plan)
            executions = make_executions(plan.executions, checkpoint, device, top_k, threads, max_batch_size, files)
            lanes, shared = _share(executions, threads)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            log.warning("%s: the tuned plan (%s) fails: %s; the default one is used", folder, plan, str(error).strip())
        else:
            origin = f"tuned on {tuning.date} for {tuning.machine}"
            return FastPath(header, plan, executions, device, origin, max_batch_size, lanes, shared)
    if precision == "int8":
        raise ValueError(
            f"precision=int8: {_why_not_int8(folder, tuning)}; run palisade-serve tune --replay FILE.npz on this machine first"
        )
    plan = default_plan(header.architecture, device, precision, top_k)
    executions = make_executions(plan.executions, checkpoint, device, top_k, threads, max_batch_size)
    lanes, shared = _share(executions, threads)
    return FastPath(header, plan, executions, device, "chosen by default", max_batch_size, lanes, shared)


def _share(executions: Mapping[str, Execution], threads: int) -> tuple[int, dict[str, Execution] | None]:
    """Return how many batches may run at a time, and the executions for that.

    On a processor that also serves HTTP, a batch that takes all cores waits for the core that does something else at that
    moment. Batches on a share of the cores each wait for nobody.
    """
    lanes = min(MOST_LANES, threads or cores())
    if lanes < 2 or any(ExecutionName.parse(name).kind != "openvino" for name in executions):
        return 1, None
    return lanes, {name: cast("OpenVinoMixture", each).lane(lanes) for name, each in executions.items()}


def check_top_k(header: Header, top_k: int | None) -> int | None:
    """Return how many experts run, ``None`` for all, if ``top_k`` is asked for; ``None`` asks for the checkpoint's default.

    Raises:
        ValueError: The checkpoint does not have so many experts, or they vote and it leaves some out.
    """
    experts = header.architecture.num_experts
    if top_k is not None and not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k}: the checkpoint has {experts} experts; give from 1 to {experts}")
    if header.architecture.votes and top_k not in (None, experts):
        raise ValueError(f"top_k={top_k}: the checkpoint's {experts} experts vote, and every one has its say; leave top_k out")
    top_k = header.top_k if top_k is None else top_k
    return None if top_k == experts else top_k


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


def _files(folder: Path, identity: Identity, plan: Plan) -> dict[str, Path]:
    """Return where each of a plan's executions is loaded from, for those that have a file."""
    return {name: folder / file for name in plan.executions if (file := artefact(identity, name))}


def _why_not_int8(folder: Path, tuning: Tuning | None) -> str:
    return (
        f"the choices in {folder} hold no accepted int8 model"
        if tuning
        else f"there are no choices for this machine in {folder}"
    )


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
