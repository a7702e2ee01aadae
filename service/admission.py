"""Admission: whether a request may take queue places and quota, before anything is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.batcher import Batcher, Places
from service.identity import Caller
from service.metrics import Metrics
from service.problems import quota_exceeded, quota_unknown, too_large
from service.quota import BudgetUnknownError, Charge, Level, Limiter, QuotaExceededError, RequestTooLargeError


@dataclass
class Ticket:
    """An admitted request: what it holds until it is settled.

    Attributes:
        caller: Who asked.
        places: Its queue places.
        charges: What its caller was charged, by the quota's tier.
        levels: What was left of the caller's quota after the charge.
        policy: Name of the policy that protects the answer: the caller's tier, or a stricter one.
        version: Of the model that answered, once one has.
    """

    caller: Caller
    places: Places
    charges: dict[str, Charge]
    levels: list[Level]
    policy: str
    version: str = ""

    @property
    def left_queue(self) -> float | None:
        """When its first image left the queue, in monotonic seconds; ``None`` if it never did."""
        return self.places.left_queue


class Admission:
    """Holds queue places and charges quota for requests.

    Args:
        batcher: Whose queue places are held.
        limiters: The quotas of each tier; a tier without one is never refused.
        metrics: Told of refusals for quota.
    """

    def __init__(self, batcher: Batcher, limiters: Mapping[str, Limiter], metrics: Metrics) -> None:
        self._batcher = batcher
        self._limiters = limiters
        self._metrics = metrics

    async def admit(self, caller: Caller, images: int, policy: str) -> Ticket:
        """Hold places and charge quota for ``images``; :meth:`settle` the ticket when the request is over.

        Args:
            caller: Who asks.
            images: How many.
            policy: That of the caller's answers: its tier, or ``suspect``, which has a quota that is charged before the tier's:
                not in one step, so that others may find the first charged for a request that the second refuses.

        Raises:
            Problem: 413, 429 or 503; nothing is held or charged then.
        """
        places = self._batcher.reserve(images)
        charges: dict[str, Charge] = {}
        try:
            tiers = [tier for tier in _tiers(caller, policy) if tier in self._limiters]
            for number, tier in enumerate(tiers, 1):
                charges[tier] = await self._charge(tier, caller.id, images, tiers[number:])
        except BaseException:
            self._batcher.release(places)
            self._refund(charges)
            raise
        return Ticket(caller, places, charges, _tightest(charge.levels for charge in charges.values()), policy)

    def settle(self, ticket: Ticket, refund: bool) -> None:
        """Give a ticket's places back and, if the request failed, its quota."""
        self._batcher.release(ticket.places)
        if refund:
            self._refund(ticket.charges)
            ticket.charges = {}

    async def levels(self, caller: Caller, policy: str) -> list[Level]:
        """Return what is left of a caller's quota under a policy; empty without one."""
        limiters = [self._limiters[tier] for tier in _tiers(caller, policy) if tier in self._limiters]
        return _tightest([await limiter.levels(caller.id) for limiter in limiters])

    async def _charge(self, tier: str, caller: str, images: int, later: Sequence[str]) -> Charge:
        """Charge a tier's quota; a refusal says when that of the tiers that would be charged later has room, too."""
        try:
            return await self._limiters[tier].charge(caller, images)
        except RequestTooLargeError as error:
            limit = f"{error.window.quota} {'in all' if error.window.seconds is None else 'per ' + error.window.name}"
            raise too_large(f"{images} images in one request, but the quota is {limit}: send fewer") from error
        except QuotaExceededError as error:
            self._metrics.quota_denied.labels(tier, error.level.window.name).inc()
            levels = [error.level]
            with contextlib.suppress(BudgetUnknownError):
                for each in later:
                    levels += await self._limiters[each].levels(caller)
            last = QuotaExceededError(levels, images).level
            raise quota_exceeded(last.window.name, last.reset_s) from error
        except BudgetUnknownError as error:
            raise quota_unknown() from error

    def _refund(self, charges: Mapping[str, Charge]) -> None:
        for tier, charge in charges.items():
            self._limiters[tier].refund(charge)


def _tiers(caller: Caller, policy: str) -> list[str]:
    """Return the tiers whose quotas a caller is charged: being suspect must not be worth a second budget."""
    return [policy] if policy == caller.tier else [policy, caller.tier]


def _tightest(groups: Iterable[list[Level]]) -> list[Level]:
    """Return for each unit of time the window with the least left."""
    tightest: dict[str, Level] = {}
    for level in (level for levels in groups for level in levels):
        before = tightest.get(level.window.name)
        if before is None or level.remaining < before.remaining:
            tightest[level.window.name] = level
    return list(tightest.values())
