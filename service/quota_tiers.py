"""The quotas of all tiers, in the store that the settings name."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from service.metrics import Metrics
from service.quota import Limiter, MemoryLimiter
from service.settings import Settings

if TYPE_CHECKING:
    from service.quota_redis import RedisLimiter
    from service.quota_store import Store


class TierQuotas:
    """Builds the limiters, and starts and stops the store behind them.

    Args:
        settings: Windows of each tier, store, fall-back.
        metrics: Shows whether the store is up.

    Attributes:
        limiters: By tier; one without windows has none.
        store: The store that replicas share; ``None`` when quotas are kept in memory.

    Raises:
        RuntimeError: The settings name a store and its client is not installed.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.limiters: dict[str, Limiter] = {}
        self.store: Store | None = None
        self._shared: list[RedisLimiter] = []
        tiers = {tier: policy.windows for tier, policy in settings.policies().items() if policy.windows}
        metrics.limiter_store_up.set(1)
        metrics.expect_quotas((tier, window.name) for tier, windows in tiers.items() for window in windows)
        if settings.limiter_store.get_secret_value() == "memory://" or settings.limits == "off":
            for tier, windows in tiers.items():
                self.limiters[tier] = MemoryLimiter(windows, settings.limiter_max_callers, time.monotonic)
            return
        try:
            from service.quota_outage import OutageLimiter
            from service.quota_redis import RedisLimiter
            from service.quota_store import Store
        except ModuleNotFoundError as error:
            message = f"PALISADE_LIMITER_STORE needs the extra `redis`: pip install 'palisade[redis]' ({error})"
            raise RuntimeError(message) from error
        url, timeout_s = settings.limiter_store.get_secret_value(), settings.limiter_timeout_ms / 1000
        self.store = Store(url, timeout_s, lambda up: metrics.limiter_store_up.set(int(up)))
        secret = settings.limiter_secret.get_secret_value().encode()
        for tier, windows in tiers.items():
            shared = RedisLimiter(self.store, tier, windows, secret)
            self._shared.append(shared)
            fail_open = settings.limiter_fail == "open"
            self.limiters[tier] = OutageLimiter(shared, settings.limiter_max_callers, fail_open, metrics)

    async def start(self) -> None:
        """Connect to the store, if there is one; one that is down is no error."""
        if self.store is not None:
            await self.store.start()

    async def finish(self) -> None:
        """Return when all refunds are done."""
        for shared in self._shared:
            await shared.finish()

    def stop(self) -> None:
        """Close the connections to the store."""
        if self.store is not None:
            self.store.stop()
