"""The open-loop client: sends requests at times fixed in advance and notes when each was answered.

    python -m benchmarks.open_loop FOLDER

``benchmarks.load.open_loop`` writes the folder (``plan.json`` and one file per rendered request) and reads the JSON that this
process prints. The client shares its cores with the server that it measures, so it does as little as it can: requests are
rendered beforehand, and of an answer only the status, its length and ``Retry-After`` are looked at. Where it may, it takes a
higher priority than the server, as a client on another machine need not wait for the server's cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import sys
import time
import urllib.parse
from collections import deque
from pathlib import Path
from typing import Any, cast

import uvloop

CONNECTIONS_AT_START = 8
PRIORITY = -10
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


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._number = -1  # of the request on its way
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._in_body = False
        self._left = 0  # bytes of the answer's body to come, unless it is chunked
        self._status = 0
        self._retry_after = False
        self._chunked = False
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def send(self, number: int, request: bytes) -> None:
        """Send one request."""
        assert self._transport is not None
        self._number, self._received, self._in_body = number, b"", False
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Look for the answer's end."""
        if self._number < 0:  # a server that says why it closes an idle connection
            return
        if not self._in_body:
            self._received += data
            head, end, data = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            self._read_head(head.lower())
            self._received = b""
        if self._chunked:
            self._received = self._received[-8:] + data
            complete = self._received.endswith(b"0\r\n\r\n")
        else:
            self._left -= len(data)
            complete = self._left <= 0
        if complete:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the request on its way, if there is one, up for lost."""
        del exc
        self._client.lost(self, self._number)
        self._number = -1

    def close(self) -> None:
        """Close without waiting for an answer."""
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        number, self._number = self._number, -1
        keep_alive = self._keep_alive
        self._client.answered(self, number, self._status, self._retry_after, keep_alive)
        if not keep_alive:
            self.close()

    def _read_head(self, head: bytes) -> None:
        self._in_body = True
        self._status = int(head[9:12])
        self._retry_after = b"\r\nretry-after:" in head
        self._keep_alive = b"\r\nconnection: close" not in head
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        at = head.find(b"\r\ncontent-length:")
        self._left = 0 if at < 0 else int(head[at + 17 :].partition(b"\r\n")[0])


class Client:
    """Sends every request when it is due, on an idle connection or a new one, up to a bound.

    Args:
        address: Host and port.
        requests: Rendered, sent in turn.
        due_s: When each request is due, in seconds from the start, in order.
        bound: Most connections.
    """

    def __init__(self, address: tuple[str, int], requests: list[bytes], due_s: list[float], bound: int) -> None:
        self._address = address
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
            _, connection = await asyncio.get_running_loop().create_connection(lambda: Connection(self), *self._address)
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


def main() -> None:
    """Read the plan, carry it out and print what happened as JSON."""
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    requests = [(folder / f"{number}.http").read_bytes() for number in range(plan["requests"])]
    url = urllib.parse.urlsplit(plan["url"])
    assert url.hostname
    address = (url.hostname, url.port or 80)

    async def run() -> dict[str, object]:
        return await Client(address, requests, plan["due_s"], plan["connections"]).run()

    with contextlib.suppress(PermissionError):  # a clock that waits for its turn on a busy core measures the scheduler
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    gc.freeze()
    gc.disable()  # a collection would count as the server's latency
    json.dump(uvloop.run(run()), sys.stdout)


if __name__ == "__main__":
    main()
