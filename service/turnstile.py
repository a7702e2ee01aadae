"""The turnstile: lets requests in to the engine, and for a change of engines holds them back until nobody is inside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.problems import deadline_passed


class Turnstile:
    """Counts who is inside. What is changed while it is closed is the same for a request from its first batch to its last.

    Args:
        patience_s: How long a change waits for those inside; ``None`` waits for ever.

    Attributes:
        inside: Requests that have entered and not left.
        waiting: Requests that are held back.
    """

    def __init__(self, patience_s: float | None = None) -> None:
        self._patience_s = patience_s
        self.inside = 0
        self.waiting = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()

    async def enter(self, deadline: float) -> None:
        """Come in, when it is open; :meth:`leave` afterwards.

        Raises:
            Problem: 504, it stayed closed until the deadline (monotonic seconds).
        """
        if not self._open.is_set():
            await self._wait(deadline)
        self.inside += 1
        self._empty.clear()

    def leave(self) -> None:
        """Go."""
        self.inside -= 1
        if self.inside == 0:
            self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Hold back whoever comes, wait until all others have left, and open again at the end. One caller at a time.

        Raises:
            TimeoutError: Somebody stays inside; it is open again.
        """
        self._open.clear()
        try:
            async with asyncio.timeout(self._patience_s):
                await self._empty.wait()
            yield
        finally:
            self._open.set()

    async def _wait(self, deadline: float) -> None:
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                while not self._open.is_set():  # it may have been closed again before this one's turn came
                    await self._open.wait()
        except TimeoutError:
            raise deadline_passed() from None
        finally:
            self.waiting -= 1
