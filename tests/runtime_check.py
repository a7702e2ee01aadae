"""Run inside an environment that holds the service's pinned runtime only: it must serve, and hold nothing of training's.

Usage: python tests/runtime_check.py (see `make runtime-check`)
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from importlib import metadata

from PIL import Image

TRAINING_ONLY = ("matplotlib", "scipy", "tqdm", "pytest", "scikit-learn", "pandas")


def main() -> None:
    """Fail loudly, or print one line."""
    installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    found = installed & set(TRAINING_ONLY)
    assert not found, f"the runtime install holds training-only packages: {found}"
    environment = {**os.environ, "PALISADE_PORT": "0", "PALISADE_METRICS_PORT": "0"}
    command = [sys.executable, "-m", "service.cli", "run"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            print(f"runtime install: {len(installed)} packages; answered {classify(server)}")
        finally:
            server.terminate()


def classify(server: subprocess.Popen[str]) -> str:
    """Wait for the server's address and classify a grey image."""
    assert server.stderr is not None
    for line in server.stderr:
        match = re.search(r"Uvicorn running on (http://[\d.:]+)", line)
        if match:
            break
    else:
        raise AssertionError("the server stopped before it listened")
    body = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(body, "PNG")
    request = urllib.request.Request(f"{match[1]}/v1/classify", body.getvalue(), {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"][0]["label"]


if __name__ == "__main__":
    main()
