"""``palisade-serve``: the command line of the service."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from pydantic import ValidationError

from model.checkpoint import CheckpointError
from service import logs
from service.app import Service
from service.connection import BoundedConnection
from service.engine import Engine
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 stopped cleanly, 1 failed, 2 wrong usage or settings."""
    parser = argparse.ArgumentParser(prog="palisade-serve", description="Serve a robust mixture of experts over HTTP.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "run",
        help="serve in the foreground until SIGTERM or Ctrl-C",
        description="Serve in the foreground. Settings come from PALISADE_* environment variables (docs/operations.md).",
    )
    command.set_defaults(run_command=_run)
    options = parser.parse_args(arguments)
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = "PALISADE_" + "_".join(str(part) for part in problem["loc"]).upper()
            print(f"palisade-serve: {name}={problem['input']!r}: {problem['msg']}", file=sys.stderr)
        return 2
    status: int = options.run_command(settings)
    return status


def _run(settings: Settings) -> int:
    logs.configure(settings.log_level)
    _warn(settings)
    metrics = Metrics()
    try:
        engine = Engine(settings, metrics)
        metrics_server, _ = metrics.serve(settings.metrics_host, settings.metrics_port)
    except (CheckpointError, ValueError, RuntimeError) as error:  # RuntimeError: torch's, such as no memory on the device
        print(f"palisade-serve: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        print(f"palisade-serve: the metrics port {where} cannot be opened: {error.strerror}", file=sys.stderr)
        return 1
    service = Service(settings, engine, metrics)
    config = uvicorn.Config(
        service.asgi,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=BoundedConnection,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # a caller must not choose its own address
        server_header=False,
        timeout_keep_alive=65,  # longer than the usual proxy's 60 s, so that the proxy closes first
        timeout_graceful_shutdown=max(1, round(settings.drain_deadline_ms / 1000)),
    )
    log.info("metrics on http://%s:%d/metrics", settings.metrics_host, metrics_server.server_port)
    server = _Server(config, service)
    try:
        server.run()
    finally:
        metrics_server.shutdown()
        engine.close()
    return 0 if server.started else 1


def _warn(settings: Settings) -> None:
    if settings.limits == "off":
        log.warning("PALISADE_LIMITS=off: quotas are off, anybody may query without end")
    known = {f"PALISADE_{name}".upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith("PALISADE_") and name not in known:
            log.warning("%s is set but is no setting: see docs/operations.md", name)


class _Server(uvicorn.Server):
    """uvicorn's server, which also turns unready at the first signal."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining: the listening socket closes, accepted requests finish."""
        log.info("%s: draining", signal.Signals(sig).name)
        self._service.turn_unready()
        # As uvicorn's own, but without keeping the signal to raise it again after a clean stop.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
