"""The coordinator: the parent of several front ends and of one engine, and the process that has the queue and the quotas."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from service.admin import Admin
from service.admin_server import AdminServer
from service.engine_process import EngineProcess
from service.metrics import Metrics
from service.reload import Reloader
from service.remote import RemoteCaller, slots_of
from service.scheduler import Scheduler
from service.settings import Settings
from service.slab import Slab
from service.snapshot import Snapshot

log = logging.getLogger(__name__)

SHORTEST_LIFE_S = 5.0
"""A front end that dies younger than this is started again after a pause."""

RETRY_S = 1.0

PATIENCE_S = 5.0
"""A front end that takes longer to learn of another model learns of it later."""


@dataclass(eq=False)
class _FrontEnd:
    process: subprocess.Popen[bytes]
    caller: RemoteCaller
    started: float


class Coordinator:
    """Runs one service in several processes.

    Args:
        settings: All settings; the children read their own from the environment.
        listener: The bound socket that all front ends accept connections from.
        metrics: Counts.
        admin_server: Answers operators.

    Attributes:
        engine: The one in use.
    """

    def __init__(self, settings: Settings, listener: socket.socket, metrics: Metrics, admin_server: AdminServer) -> None:
        self._settings = settings
        self._listener = listener
        self._metrics = metrics
        self._admin_server = admin_server
        snapshot = Snapshot(settings.checkpoint)
        self._architecture = snapshot.header.architecture
        self.engine = EngineProcess(settings, snapshot, metrics, self._tell_up)
        self._scheduler = Scheduler(settings, self.engine, metrics)
        reloader = Reloader(settings.checkpoint, snapshot.header, self._scheduler, self)
        self._admin = Admin(settings, self._scheduler, reloader, self, self._processes)
        self._front_ends: set[_FrontEnd] = set()
        self._burials: set[asyncio.Future[None]] = set()
        self._draining = False
        self._stop = asyncio.Event()
        self._all_gone = asyncio.Event()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, leave, drain, and return the exit status.

        Raises:
            CheckpointError: The checkpoint cannot be used.
            EngineFailedError: The engine cannot be started for another reason.
        """
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._signalled, each)
        try:
            await self.engine.start()
            await self._scheduler.start()
            for _ in range(self._settings.frontends):
                await self._start_front_end()
            for front_end in list(self._front_ends):
                await front_end.caller.is_open.wait()
            host, port = self._listener.getsockname()[:2]
            log.info("listening on http://%s:%d with %d front ends", host, port, self._settings.frontends)
            async with self._admin_server.serve(self._admin.asgi):
                await self._stop.wait()
                log.info("draining")
                await self._drain()
        finally:
            self._draining = True
            for front_end in self._front_ends:
                front_end.process.kill()
            self._scheduler.stop()
            await self.engine.stop()
        return 0

    async def make(self, snapshot: Snapshot) -> EngineProcess:
        """Start another engine process beside the one in use.

        Raises:
            CheckpointError: The checkpoint cannot be used, or not with these settings.
            EngineFailedError: It cannot be started for another reason.
            OSError: There are no more processes, open files or memory to be had.
        """
        try:
            engine = EngineProcess(self._settings, snapshot, self._metrics, self._tell_up)
        except BaseException:
            snapshot.close()
            raise
        try:
            await engine.start()
        except BaseException:
            await engine.stop()
            raise
        return engine

    async def changed(self, engine: EngineProcess) -> None:
        """Tell all front ends of the model in use, and return when they know."""
        self.engine = engine
        self._tell_up()
        callers = [front_end.caller for front_end in self._front_ends]
        for caller in callers:
            caller.tell_version(engine.version)
        if callers:
            await asyncio.wait([asyncio.ensure_future(caller.knows.wait()) for caller in callers], timeout=PATIENCE_S)

    def _signalled(self, number: signal.Signals) -> None:
        """Leave first, if there is a delay; a second signal ends it."""
        delay_s = self._settings.drain_delay_ms / 1000
        if number != signal.SIGTERM or not delay_s or not self._scheduler.is_ready:
            self._stop.set()
            return
        log.info("SIGTERM: leaving")
        self._scheduler.turn_unready()
        for front_end in self._front_ends:
            front_end.caller.tell_leave()
        asyncio.get_running_loop().call_later(delay_s, self._stop.set)

    async def _drain(self) -> None:
        """Let every front end finish what it has accepted; kill those that take too long."""
        self._draining = True
        self._scheduler.turn_unready()
        self._listener.close()
        for front_end in self._front_ends:
            front_end.caller.tell_drain()
        try:
            async with asyncio.timeout(self._settings.drain_deadline_ms / 1000 + 5):
                if self._front_ends:
                    await self._all_gone.wait()
                await self._scheduler.drain()  # refunds may still be on their way to the store
        except TimeoutError:
            log.error("%d front ends did not stop in time", len(self._front_ends))

    async def _start_front_end(self) -> None:
        slots = slots_of(self._settings)
        memory = Slab.make_file(slots, self._architecture)
        try:
            slab = Slab(memory, slots, self._architecture)
            ours, process = self._fork_front_end(memory)
        finally:
            os.close(memory)  # the slab keeps its own hold on it, and lets go with the front end
        self._metrics.process_started(process.pid)
        caller = RemoteCaller(self._scheduler, slab, lambda: self._front_end_gone(front_end))
        front_end = _FrontEnd(process, caller, time.monotonic())
        self._front_ends.add(front_end)
        await caller.wire.open(ours)
        caller.tell_up(self.engine.is_up)
        caller.tell_version(self.engine.version)  # another may have come into use since
        if not self._scheduler.is_ready:
            caller.tell_leave()

    def _fork_front_end(self, memory: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                snapshot = self.engine.snapshot
                files = {"listen": self._listener.fileno(), "wire": theirs.fileno(), "memory": memory}
                arguments = [part for name, file in files.items() for part in (f"--{name}", str(file))]
                command = [sys.executable, "-m", "service.frontend", *arguments, "--checkpoint", str(snapshot.path)]
                return ours, subprocess.Popen(command, pass_fds=(*files.values(), snapshot.file))
        except BaseException:
            ours.close()
            raise

    def _front_end_gone(self, front_end: _FrontEnd) -> None:
        self._front_ends.discard(front_end)
        burial = asyncio.ensure_future(self._bury(front_end))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def _bury(self, front_end: _FrontEnd) -> None:
        status = await asyncio.to_thread(front_end.process.wait)
        self._metrics.process_gone(front_end.process.pid)
        if not self._front_ends:
            self._all_gone.set()
        if self._draining:
            return
        log.error("a front end died with status %d; starting another", status)
        if time.monotonic() - front_end.started < SHORTEST_LIFE_S:
            await asyncio.sleep(SHORTEST_LIFE_S)
        while not self._draining:
            try:
                await self._start_front_end()
            except OSError as error:
                log.error("a front end cannot be started, which is tried again in %g s: %s", RETRY_S, error)
                await asyncio.sleep(RETRY_S)
            else:
                return

    def _tell_up(self) -> None:
        self._metrics.ready.set(int(self._scheduler.is_ready and self.engine.is_up))
        for front_end in self._front_ends:
            front_end.caller.tell_up(self.engine.is_up)

    def _processes(self) -> dict[str, Any]:
        front_ends = sorted(front_end.process.pid for front_end in self._front_ends)
        return {"coordinator": os.getpid(), "engine": self.engine.pid, "front_ends": front_ends}
