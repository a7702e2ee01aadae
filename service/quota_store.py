"""The store that replicas share: one connection pool to Redis or Valkey, and whether it can be used now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError, ResponseError

log = logging.getLogger(__name__)

PREFIX = "palisade:"
"""What every key starts with."""
CONNECTIONS = 32
BEAT_S = 0.5
"""How often the store is tried, used or not: an outage is noticed and ends within about this and a timeout."""

# Does what the limiter's scripts do: a store that answers PING may still be read-only, full or forbid a command.
BEAT = """
redis.call('HMGET', KEYS[1], 'time')
redis.call('HSET', KEYS[1], 'time', redis.call('TIME')[1])
redis.call('HINCRBY', KEYS[1], 'time', 0)
redis.call('PEXPIRE', KEYS[1], 60000)
"""


DROP = "redis.call('PEXPIRE', KEYS[1], 0)"


class StoreDownError(Exception):
    """The store did not answer in time, refused, or is known to be down; whether it did its work is not known."""


class KeyFaultError(StoreDownError):
    """A script failed of what it found under its key, which was dropped; the store is up."""


class Store:
    """Runs scripts in Redis or Valkey, and asks no more of a store that failed until it has come back.

    The request that meets a failure waits for one timeout at most; those after it do not wait at all. A task in the background
    tries the store.

    Args:
        url: ``redis://`` or ``rediss://``, checked. Its password is never shown.
        timeout_s: How long anything may wait for the store.
        on_change: Told whether the store is up, whenever that changes.

    Attributes:
        is_up: Whether the store can be used, as far as is known.
    """

    def __init__(self, url: str, timeout_s: float, on_change: Callable[[bool], None]) -> None:
        parts = urlsplit(url)
        self.is_up = False
        self._address = f"{parts.hostname}:{parts.port or 6379}"
        self._timeout_s = timeout_s
        self._on_change = on_change
        # A charge must not be sent twice, so nothing is retried here.
        self._pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=None, socket_connect_timeout=timeout_s, socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0), protocol=2,
        )  # fmt: skip
        self._client = Redis(connection_pool=self._pool)
        self._beat, self._drop = self.script(BEAT), self.script(DROP)
        self._heart: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        on_change(False)

    def script(self, text: str) -> AsyncScript:
        """Return a Lua script to :meth:`run`; it may use one key."""
        return self._client.register_script(text)

    async def start(self) -> None:
        """Try the store, and go on trying it now and then; a store that is down is no error."""
        self._failed(await self._try(), at_start=True)
        self._heart = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Close all connections, in the background."""
        self._stopping.set()

    async def run(self, script: AsyncScript, key: str, *arguments: str | float | bytes) -> Any:
        """Return what ``script`` answers.

        Raises:
            StoreDownError: At once if the store is known to be down, else after the timeout at the latest.
        """
        if not self.is_up:
            raise StoreDownError
        try:
            async with asyncio.timeout(self._timeout_s):
                return await script(keys=[key], args=arguments)
        except Exception as error:  # whatever the client meets, a request must not fail of it
            self._failed(error)
            raise StoreDownError from None

    async def run_apart(self, script: AsyncScript, key: str, *arguments: str | float | bytes) -> Any:
        """Return what ``script`` answers, as :meth:`run` does; what it can't read under its key is no fault of the store's.

        Raises:
            KeyFaultError: The key was dropped, if the store allowed it.
            StoreDownError: As :meth:`run`.
        """
        return (await self.run_all(script, [(key, arguments)]))[0]

    async def run_all(self, script: AsyncScript, calls: Sequence[tuple[str, Sequence[str | float | bytes]]]) -> list[Any]:
        """Run ``script`` for each key and its arguments, in one round trip, as by :meth:`run_apart`; returns all answers."""
        if not self.is_up:
            raise StoreDownError
        try:
            async with asyncio.timeout(self._timeout_s):
                answers = await self._run_all(script, calls)
                if any(isinstance(each, NoScriptError) for each in answers):  # the store is new, so that none of them ran
                    await self._client.script_load(script.script)
                    answers = await self._run_all(script, calls)
                faults = [key for (key, _), answer in zip(calls, answers, strict=True) if _is_of_key(answer)]
                for key in faults:
                    log.warning("dropped %s from the limiter's store: it is not what this version writes", key)
                    await self._drop(keys=[key])
            for answer in answers:
                if isinstance(answer, Exception) and not _is_of_key(answer):
                    raise answer
        except Exception as error:
            self._failed(error)
            raise StoreDownError from None
        if faults:
            raise KeyFaultError
        return answers

    async def _run_all(self, script: AsyncScript, calls: Sequence[tuple[str, Sequence[str | float | bytes]]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for key, arguments in calls:
            pipeline.evalsha(script.sha, 1, key, *arguments)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def _watch(self) -> None:
        me = asyncio.current_task()
        try:
            while not self._stopping.is_set() and not (me and me.cancelling()):  # the client can swallow a cancellation
                self._failed(await self._try())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), BEAT_S)
        finally:
            await self._client.aclose()
            await self._pool.aclose()

    async def _try(self) -> Exception | None:
        """Return what is wrong with the store."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if not self.is_up:  # what is left of old connections may lead to a machine that serves no more
                    await self._pool.disconnect(inuse_connections=False)
                await self._beat(keys=[f"{PREFIX}beat"])
        except Exception as error:
            return error
        return None

    def _failed(self, error: Exception | None, at_start: bool = False) -> None:
        """Note that the store is down for a reason, or up without one."""
        if self.is_up == (error is None) and not at_start:
            return
        self.is_up = error is None
        self._on_change(self.is_up)
        if error is None:
            log.info("the limiter's store %s is up", self._address)
        else:
            log.warning("the limiter's store %s is down (%s): the fall-back counts", self._address, _kind(error))


def _is_of_key(answer: Any) -> bool:
    """Tell whether a script failed of what it read: errors of the store's own state have classes of their own."""
    return type(answer) is ResponseError


def _kind(error: Exception) -> str:
    """Return what may be told of an error: its message can quote a password that the server did not understand."""
    name = type(error).__name__
    for each in (error, error.__cause__, error.__context__):
        if isinstance(each, OSError) and each.errno and each.errno > 0:
            return f"{name}, {os.strerror(each.errno)}"
    return name
