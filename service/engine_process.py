"""The engine in a process of its own: started, watched and started again when it dies."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson

from model.checkpoint import CheckpointError, read_header
from model.fast_path import MOST_LANES
from service import logs
from service.engine import facts_of, load, predict, step_back
from service.metrics import Metrics
from service.serving import VERSION_DIGITS, ModelFacts
from service.settings import Settings
from service.slab import Slab
from service.snapshot import Snapshot
from service.wire import Wire

log = logging.getLogger(__name__)

STABLE_S = 60.0
"""An engine that lived as long as this is started again at once."""

LONGEST_PAUSE_S = 30.0

PATIENCE_S = 10.0
"""An engine that takes longer to end is killed."""


class EngineFailedError(RuntimeError):
    """The engine could not run a batch, or could not be started."""


class EngineProcess:
    """A batcher's engine that lives in a child process.

    Args:
        settings: How many images a batch has at most. The child reads its own from the environment.
        snapshot: The checkpoint that it runs, however often it is started again; :meth:`stop` closes it.
        metrics: Told of restarts.
        on_change: Called when the engine has come up or gone down.

    Attributes:
        snapshot: As given.
        version: Of its model.
        facts: What it runs; known once it is started.
        lanes: How many batches may run at a time.
    """

    def __init__(self, settings: Settings, snapshot: Snapshot, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self.snapshot = snapshot
        self.version = snapshot.header.weights_sha256[:VERSION_DIGITS]
        self.facts: ModelFacts | None = None
        self._metrics = metrics
        self._on_change = on_change
        self.lanes = 1
        self._batch = settings.max_batch_size
        architecture = snapshot.header.architecture
        self._memory = Slab.make_file(MOST_LANES * self._batch, architecture)
        try:
            self._slab = Slab(self._memory, MOST_LANES * self._batch, architecture)
        except BaseException:
            os.close(self._memory)
            raise
        self._free_lanes = list(range(MOST_LANES))
        self._up = asyncio.Event()
        self._gone = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: Wire | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}  # by lane
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether a batch would be run at once."""
        return self._up.is_set()

    @property
    def pid(self) -> int | None:
        """The child's number, of the one that runs or ran last."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the engine and return when it is warm.

        Raises:
            CheckpointError: The checkpoint cannot be used, or not with these settings.
            EngineFailedError: It cannot be started for another reason; the message is for the operator.
            OSError: There are no more processes or open files to be had.
        """
        await self._spawn()
        self._watcher = asyncio.create_task(self._watch())

    async def up(self) -> None:
        """Return when the engine can take a batch, or was stopped."""
        await self._up.wait()

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        """Return probabilities ``(B, C)`` float32 for images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``.

        Raises:
            EngineFailedError: The engine failed on this batch, or died.
        """
        if self._wire is None or not self._up.is_set():
            raise EngineFailedError("the engine is down")
        lane = self._free_lanes.pop()
        try:
            used = slice(lane * self._batch, lane * self._batch + len(images))
            kind = self._slab.write(used, images)
            self._wire.send({"lane": lane, "images": len(images), "kind": kind, "alone": alone})
            await self._reply(lane)
            return self._slab.read_answers(used)
        finally:
            self._free_lanes.append(lane)

    async def stop(self) -> None:
        """End the engine for good; it is not started again."""
        patience_s = PATIENCE_S if self._up.is_set() else 0.0  # one that is loading does not listen, and has nothing to finish
        self._up.set()  # lets go of who waits for it; another engine has taken its place
        if self._watcher is not None:
            self._watcher.cancel()
        if self._wire is not None:
            self._wire.close()  # the child ends when it reads the end of its socket
        if self._process is not None:
            await asyncio.to_thread(_end, self._process, patience_s)
            self._metrics.process_gone(self._process.pid)
        self.snapshot.close()
        os.close(self._memory)

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                descriptors = (theirs.fileno(), self._memory, self.snapshot.file)
                command = [sys.executable, "-m", "service.engine_process", "--socket", str(descriptors[0]), "--memory"]
                command += [str(descriptors[1]), "--checkpoint", str(self.snapshot.path)]
                self._process = subprocess.Popen(command, pass_fds=descriptors)  # noqa: ASYNC220 (it returns at once)
            self._metrics.process_started(self._process.pid)
            self._gone.clear()
            self._wire = Wire(self._told, self._lost)
            # The child's first word is that it is warm; unlike for a lane's answer, nobody has to wait for it to the end.
            hello = self._waiting[0] = asyncio.get_running_loop().create_future()
            await self._wire.open(ours)
        except BaseException:
            ours.close()  # if a child was started, it ends by that
            raise
        ready = await hello
        self.lanes, self.facts = ready["lanes"], ModelFacts(**ready["facts"])
        self._metrics.gpu.use(self.facts.gpu)
        self._up.set()
        self._on_change()

    async def _watch(self) -> None:
        """Start the engine again whenever it has died, after longer and longer pauses if it dies soon."""
        pause, started = 0.0, time.monotonic()
        while True:
            await self._gone.wait()
            assert self._process is not None
            status = await asyncio.to_thread(_end, self._process)
            self._metrics.process_gone(self._process.pid)
            pause = 0.0 if time.monotonic() - started > STABLE_S else min(LONGEST_PAUSE_S, 2 * pause + 0.1)
            log.error("the engine died with status %d; starting it again in %.1f s", status, pause)
            await asyncio.sleep(pause)
            started = time.monotonic()
            self._metrics.engine_restarts.inc()
            try:
                await self._spawn()
            except (CheckpointError, EngineFailedError, OSError) as error:
                log.error("the engine cannot be started again: %s", error)
                self._gone.set()

    async def _reply(self, lane: int) -> Any:
        reply = self._waiting[lane] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.shield(reply)  # a lane is in use until the child has answered
        except asyncio.CancelledError:
            await asyncio.wait([reply])
            raise

    def _told(self, message: Any) -> None:
        reply = self._waiting.pop(message["lane"])
        if reply.cancelled():  # nobody waits for this child any more
            return
        if "unusable" in message:
            reply.set_exception(CheckpointError(self.snapshot.explain(message["unusable"])))
        elif "error" in message:
            reply.set_exception(EngineFailedError(message["error"]))
        else:
            reply.set_result(message)

    def _lost(self) -> None:
        was_up = self._up.is_set()
        self._up.clear()
        self._gone.set()
        waiting, self._waiting = self._waiting, {}
        for reply in waiting.values():
            if not reply.cancelled():
                reply.set_exception(EngineFailedError("the engine died"))
        if was_up:
            self._on_change()


def _end(process: subprocess.Popen[bytes], patience_s: float = PATIENCE_S) -> int:
    """Wait for a process that was asked to end, and kill it if it does not."""
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> int:
    """Load the engine, say so, and run batches until the other end of the socket closes: the child's side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--checkpoint", required=True)
    options = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent says when it is time
        signal.signal(each, signal.SIG_IGN)
    step_back()
    settings = Settings().model_copy(update={"checkpoint": options.checkpoint})
    logs.configure(settings.log_level)
    with socket.socket(fileno=options.socket) as end, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        return _serve(end, options.memory, settings, Metrics())
    return 0


def _serve(end: socket.socket, memory: int, settings: Settings, metrics: Metrics) -> int:
    lines, batch = end.makefile("rb"), settings.max_batch_size
    try:
        slab = Slab(memory, MOST_LANES * batch, read_header(settings.checkpoint).architecture)
        fast_path = load(settings, metrics)
    except ValueError as error:  # a CheckpointError, or a setting that does not fit the checkpoint
        _say(end, {"lane": 0, "unusable": str(error)})
        return 1
    except RuntimeError as error:
        _say(end, {"lane": 0, "error": str(error)})
        return 1
    _say(end, {"lane": 0, "lanes": fast_path.lanes, "facts": asdict(facts_of(fast_path))})

    def run(lane: int, images: int, kind: str, alone: bool) -> None:
        used = slice(lane * batch, lane * batch + images)
        try:
            slab.write_answers(used, predict(fast_path, slab.read(used, kind), alone, metrics))
        except Exception as error:
            log.exception("the engine failed on a batch of %d images", images)
            _say(end, {"lane": lane, "error": str(error)})
        else:
            _say(end, {"lane": lane})

    if fast_path.lanes == 1:  # torch: load and run in one thread
        for line in lines:
            run(**orjson.loads(line))
        return 0
    with ThreadPoolExecutor(fast_path.lanes, thread_name_prefix="engine") as threads:
        for line in lines:
            threads.submit(run, **orjson.loads(line))
    return 0


def _say(end: socket.socket, message: object) -> None:
    # One small message is written whole, so that threads need no lock.
    end.sendall(orjson.dumps(message) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
