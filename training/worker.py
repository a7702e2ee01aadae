"""The worker: the process that trains, one of several under ``torchrun``."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class StopRequested(Exception):
    """A run ended early, with its state saved.

    Args:
        reason: ``time`` or the name of a signal.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stop:
    """Asks a run to save its state and end: after so many minutes, or at SIGINT or SIGTERM.

    Args:
        minutes: How long the run may take; ``None`` means no bound.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal: str | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop, or ``None`` to go on."""
        if self._signal is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return "time"
        return self._signal

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM inside the block; a second one acts as it always does.

        Only a program's main thread is told of signals; in another one the block just runs.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            del frame
            self._signal = signal.Signals(number).name
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Worker:
    """Where and beside whom a stage is trained.

    Attributes:
        device: This process's device.
        rank: This process's number, from 0.
        count: How many processes train together.
        compile: Run the experts through ``torch.compile``.
        stop: When to end early.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    compile: bool = False
    stop: Stop = field(default_factory=Stop)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def parallel(self, task: nn.Module) -> nn.Module:
        """Return ``task`` so that its gradients are averaged over all workers."""
        if self.count == 1:
            return task
        return DistributedDataParallel(task, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def agreed(self, value: T) -> T:
        """Return the first worker's value on all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait for the other workers, as for files that the first one writes."""
        self.agreed(None)

    def share_statistics(self, network: nn.Module) -> None:
        """Give all workers the first one's batch-norm statistics, which an attack in eval mode sees."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def started(device: str, *, compiled: bool = False, stop: Stop | None = None) -> Iterator[Worker]:
    """Join the other workers if ``torchrun`` started this process, and leave them at the end of the block.

    Args:
        device: ``cpu`` or ``cuda``; under ``torchrun`` every worker takes the GPU of its local rank.
        compiled: Whether experts are compiled.
        stop: When to end early; by default only at a signal.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device(device)
    if where.type == "cuda":
        torch.backends.cudnn.benchmark = True
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if count > 1 else where.index or 0)
        torch.cuda.set_device(where)
    stop = stop or Stop()
    if count == 1:
        yield Worker(where, compile=compiled, stop=stop)
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Worker(where, dist.get_rank(), count, compiled, stop)
    finally:
        dist.destroy_process_group()
