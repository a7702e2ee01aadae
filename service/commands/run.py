"""``palisade-serve run``: serve in the foreground until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from service.client.key import API_KEY
from service.commands.usage import add_command

if TYPE_CHECKING:  # a command's own imports are its own to wait for: `--help` answers at once
    from types import FrameType
    from wsgiref.simple_server import WSGIServer

    from service.metrics import Metrics
    from service.settings import Settings

log = logging.getLogger(__name__)

MULTIPROCESS_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # service.metrics.FOLDER, which must be set before that is imported


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers."""
    command = add_command(
        commands,
        "run",
        "serve in the foreground until SIGTERM or Ctrl-C",
        "Serve in the foreground. Settings come from PALISADE_* environment variables (docs/operations.md); `palisade-serve "
        "check` validates them first. The log is JSON, one object a line, on standard error.",
        [
            "palisade-serve run",
            "PALISADE_HOST=0.0.0.0 PALISADE_KEYS_FILE=keys.json PALISADE_ANONYMOUS=off palisade-serve run",
        ],
        "Exit status: 0 stopped cleanly, 1 failed, 2 wrong usage or settings.",
    )
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from model.checkpoint import CheckpointError
    from service import logs
    from service.keys import KeyFileError, read_keys
    from service.settings import read_settings

    del options
    # Until the server takes signals over: as process 1 of a container nothing else would end this one.
    signal.signal(signal.SIGTERM, _leave)
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


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End cleanly: no request has been accepted yet."""
    del frame
    log.info("%s before the service was ready", signal.Signals(number).name)
    sys.exit(0)


def _run_one(settings: Settings) -> int:
    """Serve in this process."""
    import uvloop

    from service.admin import Admin
    from service.admin_server import AdminServer
    from service.app import Service, tracing_of
    from service.engine import Engine
    from service.garage import ThreadGarage
    from service.http_server import HttpServer
    from service.metrics import Metrics
    from service.reload import Reloader
    from service.scheduler import Scheduler

    def on_signal(number: int) -> None:
        log.info("%s: draining", signal.Signals(number).name)
        service.turn_unready()

    async def serve() -> None:
        async with admin_server.serve(admin.asgi):
            await server.serve()

    metrics = Metrics()
    with contextlib.closing(AdminServer(settings)) as admin_server:
        engine = Engine(settings, metrics)
        garage = ThreadGarage(settings, metrics, engine)
        metrics_server = _serve_metrics(settings, metrics)
        scheduler = Scheduler(settings, engine, metrics)
        service = Service(settings, engine.header, scheduler, metrics, tracing_of(settings))
        server = HttpServer(settings, service, on_signal)
        reloader = Reloader(settings.checkpoint, engine.header, scheduler, garage)
        admin = Admin(settings, scheduler, reloader, garage, lambda: {"service": os.getpid()})
        try:
            uvloop.run(serve())
        finally:
            metrics_server.shutdown()
            garage.engine.close()
    return 0 if server.started else 1


def _run_many(settings: Settings) -> int:
    """Serve in several front-end processes and one engine process."""
    import uvloop

    with tempfile.TemporaryDirectory(prefix="palisade-metrics-") as folder:
        os.environ[MULTIPROCESS_METRICS] = folder
        from service.admin_server import AdminServer
        from service.app import tracing_of
        from service.coordinator import Coordinator
        from service.metrics import Metrics

        metrics = Metrics()
        tracing_of(settings)  # if it can't be had, nobody should learn that from every front end

        async def coordinate(listener: socket.socket) -> int:
            return await Coordinator(settings, listener, metrics, admin_server).run()

        with contextlib.closing(AdminServer(settings)) as admin_server, _listen(settings) as listener:
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
    for name in unknown_variables():
        log.warning("%s is set but is no setting: see docs/operations.md", name)


def unknown_variables() -> list[str]:
    """Return the environment variables that look like settings and are none."""
    from service.settings import Settings

    known = {f"PALISADE_{name}".upper() for name in Settings.model_fields} | {API_KEY}
    return sorted(name for name in os.environ if name.startswith("PALISADE_") and name not in known)
