"""A front end: one HTTP worker process of several. It has no queue, quota or engine."""

from __future__ import annotations

import argparse
import socket
import sys

from model.checkpoint import read_header
from service import logs
from service.app import Service, tracing_of
from service.http_server import HttpServer
from service.metrics import Metrics
from service.remote import RemoteScheduler, slots_of
from service.serving import VERSION_DIGITS
from service.settings import Settings
from service.slab import Slab


def main() -> int:
    """Serve until the parent says that it is time to stop: the child's side."""
    parser = argparse.ArgumentParser()
    for name in ("listen", "wire", "memory"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--checkpoint", required=True)
    options = parser.parse_args()
    settings = Settings()
    logs.configure(settings.log_level)
    header, slots = read_header(options.checkpoint), slots_of(settings)
    wire = socket.socket(fileno=options.wire)

    def stop() -> None:
        service.turn_unready()
        server.should_exit = True

    def leave() -> None:
        service.turn_unready()
        server.leave()

    slab, version = Slab(options.memory, slots, header.architecture), header.weights_sha256[:VERSION_DIGITS]
    scheduler = RemoteScheduler(lambda end: end.open(wire), slab, slots, leave, stop, version)
    service = Service(settings, header, scheduler, Metrics(), tracing_of(settings))
    server = HttpServer(settings, service, on_signal=None)
    server.run(sockets=[socket.socket(fileno=options.listen)])
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
