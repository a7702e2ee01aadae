"""Free ports that stay free until a server is there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 on which nobody listens, and which the system gives to nobody else meanwhile.

    A server that asks for it by its number gets it, also again and again, if it sets ``SO_REUSEADDR``, as servers do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
