"""The HTTP server: uvicorn, with what Palisade asks of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from service.app import Service
from service.connection import BoundedConnection
from service.settings import Settings


class HttpServer(uvicorn.Server):
    """uvicorn's server, which hands signals on.

    Args:
        settings: Where it listens, unless it is given sockets.
        service: The application.
        on_signal: Called with the number of a signal that asks to stop; the server drains afterwards. ``None`` ignores signals:
            they come to the whole process group, and the parent says when it is time.
    """

    def __init__(self, settings: Settings, service: Service, on_signal: Callable[[int], None] | None) -> None:
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
        super().__init__(config)
        self._on_signal = on_signal
        self._delay_s = settings.drain_delay_ms / 1000
        self._leaves_at: float | None = None

    def leave(self) -> None:
        """Go on answering, but tell every caller to take its connection elsewhere."""
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)  # from the next tick on; until then:
        self.server_state.default_headers = [*self.server_state.default_headers, close]

    async def on_tick(self, counter: int) -> bool:
        """Start draining when the delay is over; called ten times a second."""
        if self._leaves_at is not None and time.monotonic() >= self._leaves_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave, if there is a delay, or start draining: the listening socket closes, accepted requests finish."""
        del frame
        if self._on_signal is None:
            return
        self._on_signal(sig)
        if sig == signal.SIGTERM and self._delay_s and self._leaves_at is None:
            self._leaves_at = time.monotonic() + self._delay_s
            self.leave()
            return
        # As uvicorn's own, but without keeping the signal to raise it again after a clean stop.
        self.force_exit = self.should_exit
        self.should_exit = True
