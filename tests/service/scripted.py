"""A server that answers as a test tells it to, and keeps what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and what is sent as JSON."""


@dataclass(frozen=True)
class Sent:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@contextmanager
def scripted(answer: Callable[[Sent], Answer]) -> Iterator[tuple[str, list[Sent]]]:
    """Serve on a free port; yields the URL and the list of requests that grows."""
    seen: list[Sent] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            sent = Sent(self.command, self.path, headers, self.rfile.read(int(headers.get("content-length", 0))))
            seen.append(sent)
            status, more, value = answer(sent)
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(body)), **more}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815 (the library's names)

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join()
