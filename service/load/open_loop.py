"""The open loop: requests go out at times fixed in advance, so that a client that waits can't hide a stall of the server."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections import deque
from typing import Any

from service.load.connection import Connection, Target

CONNECTIONS_AT_START = 8
GRACE_S = 15.0
"""How long answers are waited for after the last arrival: longer than the service's own deadline."""


class Timer:
    """Calls back at exact times. An event loop's own timers are whole milliseconds, as long as a small model's answer takes."""

    _CLOCK_MONOTONIC = 1
    _ABSOLUTE = 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.timerfd_create(self._CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, when: float) -> None:
        """Make the descriptor readable at ``when``, in seconds of :func:`time.monotonic`; at once if that is past."""
        seconds, rest = divmod(max(1, int(when * 1e9)), 1_000_000_000)
        interval_then_value = (ctypes.c_long * 4)(0, 0, seconds, rest)  # struct itimerspec
        if self._libc.timerfd_settime(self.descriptor, self._ABSOLUTE, interval_then_value, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def acknowledge(self) -> None:
        """Make the descriptor unreadable again."""
        os.read(self.descriptor, 8)


class OpenLoopClient:
    """Sends every request when it is due, on an idle connection or a new one, up to a bound.

    Args:
        target: The service.
        requests: Rendered, sent in turn.
        due_s: When each request is due, in seconds from the start, in order.
        bound: Most connections.
    """

    def __init__(self, target: Target, requests: list[bytes], due_s: list[float], bound: int) -> None:
        self._target = target
        self._requests = requests
        self._due = due_s
        self._bound = bound
        self._started = 0.0
        self._next = 0
        self._waiting: deque[int] = deque()
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the last one is used first, so that few are kept busy
        self._opening: set[asyncio.Task[None]] = set()
        self._opened = 0
        self._missing = len(due_s)
        self._written = [float("inf")] * len(due_s)
        self._done = [float("inf")] * len(due_s)
        self._status = [0] * len(due_s)
        self._retry_after = [False] * len(due_s)
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timer = Timer()

    async def run(self) -> dict[str, object]:
        """Send everything, wait for the answers and return what happened."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._fail)
        for _ in range(min(CONNECTIONS_AT_START, self._bound)):
            self._start_connection()
        await asyncio.gather(*self._opening)
        loop.add_reader(self._timer.descriptor, self._send_due)
        cpu = time.process_time()
        self._started = time.monotonic() + 0.05
        self._timer.set(self._started + self._due[0])
        with contextlib.suppress(TimeoutError):  # what is missing then stays marked as never answered
            async with asyncio.timeout(0.05 + self._due[-1] + GRACE_S):
                await self._finished
        cpu = time.process_time() - cpu
        loop.remove_reader(self._timer.descriptor)
        late = [1000 * (written - due) for written, due in zip(self._written, self._due, strict=True)]
        latency = [1000 * (done - due) for done, due in zip(self._done, self._due, strict=True)]
        result = {"latency_ms": latency, "late_ms": late, "status": self._status, "retry_after": self._retry_after}
        for connection in list(self._open):
            connection.close()
        return {**result, "connections": self._opened, "cpu_s": cpu, "nice": os.getpriority(os.PRIO_PROCESS, 0)}

    def answered(self, connection: Connection, number: int, status: int, retry_after: bool, keep_alive: bool) -> None:
        """Note an answer, and use its connection for who waits for one."""
        self._done[number] = time.monotonic() - self._started
        self._status[number] = status
        self._retry_after[number] = retry_after
        if keep_alive:
            self._idle[connection] = None
        self._count_one()
        if self._waiting:
            self._dispatch()

    def lost(self, connection: Connection, number: int) -> None:
        """Forget a closed connection; its request counts as never answered."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        if number >= 0:
            self._count_one()
        if self._waiting:
            self._dispatch()

    def _send_due(self) -> None:
        self._timer.acknowledge()
        now = time.monotonic() - self._started
        while self._next < len(self._due) and self._due[self._next] <= now:
            self._waiting.append(self._next)
            self._next += 1
        self._dispatch()
        if self._next < len(self._due):
            self._timer.set(self._started + self._due[self._next])

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            number = self._waiting.popleft()
            connection, _ = self._idle.popitem()
            self._written[number] = time.monotonic() - self._started
            connection.send(number, self._requests[number % len(self._requests)])
        room = self._bound - len(self._open) - len(self._opening)
        for _ in range(min(room, len(self._waiting) - len(self._opening))):
            self._start_connection()

    def _start_connection(self) -> None:
        task = asyncio.get_running_loop().create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        try:
            connection = await self._target.connect(self)
        except OSError:
            if self._waiting:  # nobody else might ever send it
                self._waiting.popleft()
                self._count_one()
            return
        self._opened += 1
        self._open.add(connection)
        self._idle[connection] = None
        self._dispatch()

    def _count_one(self) -> None:
        self._missing -= 1
        if self._missing == 0 and not self._finished.done():
            self._finished.set_result(None)

    def _fail(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End the run: an error of the client must not pass for the server's."""
        if not self._finished.done():
            self._finished.set_exception(context.get("exception") or RuntimeError(context["message"]))
