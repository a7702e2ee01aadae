"""Admission: who is asking, and whether a request may take queue places and quota, before anything is decoded."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect

from service.batcher import Batcher, Places
from service.metrics import Metrics
from service.policy import Policy
from service.problems import quota_exceeded, too_large
from service.quota import Charge, Level, Limiter, QuotaExceededError, RequestTooLargeError


def caller_of(address: str | None) -> str:
    """Return the identity of an anonymous caller: its IPv4 address, or the /64 network of its IPv6 address."""
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class Admission:
    """Holds queue places and charges quota for a request, and undoes both when it fails.

    Args:
        batcher: Whose queue places are held.
        limiter: Whose quota is charged; ``None`` charges nobody.
        policy: The callers' tier.
        metrics: Told of refusals for quota.
    """

    def __init__(self, batcher: Batcher, limiter: Limiter | None, policy: Policy, metrics: Metrics) -> None:
        self._batcher = batcher
        self._limiter = limiter
        self._policy = policy
        self._metrics = metrics

    @contextmanager
    def admit(self, caller: str, images: int) -> Iterator[Places]:
        """Hold places and quota for ``images`` while the block runs.

        The places are given back at the end at the latest. The quota is refunded when the block fails, but not when the
        client has gone away: its images may have cost engine time.

        Raises:
            Problem: 413, 429 or 503; nothing is held or charged then.
        """
        places = self._batcher.reserve(images)
        try:
            charge = self._charge(caller, images)
            try:
                yield places
            except ClientDisconnect:
                raise
            except Exception:
                if self._limiter and charge:
                    self._limiter.refund(charge)
                raise
        finally:
            self._batcher.release(places)

    def levels(self, caller: str) -> list[Level]:
        """Return what is left of a caller's quota; empty without a limiter."""
        return self._limiter.levels(caller) if self._limiter else []

    def _charge(self, caller: str, images: int) -> Charge | None:
        if self._limiter is None:
            return None
        try:
            return self._limiter.charge(caller, images)
        except RequestTooLargeError as error:
            detail = (
                f"{images} images in one request, but the quota is {error.window.quota} per {error.window.name}: send fewer"
            )
            raise too_large(detail) from error
        except QuotaExceededError as error:
            self._metrics.quota_denied.labels(self._policy.tier, error.level.window.name).inc()
            raise quota_exceeded(error.level.window.name, error.level.reset_s) from error
