"""Exit with status 0 if the service in this container answers requests, else with 1 and the reason: HEALTHCHECK's command."""

from __future__ import annotations

import os
import sys
from http.client import HTTPConnection, HTTPException

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (asked, not listened on)
TIMEOUT_S = 3


def main() -> int:
    """Ask ``/readyz`` where the service's own settings say that it listens."""
    host = os.environ.get("PALISADE_HOST", "127.0.0.1")
    connection = HTTPConnection(ANY.get(host, host), int(os.environ.get("PALISADE_PORT", "8000")), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        print(f"/readyz: {error}")
        return 1
    print(f"/readyz: {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
