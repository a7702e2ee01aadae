"""A caller's own API key, from a file or the environment, and never in a message."""

from __future__ import annotations

import os
from pathlib import Path

API_KEY = "PALISADE_API_KEY"
"""The environment variable of a caller's own key: no setting of the service."""


def read_key(file: str | None) -> str | None:
    """Return the key in a file, else in ``PALISADE_API_KEY``, else ``None``.

    Raises:
        ValueError: There is none in the file, or it cannot be sent in a header.
    """
    if file is None:
        where, text = API_KEY, os.environ.get(API_KEY, "")
        if not text:
            return None
    else:
        where = file
        try:
            text = Path(file).read_text("utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"--key-file {file}: {error.strerror}") from error
    key = text.strip()
    if not key or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"{where} does not hold an API key and nothing else; `palisade-serve keys create` prints one")
    return key


def headers_of(key: str | None) -> dict[str, str]:
    """Return the request headers that carry a key, none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
