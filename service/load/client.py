"""The process of a load client.

    python -m service.load.client FOLDER

:mod:`service.load.measurement` writes the folder (``plan.json`` and one file per rendered request) and reads the JSON that this
process prints. The client may share its cores with the server that it measures, so it does as little as it can: requests are
rendered beforehand, and answers are hardly looked at. Where it may, it takes a higher priority than the server, as a client on
another machine need not wait for the server's cores.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import uvloop

from service.load.closed_loop import ClosedLoopClient
from service.load.connection import Target
from service.load.open_loop import OpenLoopClient

PRIORITY = -10


def main() -> None:
    """Read the plan, carry it out and print what happened as JSON."""
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    requests = [(folder / f"{number}.http").read_bytes() for number in range(plan["requests"])]
    target = Target.parse(plan["url"])

    async def run() -> dict[str, object]:
        if "due_s" in plan:
            return await OpenLoopClient(target, requests, plan["due_s"], plan["connections"]).run()
        return await ClosedLoopClient(target, requests, plan["seconds"], plan["connections"]).run()

    with contextlib.suppress(PermissionError):  # a clock that waits for its turn on a busy core measures the scheduler
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    gc.freeze()
    gc.disable()  # a collection would count as the server's latency
    json.dump(uvloop.run(run()), sys.stdout)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the terminal's, which the parent has got too
        sys.exit(130)
