"""What a quota is worth against a thief: how long a theft of so many answers takes, and how many identities make it quick.

    python -m benchmarks.budgets [--thefts 2000,10000,50000]

Plays the fastest thief there is against the limiter of every tier, at the limits that PALISADE_TIER_..._LIMITS set or by
default: it asks for one image after another, at once, and when it is refused it comes back the moment that the window starts
anew. The clock is simulated. With a day window of D images, a theft of N takes ceil(N / D) windows and so at least
ceil(N / D) - 1 days, counted from its first image; the last of them is used up at the speed of the shorter windows. Several
identities each bring a quota of their own: ceil(N / D) of them take N answers within one day. Prints a Markdown table, and ends
with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math

from benchmarks.running_service import numbers
from service.quota import MemoryLimiter, QuotaExceededError, Window
from service.settings import Settings

DAY_S = 86400


class SimulatedClock:
    """Seconds that pass only when the thief waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


async def steal(windows: tuple[Window, ...], answers: int, until_s: float = math.inf) -> tuple[int, float]:
    """Ask as fast as the limiter lets one identity.

    Args:
        windows: The tier's.
        answers: How many are wanted.
        until_s: When to stop at the latest, in seconds from the first.

    Returns:
        How many were granted, and the seconds from the first to the last; infinite if the quota never grants them.
    """
    clock = SimulatedClock()
    limiter = MemoryLimiter(windows, 1, clock)
    for granted in range(answers):
        while True:
            try:
                await limiter.charge("thief", 1)
                break
            except QuotaExceededError as error:
                if error.level.reset_s is None:
                    return granted, math.inf
                if clock.now + error.level.reset_s >= until_s:
                    return granted, clock.now
                clock.now += error.level.reset_s
    return answers, clock.now


async def row(windows: tuple[Window, ...], answers: int) -> dict[str, float | int | None]:
    """Return one theft's cost: seconds for one identity, and identities for a theft within a day and within an hour."""
    found: dict[str, float | int | None] = {"answers": answers}
    _, seconds = await steal(windows, answers)
    found["one_identity_s"] = None if seconds == math.inf else seconds
    for name, length in (("identities_day", DAY_S), ("identities_hour", 3600)):
        granted, _ = await steal(windows, answers, length)
        found[name] = -(-answers // granted)
    return found


def span(seconds: float | None) -> str:
    """Return a time in the unit that suits it."""
    if seconds is None:
        return "never"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < DAY_S else f"{seconds / DAY_S:.1f} days"


def table(thefts: list[int]) -> tuple[list[str], list[dict[str, object]]]:
    """Return the Markdown lines and the rows of all tiers."""
    lines = [
        "| tier | limits | answers | one identity | identities for one day | identities for one hour |",
        "|---|---|---|---|---|---|",
    ]
    rows: list[dict[str, object]] = []
    for tier, policy in Settings().policies().items():
        limits = "; ".join(f"{window.quota}/{window.name}" for window in policy.windows) or "none"
        for answers in thefts:
            cost = asyncio.run(row(policy.windows, answers))
            rows.append({"tier": tier, "limits": limits, **cost})
            shown = f"{cost['identities_day']} | {cost['identities_hour']}"
            lines.append(f"| {tier} | {limits} | {answers} | {span(cost['one_identity_s'])} | {shown} |")
    return lines, rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thefts", type=numbers, default="2000,10000,50000", help="answers, separated by commas")
    lines, rows = table(parser.parse_args().thefts)
    print("\n".join(lines))
    print(json.dumps({"benchmark": "budgets", "rows": rows}))


if __name__ == "__main__":
    main()
