"""What the load clients cost: microseconds of one core per request, against a server that does nothing but answer.

    python -m benchmarks.client_cost [--seconds 3] [--rounds 3]

They share their cores with the services that they measure, so this is what a service loses to them. Closed loop: ``wrk``, 32
connections. Open loop: 500 Poisson arrivals a second, and 3,000, as when a service is overloaded; how late the client writes
its requests belongs to the latencies that it reports.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.hardware import describe, spread
from benchmarks.load import closed_loop, open_loop, single_images, write_load

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Answering(asyncio.Protocol):
    """A connection of a server that answers every request alike."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Answer when a request is complete."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        if len(body) >= int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            self._received = b""
            self.answer(body)

    def answer(self, body: bytes) -> None:
        """Answer one request."""
        del body
        assert self.transport is not None
        self.transport.write(ANSWER)


@contextmanager
def serving(connection: Callable[[], asyncio.Protocol]) -> Iterator[str]:
    """Serve on a free port, on a thread of this process; yields the URL."""
    loop = uvloop.new_event_loop()
    server = cast(asyncio.Server, loop.run_until_complete(loop.create_server(connection, "127.0.0.1", 0)))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    images = single_images()
    costs: dict[str, list[float]] = {}
    late: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, serving(Answering) as url:
        script = write_load(Path(folder), images)
        for _ in range(options.rounds):
            costs.setdefault("closed loop", []).append(closed_loop(url, script, 32, options.seconds).client_cpu_us)
            for rate in (500, 3000):
                seen = open_loop(url, images, rate, options.seconds)
                costs.setdefault(f"open loop, {rate}/s", []).append(seen.client_cpu_us)
                late.setdefault(f"open loop, {rate}/s", []).append(seen.late(99))
    rows = {name: {"us_per_request": spread(values)} for name, values in costs.items()}
    for name, values in late.items():
        rows[name]["late_p99_ms"] = spread(values)
    for name, row in rows.items():
        cost = row["us_per_request"]
        print(f"{name:20s} {cost['median']:6.1f} us a request ({cost['min']:.1f}-{cost['max']:.1f})")
    print(json.dumps({"benchmark": "client_cost", "rounds": options.rounds, "hardware": describe(), "clients": rows}))


if __name__ == "__main__":
    main()
