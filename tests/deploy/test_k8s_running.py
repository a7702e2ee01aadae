"""What the manifests start, started here: the service, Redis, and the init container's script."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import redis

from benchmarks.ports import held_port
from benchmarks.running_service import running_service
from service.quota import QuotaExceededError, parse_windows
from service.quota_redis import RedisLimiter
from service.quota_store import Store
from tests.deploy.manifests import Manifest, build, environment, of_kind, one, service_pod
from tests.service.conftest import PATIENCE_S, eventually
from tests.service.redis_server import needs_redis

PASSWORD, SECRET = "0123456789abcdef", "fedcba9876543210"


def probes(container: Manifest) -> set[str]:
    return {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}


def test_a_service_with_the_overlays_settings_answers_the_probes(tmp_path: Path) -> None:
    container = service_pod(build("overlays/dev"))["containers"][0]
    given = environment(build("overlays/dev"), container)
    values = {name.removeprefix("PALISADE_").lower(): value for name, value in given.items() if name.startswith("PALISADE_")}
    for here in ("port", "metrics_port"):  # any free ones
        del values[here]
    values |= {"threads": "2", "host": "127.0.0.1", "metrics_host": "127.0.0.1", "admin_socket": str(tmp_path / "admin")}
    kserve = service_pod(build("components/kserve"))
    with running_service(**values) as running:
        for path in probes(container) | probes(kserve["containers"][0]):
            assert httpx.get(running.url + path, timeout=PATIENCE_S).status_code == 200, path
        scraped = kserve["annotations"]["prometheus.kserve.io/path"]
        metrics = httpx.get(running.metrics_url.removesuffix("/metrics") + scraped, timeout=PATIENCE_S)
        assert "palisade_ready 1.0" in metrics.text


@contextmanager
def redis_of_the_component(folder: Path) -> Iterator[int]:
    """Run redis-server with the arguments that the component gives it; yields its port."""
    (container,) = one(build("components/redis"), "StatefulSet", "palisade-redis")["spec"]["template"]["spec"]["containers"]
    arguments = [argument.replace("$(REDIS_PASSWORD)", PASSWORD) for argument in container["args"]]
    arguments[arguments.index("/data")] = str(folder)
    with held_port() as port:
        command = [*container["command"], "--port", str(port), "--bind", "127.0.0.1", *arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                eventually(lambda: listens(port, process), "redis-server listens")
                yield port
            finally:
                process.terminate()


def listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "redis-server refused its arguments"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@needs_redis
def test_the_service_counts_in_redis_and_nobody_else_may_do_anything(tmp_path: Path) -> None:
    objects = build("components/redis")
    url = environment(objects, service_pod(objects)["containers"][0])["PALISADE_LIMITER_STORE"]
    with redis_of_the_component(tmp_path) as port:
        here = url.replace("$(REDIS_PASSWORD)", PASSWORD).replace("palisade-redis:6379", f"127.0.0.1:{port}")
        assert asyncio.run(granted(here, 4)) == [True, True, True, False]
        with redis.Redis.from_url(here) as own, pytest.raises(redis.exceptions.NoPermissionError):
            own.flushall()
        with redis.Redis(port=port) as stranger, pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
    with redis_of_the_component(tmp_path) as port:  # what was used up is not forgotten by a restart
        here = url.replace("$(REDIS_PASSWORD)", PASSWORD).replace("palisade-redis:6379", f"127.0.0.1:{port}")
        assert asyncio.run(granted(here, 1)) == [False]


async def granted(url: str, requests: int) -> list[bool]:
    """Ask for one image at a time, of three a day."""
    store = Store(url, PATIENCE_S, lambda up: None)
    await store.start()
    assert store.is_up
    limiter = RedisLimiter(store, "standard", parse_windows("3/day"), SECRET.encode())
    answers = []
    for _ in range(requests):
        try:
            await limiter.charge("the mobile app", 1)
            answers.append(True)
        except QuotaExceededError:
            answers.append(False)
    store.stop()
    assert store._heart is not None
    await asyncio.wait([store._heart])
    return answers


@pytest.fixture
def models(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server with a file to fetch, and that file."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model").write_bytes(b"weights" * 1000)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/model", folder / "model"
        server.shutdown()
        thread.join()


def test_the_init_container_fetches_the_checkpoint_that_was_meant(models: tuple[str, Path], tmp_path: Path) -> None:
    url, file = models
    fetched = fetch(url, hashlib.sha256(file.read_bytes()).hexdigest(), tmp_path / "checkpoint")
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "checkpoint").read_bytes() == file.read_bytes()


def test_the_init_container_refuses_another_checkpoint(models: tuple[str, Path], tmp_path: Path) -> None:
    url, file = models
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes() + b"!")
    fetched = fetch(url, expected, tmp_path / "checkpoint")
    assert fetched.returncode != 0
    assert url in fetched.stderr
    assert expected in fetched.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint")] == []


def test_the_init_container_fails_without_the_file(models: tuple[str, Path], tmp_path: Path) -> None:
    fetched = fetch(f"{models[0]}-missing", 64 * "0", tmp_path / "checkpoint")
    assert fetched.returncode != 0
    assert "404" in fetched.stderr
    assert not (tmp_path / "checkpoint").exists()


def fetch(url: str, digest: str, target: Path) -> subprocess.CompletedProcess[str]:
    """Run the init container's script."""
    objects = build("components/model-from-url")
    (container,) = service_pod(objects)["initContainers"]
    script = next(each["data"]["fetch.sh"] for each in of_kind(objects, "ConfigMap") if "fetch.sh" in each["data"])
    service = environment(objects, service_pod(objects)["containers"][0])
    assert container["command"] == ["sh", "/fetch/fetch.sh", service["PALISADE_CHECKPOINT"]]
    assert environment(objects, container).keys() == {"CHECKPOINT_URL", "CHECKPOINT_SHA256"}
    path = target.parent / "fetch.sh"
    path.write_text(script)
    return subprocess.run(
        ["sh", str(path), str(target)],
        env={"PATH": "/usr/bin:/bin", "CHECKPOINT_URL": url, "CHECKPOINT_SHA256": digest},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
