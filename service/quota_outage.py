"""Quotas while their store is away: short windows are counted here, long ones are waived or everybody is refused."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.metrics import Metrics
from service.quota import BudgetUnknownError, Charge, Level, MemoryLimiter, QuotaExceededError
from service.quota_redis import RedisLimiter
from service.quota_store import StoreDownError

LONGEST_BURST_S = 60
"""Windows up to this long can be counted by one process for a while; longer ones are a budget that only the store knows."""


class OutageLimiter:
    """A :class:`service.quota.Limiter` in a store, with a stand-in for when that is down.

    Args:
        shared: The one in the store.
        max_callers: Callers that the stand-in remembers.
        fail_open: Whether long windows are waived meanwhile; else a tier that has one is refused.
        metrics: Told of every decision made without the store.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        shared: RedisLimiter,
        max_callers: int,
        fail_open: bool,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        bursts = [window for window in shared.windows if window.seconds is not None and window.seconds <= LONGEST_BURST_S]
        self._shared = shared
        self._local = MemoryLimiter(bursts, max_callers, clock)
        self._is_open = fail_open or len(bursts) == len(shared.windows)
        self._metrics = metrics

    async def charge(self, caller: str, images: int) -> Charge:
        """Charge ``images`` in the store, or without it.

        Raises:
            RequestTooLargeError: Waiting would not help.
            QuotaExceededError: A window is full.
            BudgetUnknownError: The store is down.
        """
        try:
            return await self._shared.charge(caller, images)
        except StoreDownError:
            pass
        if not self._is_open:
            self._metrics.limiter_fallback.labels("closed").inc()
            raise BudgetUnknownError
        try:
            charge = await self._local.charge(caller, images)
        except QuotaExceededError:
            self._metrics.limiter_fallback.labels("refused").inc()
            raise
        self._metrics.limiter_fallback.labels("granted").inc()
        charge.is_local = True
        return charge

    def refund(self, charge: Charge) -> None:
        """Take back a charge where it was made."""
        (self._local if charge.is_local else self._shared).refund(charge)

    async def levels(self, caller: str) -> list[Level]:
        """Return how full each of a caller's windows is; without the store, of those that are counted here."""
        try:
            return await self._shared.levels(caller)
        except StoreDownError:
            return await self._local.levels(caller)
