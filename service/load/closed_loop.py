"""The closed loop: every connection sends its next request as soon as its last one is answered. This finds the capacity."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

from service.load.connection import Connection, Target

GRACE_S = 15.0
"""How long the last answers are waited for: longer than the service's own deadline."""

RECONNECT_S = 0.1
"""Pause before a connection that failed is opened again."""


class ClosedLoopClient:
    """Keeps ``connections`` requests on their way.

    Args:
        target: The service.
        requests: Rendered, sent in turn.
        seconds: How long requests are sent.
        connections: How many at a time.
    """

    def __init__(self, target: Target, requests: list[bytes], seconds: float, connections: int) -> None:
        self._target = target
        self._requests = requests
        self._seconds = seconds
        self._seats = connections
        self._ends = 0.0
        self._open: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._opened = 0
        self._begun: list[float] = []
        self._done: list[float] = []
        self._status: list[int] = []
        self._retry_after: list[bool] = []
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> dict[str, object]:
        """Send until the time is over, wait for the last answers and return what happened."""
        asyncio.get_running_loop().set_exception_handler(self._fail)
        cpu, started = time.process_time(), time.monotonic()
        self._ends = started + self._seconds
        for _ in range(self._seats):
            self._sit_down(0.0)
        with contextlib.suppress(TimeoutError):  # what is missing then stays marked as never answered
            async with asyncio.timeout(self._seconds + GRACE_S):
                await self._finished
        cpu = time.process_time() - cpu
        for task in list(self._opening):
            task.cancel()
        for connection in list(self._open):
            connection.close()
        return {
            "latency_ms": [1000 * (done - begun) for begun, done in zip(self._begun, self._done, strict=True)],
            "done_s": [done - started for done in self._done],
            "status": self._status,
            "retry_after": self._retry_after,
            "connections": self._opened,
            "cpu_s": cpu,
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
        }

    def answered(self, connection: Connection, number: int, status: int, retry_after: bool, keep_alive: bool) -> None:
        """Note an answer, and send the next request while there is time."""
        self._done[number] = time.monotonic()
        self._status[number] = status
        self._retry_after[number] = retry_after
        if keep_alive:
            self._send(connection)

    def lost(self, connection: Connection, number: int) -> None:
        """Open another connection in the place of a closed one, after a pause if a request was lost with it."""
        self._open.discard(connection)
        self._sit_down(0.0 if number < 0 else RECONNECT_S)

    def _send(self, connection: Connection) -> None:
        now = time.monotonic()
        if now >= self._ends:
            connection.close()
            return
        number = len(self._begun)
        self._begun.append(now)
        self._done.append(float("inf"))
        self._status.append(0)
        self._retry_after.append(False)
        connection.send(number, self._requests[number % len(self._requests)])

    def _sit_down(self, pause_s: float) -> None:
        """Take a place for a connection, or leave it for good once the time is over."""
        if time.monotonic() + pause_s >= self._ends:
            self._seats -= 1
            if self._seats == 0 and not self._finished.done():
                self._finished.set_result(None)
            return
        task = asyncio.get_running_loop().create_task(self._connect(pause_s))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        begun = time.monotonic()
        try:
            connection = await self._target.connect(self)
        except OSError:
            self._begun.append(begun)
            self._done.append(float("inf"))
            self._status.append(0)
            self._retry_after.append(False)
            self._sit_down(RECONNECT_S)
            return
        self._opened += 1
        self._open.add(connection)
        self._send(connection)

    def _fail(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End the run: an error of the client must not pass for the server's."""
        if not self._finished.done():
            self._finished.set_exception(context.get("exception") or RuntimeError(context["message"]))
