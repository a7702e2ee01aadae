"""The fast path: the executions of a checkpoint that are in use here, and the plan that picks one of them by batch size.

Importing this does not import torch; only executions that need it do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from model.checkpoint import Header, read_header
from model.device import choose_device, cores
from model.execution import TOLERANCE, Execution, Prediction, make_executions
from model.plan import ExecutionName, Plan, default_plan
from model.tuned import Identity, Tuning, artefact, default_folder, find

if TYPE_CHECKING:
    from model.openvino import OpenVinoMixture

log = logging.getLogger(__name__)

NO_INT8_VOTE = "int8's ranges are measured on all experts together, so that one would influence the others' votes"
"""Why experts that vote don't run in int8: the certificate of :mod:`model.certificate` would not hold."""

MOST_LANES = 4
"""Batches that run at a time on a processor with that many cores or more; each lane has its share of them."""


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

    def loaded(plan: Plan, origin: str, files: Mapping[str, Path] | None = None) -> FastPath:
        executions = make_executions(plan.executions, checkpoint, device, top_k, threads, max_batch_size, files)
        lanes, shared = _share(executions, threads)
        return FastPath(header, plan, executions, device, origin, max_batch_size, lanes, shared)

    if tuning and (plan := tuning.plans.get(tuning.precision if precision == "auto" else precision)):
        try:
            return loaded(plan, f"tuned on {tuning.date} for {tuning.machine}", _files(folder, identity, plan))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            log.warning("%s: the tuned plan (%s) fails: %s; the default one is used", folder, plan, str(error).strip())
    if precision == "int8":
        raise ValueError(
            f"precision=int8: {_why_not_int8(folder, tuning)}; run palisade-serve tune --replay FILE.npz on this machine first"
        )
    return loaded(default_plan(header.architecture, device, precision, top_k), "chosen by default")


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


def _files(folder: Path, identity: Identity, plan: Plan) -> dict[str, Path]:
    """Return where each of a plan's executions is loaded from, for those that have a file."""
    return {name: folder / file for name in plan.executions if (file := artefact(identity, name))}


def _why_not_int8(folder: Path, tuning: Tuning | None) -> str:
    return (
        f"the choices in {folder} hold no accepted int8 model"
        if tuning
        else f"there are no choices for this machine in {folder}"
    )
