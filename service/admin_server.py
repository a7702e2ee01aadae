"""The admin server: a Unix socket for the service's own user, and a loopback port for whoever has the admin key."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from service.connection import BoundedConnection
from service.problems import unauthorized
from service.settings import Settings

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PROBE_S = 1.0
LONGEST_PATH = 107
"""Bytes of a Unix socket's path: what Linux's address has room for."""
SHORTEST_KEY = 32


class AdminKeyError(ValueError):
    """The admin key cannot be read, or is none; the message names the file and says what to do."""


def read_admin_key(path: Path) -> bytes:
    """Return the key, which is all that a file holds apart from white space around it.

    Raises:
        AdminKeyError: The file cannot be read, or what it holds is too short or no plain text.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise AdminKeyError(f"{path}: the admin key cannot be read: {error.strerror}") from error
    if len(key) < SHORTEST_KEY or not all(33 <= byte <= 126 for byte in key):
        raise AdminKeyError(
            f"{path}: an admin key has {SHORTEST_KEY} characters or more, letters and digits say; "
            "`openssl rand -hex 32` makes one"
        )
    return key


class KeyCheck:
    """Lets in who has the admin key, as ``Authorization: Bearer``; all others get 401.

    Args:
        app: What is behind it.
        key: The key.
    """

    def __init__(self, app: ASGIApp, key: bytes) -> None:
        self._app = app
        self._expected = b"bearer " + key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        if hmac.compare_digest(scheme.lower() + b" " + key.strip(), self._expected):
            await self._app(scope, receive, send)
        else:
            detail = "the admin key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            await unauthorized(detail).response()(scope, receive, send)


class AdminServer:
    """Opens the doors to the admin routes that the settings ask for; none by default.

    Args:
        settings: Socket, port and key.

    Raises:
        AdminKeyError: There is no key for the port.
        OSError: A door cannot be opened; the message names it.
    """

    def __init__(self, settings: Settings) -> None:
        self._key = read_admin_key(Path(settings.admin_key_file)) if settings.admin_port is not None else b""
        self._path = Path(settings.admin_socket) if settings.admin_socket else None
        self._unix = open_unix_socket(self._path) if self._path else None
        self._file = _identity(self._path) if self._path else None
        try:
            self._tcp = _open_port(settings.admin_port) if settings.admin_port is not None else None
        except OSError:
            self.close()
            raise

    @contextlib.asynccontextmanager
    async def serve(self, app: ASGIApp) -> AsyncIterator[None]:
        """Answer admin requests in the running event loop, as long as the block lasts."""
        servers = []
        if self._unix:
            servers.append((_Server(app), self._unix))
            log.info("admin on the Unix socket %s", self._path)
        if self._tcp:
            servers.append((_Server(KeyCheck(app, self._key)), self._tcp))
            log.info("admin on http://%s:%d", *self._tcp.getsockname())
        tasks = [asyncio.create_task(server.serve([door])) for server, door in servers]
        try:
            yield
        finally:
            self._remove_file()  # while it still listens: as soon as it does not, another service may take the place
            for server, _ in servers:
                server.should_exit = True
            await asyncio.gather(*tasks)
            self.close()

    def close(self) -> None:
        """Shut the doors and remove the Unix socket's file; a second time does nothing."""
        self._remove_file()
        for door in (self._unix, getattr(self, "_tcp", None)):
            if door:
                door.close()

    def _remove_file(self) -> None:
        """Remove the Unix socket's file, unless another service's has come in its place."""
        if self._path and self._file is not None and _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)
        self._file = None


def check_unix_socket(path: Path) -> None:
    """Look whether :func:`open_unix_socket` could open a socket, if nobody listens there; opens none.

    Raises:
        OSError: The path is too long, something else has that name, or the folder is missing or can't be written to.
    """
    with _named(path):
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise OSError(f"the path has more than {LONGEST_PATH} bytes")
        if not path.parent.is_dir():
            raise OSError("No such file or directory: its folder is missing")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OSError("its folder can't be written to")
        _has_socket(path)


def open_unix_socket(path: Path) -> socket.socket:
    """Return a listening socket that only this user can connect to.

    Raises:
        OSError: Another service listens there, or something else has that name, or the folder can't be written to.
    """
    door = socket.socket(socket.AF_UNIX)
    try:
        with _named(path):
            _remove_stale(path)
            os.fchmod(door.fileno(), 0o600)  # Linux makes the file with it, so that it is never open to others
            door.bind(str(path))
            door.listen()
    except OSError:
        door.close()
        raise
    return door


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the socket in what goes wrong with it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"the admin socket {path} cannot be opened: {error.strerror or error}") from error


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a service that is gone."""
    if not _has_socket(path):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except (TimeoutError, BlockingIOError):  # it listens, but so many wait that it takes nobody
            pass
        raise OSError("another service listens there")


def _has_socket(path: Path) -> bool:
    """Tell whether there is a socket of that name; raises ``OSError`` if there is something else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise OSError("there is a file of that name that is no socket")
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from any other that had or will have its name; ``None`` if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_port(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise OSError(f"the admin port {LOOPBACK}:{port} cannot be opened: {error.strerror}") from error


class _Server(uvicorn.Server):
    """A second server beside the one that has the signals."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the process's main server."""
        yield
