"""A process that charges one caller's quota in a store, many charges at a time: run by test_quota_redis.py.

    python -m tests.service.charger URL

Each line on standard input asks for a round: ``<windows> <charges> <images per charge> <seconds, or - for the store's own
time>``; the answer on standard output is how many charges were granted.
"""

from __future__ import annotations

import asyncio
import sys

from service.quota import QuotaExceededError, parse_windows
from service.quota_redis import RedisLimiter
from service.quota_store import Store

TOGETHER = 50


async def main(url: str) -> None:
    """Do rounds until standard input ends."""
    store = Store(url, 60.0, lambda up: None)
    await store.start()
    assert store.is_up
    while line := sys.stdin.readline():
        windows, charges, images, now = line.split()
        clock = None if now == "-" else lambda now=now: float(now)
        limiter = RedisLimiter(store, "anonymous", parse_windows(windows), b"", clock)
        lanes = [charge(limiter, int(charges) // TOGETHER, int(images)) for _ in range(TOGETHER)]
        print(sum(await asyncio.gather(*lanes)), flush=True)
    store.stop()


async def charge(limiter: RedisLimiter, charges: int, images: int) -> int:
    """Charge one after another; return how many were granted."""
    granted = 0
    for _ in range(charges):
        try:
            await limiter.charge("192.0.2.1", images)
        except QuotaExceededError:
            continue
        granted += 1
    return granted


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
