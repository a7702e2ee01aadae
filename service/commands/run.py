"""``palisade-serve run``: serve in the foreground until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

import uvloop

from model.checkpoint import CheckpointError
from service import logs
from service.keys import KeyFileError, read_keys
from service.settings import Settings, read_settings

if TYPE_CHECKING:
    from service.metrics import Metrics

log = logging.getLogger(__name__)

MULTIPROCESS_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # service.metrics.FOLDER, which must be set before that is imported


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers."""
    command = commands.add_parser(
        "run",
        help="serve in the foreground until SIGTERM or Ctrl-C",
        description="Serve in the foreground. Settings come from PALISADE_* environment variables (docs/operations.md).",
        epilog="Exit status: 0 stopped cleanly, 1 failed, 2 wrong usage or settings.",
    )
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    del options
    settings = read_settings()
    if settings is None:
        return 2
    logs.configure(settings.log_level)
    _warn(settings)
    try:
        if settings.keys_file:
            read_keys(Path(settings.keys_file))
        return _run_many(settings) if settings.frontends > 1 else _run_one(settings)
    except (
        CheckpointError,
        KeyFileError,
        ValueError,
        RuntimeError,
        OSError,
    ) as error:  # RuntimeError: no memory on the device, say
        print(f"palisade-serve: {error}", file=sys.stderr)
        return 1


def _run_one(settings: Settings) -> int:
    """Serve in this process."""
    from service.app import Service
    from service.engine import Engine
    from service.http_server import HttpServer
    from service.metrics import Metrics
    from service.scheduler import Scheduler

    metrics = Metrics()
    engine = Engine(settings, metrics)
    metrics_server = _serve_metrics(settings, metrics)
    service = Service(settings, engine.header, Scheduler(settings, engine, metrics), metrics)

    def on_signal(number: int) -> None:
        log.info("%s: draining", signal.Signals(number).name)
        service.turn_unready()

    server = HttpServer(settings, service, on_signal)
    try:
        server.run()
    finally:
        metrics_server.shutdown()
        engine.close()
    return 0 if server.started else 1


def _run_many(settings: Settings) -> int:
    """Serve in several front-end processes and one engine process."""
    with tempfile.TemporaryDirectory(prefix="palisade-metrics-") as folder:
        os.environ[MULTIPROCESS_METRICS] = folder
        from service.coordinator import Coordinator
        from service.metrics import Metrics

        metrics = Metrics()

        async def coordinate(listener: socket.socket) -> int:
            return await Coordinator(settings, listener, metrics).run()

        with _listen(settings) as listener:
            metrics_server = _serve_metrics(settings, metrics)
            try:
                return uvloop.run(coordinate(listener))
            finally:
                metrics_server.shutdown()


def _listen(settings: Settings) -> socket.socket:
    """Return the socket that the front ends share; raises ``OSError`` naming the address when it is taken."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"the HTTP port {settings.host}:{settings.port} cannot be opened: {error.strerror}") from error
    listener.set_inheritable(True)
    return listener


def _serve_metrics(settings: Settings, metrics: Metrics) -> WSGIServer:
    try:
        server, _ = metrics.serve(settings.metrics_host, settings.metrics_port)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise OSError(f"the metrics port {where} cannot be opened: {error.strerror}") from error
    log.info("metrics on http://%s:%d/metrics", settings.metrics_host, server.server_port)
    return server


def _warn(settings: Settings) -> None:
    if settings.limits == "off":
        log.warning("PALISADE_LIMITS=off: quotas are off, anybody may query without end")
    known = {f"PALISADE_{name}".upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith("PALISADE_") and name not in known:
            log.warning("%s is set but is no setting: see docs/operations.md", name)
