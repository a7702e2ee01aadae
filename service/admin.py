"""The admin routes: what the service does, another checkpoint, and who is suspected. For operators only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.problems import Problem, bad_input, too_large
from service.reload import Garage, Reloader
from service.scheduler import Scheduler
from service.settings import Settings

MAX_BODY_BYTES = 65_536


class Admin:
    """The application behind the admin socket. Who may reach it is decided by :mod:`service.admin_server`.

    Args:
        settings: What is in force.
        scheduler: Queue and suspects.
        reloader: Loads another checkpoint.
        garage: Knows the engine in use.
        processes: Returns the service's processes by what they do.

    Attributes:
        asgi: What the HTTP server runs.
    """

    def __init__(
        self,
        settings: Settings,
        scheduler: Scheduler,
        reloader: Reloader,
        garage: Garage,
        processes: Callable[[], dict[str, Any]],
    ) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._reloader = reloader
        self._garage = garage
        self._processes = processes
        self._started = time.monotonic()
        self.asgi = Starlette(
            routes=[
                Route("/status", self._status, methods=["GET"]),
                Route("/reload", self._reload, methods=["POST"]),
                Route("/suspects", self._suspects, methods=["GET"]),
                Route("/suspects/forgive", self._forgive, methods=["POST"]),
            ],
            exception_handlers={Problem: _answer_problem, HTTPException: _answer_http_exception, Exception: _answer_bug},
        )

    async def _status(self, request: Request) -> Response:
        del request
        engine, reloader = self._garage.engine, self._reloader
        status = {
            "palisade": version("palisade"),
            "ready": self._scheduler.is_ready and engine.is_up,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "model": {
                "version": self._scheduler.version,
                "checkpoint": reloader.checkpoint,
                "path": str(reloader.path),
                **(asdict(engine.facts) if engine.facts else {}),
            },
            **self._scheduler.load(),
            "queue_places": self._settings.max_queue_images,
            "limits": self._settings.limits,
            "processes": self._processes(),
            "reloading": reloader.is_busy,
            "last_reload": asdict(reloader.last) if reloader.last else None,
        }
        return _json(status)

    async def _reload(self, request: Request) -> Response:
        body = await _read(request, "checkpoint")
        checkpoint = body.get("checkpoint")
        if not (checkpoint is None or (isinstance(checkpoint, str) and checkpoint and "\0" not in checkpoint)):
            raise bad_input(f"checkpoint must be 'compact' or a path, not {checkpoint!r:.100}")
        return _json(asdict(await self._reloader.reload(checkpoint)))

    async def _suspects(self, request: Request) -> Response:
        del request
        return _json({"suspects": [asdict(suspect) for suspect in await self._scheduler.suspects()]})

    async def _forgive(self, request: Request) -> Response:
        caller = (await _read(request, "caller")).get("caller")
        if not (isinstance(caller, str) and caller):
            raise bad_input('say who is forgiven: {"caller": ...}, as /suspects writes it')
        if not await self._scheduler.forgive(caller):
            raise Problem(404, f"{caller:.200} is not suspected of anything; /suspects lists who is", "not-found")
        return _json({"caller": caller, "forgiven": True})


async def _read(request: Request, member: str) -> dict[str, Any]:
    """Return a body that is nothing or a JSON object of at most this one member."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise too_large(f"the body has more than {MAX_BODY_BYTES} bytes")
    try:
        body = orjson.loads(data) if data.strip() else {}
    except orjson.JSONDecodeError as error:
        raise bad_input(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict) or body.keys() - {member}:
        raise bad_input(f"the body must be a JSON object with no other member than '{member}'")
    return body


def _json(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


async def _answer_problem(request: Request, problem: Exception) -> Response:
    del request
    assert isinstance(problem, Problem)
    return problem.response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return Problem(error.status_code, detail, f"http-{error.status_code}", dict(error.headers or {})).response()


async def _answer_bug(request: Request, error: Exception) -> Response:
    del request, error
    return Problem(500, "an internal error; the service's log says more", "internal").response()
