"""A real redis-server of a test's own: started on a free port, killed, frozen, started again."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

from benchmarks.ports import held_port
from tests.service.conftest import eventually

PASSWORD = "s3cret/of:the@store"
ENCODED_PASSWORD = "s3cret%2Fof%3Athe%40store"
BINARY = shutil.which("redis-server")

needs_redis = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")


class RedisServer:
    """One server that keeps nothing on disk and asks for a password.

    Attributes:
        url: As a service is given it.
        client: A client to look and to break things with.
    """

    def __init__(self, folder: Path, *options: str, tls: str = "") -> None:
        self._hold = ExitStack()
        self.port = self._hold.enter_context(held_port())  # also while the server is down
        assert BINARY is not None
        where = ["--port", "0", "--tls-port", str(self.port)] if tls else ["--port", str(self.port)]
        self._command = [BINARY, *where, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self._command += ["--requirepass", PASSWORD, *options]
        self.url = f"redis{'s' if tls else ''}://:{ENCODED_PASSWORD}@127.0.0.1:{self.port}/0{tls}"
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def start(self) -> None:
        """Start it, also again, empty, and return when it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        eventually(self._answers, "redis-server answers")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """A server that accepts connections and never answers."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.client.close()
        self.kill()
        self._hold.close()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "redis-server has stopped"
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def redis_server(folder: Path, *options: str, tls: str = "") -> Iterator[RedisServer]:
    """Run a server."""
    server = RedisServer(folder, *options, tls=tls)
    try:
        yield server
    finally:
        server.close()
