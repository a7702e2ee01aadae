"""Use a running container as its callers do, and stop it amid a request: ``service.py CONTAINER URL METRICS_URL``.

The container's process must answer what it has accepted, and end by itself with status 0.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

SAMPLE = Path(__file__).parents[2] / "docs/samples/frog.png"
LABELS = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
PATIENCE_S = 120


def docker(*arguments: str) -> str:
    """Return what a command of the Docker client prints."""
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def until(condition: Callable[[], bool], what: str, container: str) -> None:
    """Wait for something, as long as the container runs."""
    gives_up = time.monotonic() + PATIENCE_S
    while not condition():
        state = docker("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", container)
        assert state.startswith("running"), f"the container ended before it was {what}: {state}"
        assert time.monotonic() < gives_up, f"the container was not {what} within {PATIENCE_S} s"
        time.sleep(0.1)


def is_healthy(container: str) -> bool:
    """Tell what the image's own HEALTHCHECK has found."""
    return docker("inspect", "--format", "{{.State.Health.Status}}", container) == "healthy"


def label_of(answer: bytes) -> str:
    """Return the label in a reply's body, which must be one of CIFAR-10's."""
    label: str = json.loads(answer)["predictions"][0]["label"]
    assert label in LABELS, label
    return label


def ask(url: str, image: bytes | None = None) -> tuple[int, bytes]:
    """Return the status and body of the reply to GET, or to POST of an image."""
    target = urlsplit(url)
    connection = HTTPConnection(target.netloc, timeout=PATIENCE_S)
    try:
        connection.request("POST" if image else "GET", target.path, image, {"Content-Type": "image/png"} if image else {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def is_refused(url: str) -> bool:
    """Tell whether new callers are turned away: by 503, or because nobody listens."""
    try:
        return ask(f"{url}/readyz")[0] == 503
    except (OSError, HTTPException):
        return True


def stop_amid_a_request(container: str, url: str) -> str:
    """Send SIGTERM while a request's body is on its way, finish the body, and return the label that comes back."""
    body, target = SAMPLE.read_bytes(), urlsplit(url)
    assert target.hostname
    with socket.create_connection((target.hostname, target.port or 80), PATIENCE_S) as caller:
        caller.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: palisade\r\nContent-Type: image/png\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        answer = caller.makefile("rb")
        assert answer.readline().split()[1] == b"100"  # so it was accepted
        assert answer.readline() == b"\r\n"
        caller.sendall(body[:100])
        docker("kill", "--signal", "TERM", container)
        until(lambda: is_refused(url), "refusing new callers", container)
        caller.sendall(body[100:])
        status = answer.readline().split()[1]
        assert status == b"200", f"the request in flight was answered {status.decode()}"
        length = 0
        while (line := answer.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return label_of(answer.read(length))


def main(container: str, url: str, metrics_url: str) -> None:
    """Fail loudly, or print what was seen."""
    started = time.monotonic()
    until(lambda: is_healthy(container), "healthy", container)
    print(f"healthy after {time.monotonic() - started:.1f} s")
    status, answer = ask(f"{url}/v1/classify", SAMPLE.read_bytes())
    assert status == 200, answer
    label, metrics = label_of(answer), ask(metrics_url)[1].decode()
    for sample in ("palisade_ready 1.0", 'palisade_requests_total{code="200",route="/v1/classify"} 1.0'):
        assert sample in metrics, f"not among the metrics: {sample}"
    print(f"{SAMPLE.name} is a {label}; the metrics count it")
    assert stop_amid_a_request(container, url) == label
    ended = docker("wait", container)
    assert ended == "0", f"the container ended with status {ended}"
    print("SIGTERM: the request in flight was answered, then the container ended with status 0")


if __name__ == "__main__":
    main(*sys.argv[1:])
