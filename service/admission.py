"""Admission: whether a request may take queue places and quota, before anything is decoded."""

from __future__ import annotations

from collections.abc import Mapping
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
        charge: What its caller was charged; ``None`` without a quota.
        levels: What was left of the caller's quota after the charge.
        policy: Name of the policy that protects the answer: the caller's tier, or a stricter one.
        version: Of the model that answered, once one has.
    """

    caller: Caller
    places: Places
    charge: Charge | None
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

    async def admit(self, caller: Caller, images: int) -> Ticket:
        """Hold places and charge quota for ``images``; :meth:`settle` the ticket when the request is over.

        Raises:
            Problem: 413, 429 or 503; nothing is held or charged then.
        """
        places = self._batcher.reserve(images)
        try:
            charge = await self._charge(caller, images)
        except BaseException:
            self._batcher.release(places)
            raise
        return Ticket(caller, places, charge, charge.levels if charge else [], caller.tier)

    def settle(self, ticket: Ticket, refund: bool) -> None:
        """Give a ticket's places back and, if the request failed, its quota."""
        self._batcher.release(ticket.places)
        limiter = self._limiters.get(ticket.caller.tier)
        if refund and limiter and ticket.charge:
            limiter.refund(ticket.charge)
            ticket.charge = None

    async def levels(self, caller: Caller) -> list[Level]:
        """Return what is left of a caller's quota; empty for a tier without one."""
        limiter = self._limiters.get(caller.tier)
        return await limiter.levels(caller.id) if limiter else []

    async def _charge(self, caller: Caller, images: int) -> Charge | None:
        limiter = self._limiters.get(caller.tier)
        if limiter is None:
            return None
        try:
            return await limiter.charge(caller.id, images)
        except RequestTooLargeError as error:
            limit = f"{error.window.quota} {'in all' if error.window.seconds is None else 'per ' + error.window.name}"
            raise too_large(f"{images} images in one request, but the quota is {limit}: send fewer") from error
        except QuotaExceededError as error:
            self._metrics.quota_denied.labels(caller.tier, error.level.window.name).inc()
            raise quota_exceeded(error.level.window.name, error.level.reset_s) from error
        except BudgetUnknownError as error:
            raise quota_unknown() from error
