"""What several test files of the service share: a tiny checkpoint, the service in this process, and real servers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from model.checkpoint import Header
    from service.app import Service
    from service.engine import Engine
    from service.tracing import Tracing

ROOT = Path(__file__).parents[2]
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATIENCE_S = 300  # a limit for a machine that is busy with something else; nothing ever waits that long for its own sake
UNHURRIED = {f"{what}_deadline_ms": str(1000 * PATIENCE_S) for what in ("request", "body", "drain")}


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll until something has happened."""
    gives_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < gives_up, f"never happened: {what}"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own settings out of the tests."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PALISADE_{name.upper()}", raising=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture whose answers differ clearly from picture to picture."""
    import torch

    from model.architecture import Architecture
    from model.checkpoint import Header, save_checkpoint
    from model.mixture import Mixture

    architecture = Architecture(width=4, num_classes=10, height=32, input_width=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixture = Mixture(architecture).eval().requires_grad_(False)
        torch.nn.init.normal_(mixture.gate.head.weight, std=3.0)
    for expert in mixture.experts:
        expert.head.weight.mul_(10)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, mixture, Header(architecture, LABELS, weights_sha256=""))
    return path


class SharedEngine:
    """A real engine that many services of one test run use one after another: none of them closes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.header: Header = engine.header
        self.lanes = engine.lanes
        self.version = engine.version

    async def up(self) -> None: ...

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        return await self._engine.classify(images, alone)


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Iterator[SharedEngine]:
    from service.engine import Engine

    real = Engine(Settings(checkpoint=str(checkpoint), device="cpu", precision="float32", max_batch_size=8), Metrics())
    yield SharedEngine(real)
    real.close()


class InProcess:
    """A service in this process, without sockets."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service = service
        self._metrics = metrics

    def client(self, address: str = "192.0.2.1") -> httpx.AsyncClient:
        """A client that calls from ``address``."""
        transport = httpx.ASGITransport(self.service.asgi, raise_app_exceptions=False, client=(address, 4711))
        return httpx.AsyncClient(transport=transport, base_url="http://palisade")

    def metric(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(name, labels) or 0.0

    async def eventually(self, condition: Callable[[], bool]) -> None:
        """Let the service work until something has happened."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 (the condition is the tested code's, which sets no event)
                await asyncio.sleep(0)


@asynccontextmanager
async def serve_in_process(engine: SharedEngine, spans: Tracing | None = None, **settings: Any) -> AsyncIterator[InProcess]:
    """Run the real service in this process; quotas are off unless asked for."""
    from service.app import Service
    from service.scheduler import Scheduler

    metrics = Metrics()
    chosen = Settings(**{"limits": "off", **UNHURRIED, **settings})
    service = Service(chosen, engine.header, Scheduler(chosen, engine, metrics), metrics, spans)
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    lifespan = asyncio.create_task(service.asgi({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    try:
        yield InProcess(service, metrics)
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        await lifespan
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"


class RunningServer:
    """``palisade-serve run`` in a process of its own, started and stopped as an operator does."""

    def __init__(self, directory: Path, **settings: str) -> None:
        ours = {"port": "0", "metrics_port": "0", "device": "cpu", "threads": "1", **UNHURRIED, **settings}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PALISADE_")}
        environment |= {f"PALISADE_{name.upper()}": value for name, value in ours.items()}
        self._log = directory / "stderr"
        command = [sys.executable, "-m", "service.cli", "run"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    def __enter__(self) -> RunningServer:
        try:
            self.port = int(self._wait_for_line(r"(?:Uvicorn running|listening) on http://127\.0\.0\.1:([0-9]+)"))
            self.url = f"http://127.0.0.1:{self.port}"
            self._metrics_port = self._wait_for_line(r"metrics on http://127\.0\.0\.1:([0-9]+)")
            eventually(lambda: httpx.get(f"{self.url}/readyz", timeout=PATIENCE_S).status_code == 200, "ready")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        """Stop as Kubernetes does and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def client(self, address: str = "127.0.0.1") -> httpx.Client:
        """A client that calls from an address on the loopback network."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, transport=httpx.HTTPTransport(local_address=address))

    def log_text(self) -> str:
        return self._log.read_text()

    def log_lines(self) -> list[dict[str, Any]]:
        """Every complete line that was logged; each must be JSON."""
        return [orjson.loads(line) for line in self.log_text().splitlines(keepends=True) if line.endswith("\n")]

    def scrape(self) -> str:
        reply = httpx.get(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=PATIENCE_S)
        assert reply.status_code == 200
        return reply.text

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        samples = [sample for family in text_string_to_metric_families(self.scrape()) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def _wait_for_line(self, pattern: str) -> str:
        eventually(lambda: bool(re.search(pattern, self.log_text())) or self.process.poll() is not None, pattern)
        found = re.search(pattern, self.log_text())
        assert found, f"the server stopped with status {self.process.poll()}:\n{self.log_text()}"
        return found[1]


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that most tests share: no quotas, and no answer cache, so that every answer is computed."""
    running = RunningServer(
        tmp_path_factory.mktemp("server"),
        checkpoint=str(checkpoint),
        precision="float32",
        limits="off",
        answer_cache_images="0",
        max_body_bytes="1000000",
        max_image_bytes="500000",
        max_images_per_request="40",
        colour="blue",  # no such setting
    )
    with running:
        yield running


@pytest.fixture(scope="session")
def limited_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a quota of six images a day."""
    with RunningServer(
        tmp_path_factory.mktemp("limited"), checkpoint=str(checkpoint), tier_anonymous_limits="100/hour;6/day"
    ) as running:
        yield running
