"""Quotas in Redis or Valkey: the twin of the limiter in memory, shared by replicas."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from functools import partial

from service.quota import Charge, Level, QuotaExceededError, Window, check_possible
from service.quota_store import PREFIX, Store, StoreDownError

MICROSECONDS = 1_000_000
"""The scripts count time in whole microseconds: a double holds those of the next two centuries exactly."""

# One hash per caller, so one key and one slot of a cluster, with two fields per window: when it started and what was used. The
# time is the store's own, so that replicas whose clocks differ agree. A store whose clock went back (another machine took over)
# begins the window's time again and forgets none of its images. Asked for no images it tells and changes nothing.
CHARGE = """
-- KEYS: the caller. ARGV: now, or nothing for the store's time; images; then name, quota, length (0: for ever) of each window.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
local images = tonumber(ARGV[2])
local fields = {}
for i = 3, #ARGV, 3 do
  fields[#fields + 1] = ARGV[i] .. ':start'
  fields[#fields + 1] = ARGV[i] .. ':used'
end
local kept = redis.call('HMGET', KEYS[1], unpack(fields))
local fits, ends, starts, useds = true, 0, {}, {}
for i = 1, #fields, 2 do
  local quota, length = tonumber(ARGV[(i - 1) / 2 * 3 + 4]), tonumber(ARGV[(i - 1) / 2 * 3 + 5])
  local start, used = tonumber(kept[i] or now), tonumber(kept[i + 1] or 0)
  if length > 0 and now - start >= length then
    start, used = now, 0
  end
  start = math.min(start, now)
  if used + images > quota then
    fits = false
  end
  if length == 0 then
    ends = math.huge
  end
  ends = math.max(ends, start + length)
  starts[#starts + 1], useds[#useds + 1] = start, used
end
if fits and images > 0 then
  local changes = {}
  for i = 1, #starts do
    useds[i] = useds[i] + images
    changes[#changes + 1] = fields[2 * i - 1]
    changes[#changes + 1] = string.format('%.0f', starts[i])
    changes[#changes + 1] = fields[2 * i]
    changes[#changes + 1] = string.format('%.0f', useds[i])
  end
  redis.call('HSET', KEYS[1], unpack(changes))
  if ends == math.huge then
    redis.call('PERSIST', KEYS[1])
  else
    redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil((ends - now) / 1000)))
  end
end
return {fits and 1 or 0, now, starts, useds}
"""

REFUND = """
-- KEYS: the caller. ARGV: images; then name and start of each window that was charged.
for i = 2, #ARGV, 2 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i] .. ':start') or -1) == tonumber(ARGV[i + 1]) then
    redis.call('HINCRBY', KEYS[1], ARGV[i] .. ':used', -ARGV[1])
  end
end
"""


class RedisLimiter:
    """A :class:`service.quota.Limiter` whose counts lie in a store that several processes share.

    Args:
        store: Where.
        tier: Whose callers they are; part of the keys.
        windows: The windows that every caller has, one at least.
        secret: Keys the hash under which a caller is kept. Without it, who can read the store can try all IPv4 addresses.
        clock: Seconds, for tests; the store's own time by default.
    """

    def __init__(
        self, store: Store, tier: str, windows: Sequence[Window], secret: bytes, clock: Callable[[], float] | None = None
    ) -> None:
        self.windows = tuple(windows)
        self._store = store
        self._tier = tier
        self._secret = secret
        self._clock = clock
        self._charge, self._refund = store.script(CHARGE), store.script(REFUND)
        self._lengths = [(window.seconds or 0) * MICROSECONDS for window in windows]
        self._arguments = [
            each for window, length in zip(windows, self._lengths, strict=True) for each in (window.name, window.quota, length)
        ]
        self._refunds: dict[str, set[asyncio.Task[None]]] = {}

    async def charge(self, caller: str, images: int) -> Charge:
        """Charge ``images`` to every window of ``caller``, or to none; see :class:`service.quota.Limiter`.

        Cancelled, it may have charged or not.

        Raises:
            StoreDownError: It may have charged or not.
        """
        check_possible(self.windows, images)
        fits, starts, levels = await self._ask(caller, images)
        if not fits:
            raise QuotaExceededError(levels, images)
        return Charge(caller, images, starts, levels)

    def refund(self, charge: Charge) -> None:
        """Take back a charge, in the background; while the store is down it is lost."""
        task = asyncio.ensure_future(self._give_back(charge))
        self._refunds.setdefault(charge.caller, set()).add(task)
        task.add_done_callback(partial(self._refunded, charge.caller))

    async def levels(self, caller: str) -> list[Level]:
        """Return how full each of a caller's windows is now; raises :class:`StoreDownError`."""
        return (await self._ask(caller, 0))[2]

    async def finish(self) -> None:
        """Return when all refunds are done."""
        while self._refunds:
            await asyncio.wait([task for tasks in self._refunds.values() for task in tasks])

    async def _ask(self, caller: str, images: int) -> tuple[bool, list[int], list[Level]]:
        if refunds := self._refunds.get(caller):
            await asyncio.wait(refunds)
        now = "" if self._clock is None else round(self._clock() * MICROSECONDS)
        fits, at, starts, useds = await self._store.run(self._charge, self._key(caller), now, images, *self._arguments)
        levels = [
            Level(window, max(0, window.quota - used), (start + length - at) / MICROSECONDS if length else None)
            for window, length, start, used in zip(self.windows, self._lengths, starts, useds, strict=True)
        ]
        return bool(fits), starts, levels

    async def _give_back(self, charge: Charge) -> None:
        names = [window.name for window in self.windows]
        arguments = [each for pair in zip(names, charge.starts, strict=True) for each in pair]
        try:
            await self._store.run(self._refund, self._key(charge.caller), charge.images, *arguments)
        except StoreDownError:
            return

    def _refunded(self, caller: str, task: asyncio.Task[None]) -> None:
        self._refunds[caller].discard(task)
        if not self._refunds[caller]:
            del self._refunds[caller]

    def _key(self, caller: str) -> str:
        return f"{PREFIX}quota:{self._tier}:{pseudonym(self._secret, caller)}"


def pseudonym(secret: bytes, caller: str) -> str:
    """Return what a caller is called in the store, 32 hexadecimal digits: no address lies there in the clear."""
    return hmac.digest(secret, caller.encode(), "sha256").hex()[:32]
