"""Two instances behind the proxy of docs/operations.md, restarted one after the other while requests keep coming."""

from __future__ import annotations

import csv
import http.client
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.keys import create_key
from tests.service.conftest import PATIENCE_S, ROOT, RunningServer, eventually
from tests.service.pictures import encode, noise, pixels
from tests.service.redis_server import needs_redis, redis_server

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
SECTION = (ROOT / "docs/operations.md").read_text().partition("\n## Behind a proxy\n")[2].partition("\n## ")[0]
QUOTA = 1000
MANY = 3
PAUSE_S = 0.1  # between two requests of one caller, so that the load is steady and not all that the machine can do
ENOUGH = 10  # requests that have to be answered in every phase of a restart

pytestmark = [needs_redis, pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")]


class Instance(RunningServer):
    """A service that waits after SIGTERM until it is told that the proxy has noticed."""

    def stop(self) -> int:
        """End the wait at once, as a second signal does."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)


class Proxy:
    """HAProxy with the documentation's configuration, but here; a socket tells what it knows of its servers."""

    def __init__(self, folder: Path, listener: socket.socket, ports: dict[str, int]) -> None:
        (block,) = re.findall(r"^```haproxy\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
        changes = {
            r"bind :8080": f"bind fd@{listener.fileno()}",
            r"^global$": f"global\n    stats socket {folder}/stats mode 600",
        }
        # However busy this machine is: nothing is down because it takes long.
        changes |= {r"^defaults$": f"defaults\n    timeout check {PATIENCE_S}s", "server 30s": f"server {PATIENCE_S}s"}
        changes |= {rf"server {name} \S+": f"server {name} 127.0.0.1:{port}" for name, port in ports.items()}
        for pattern, here in changes.items():
            block, count = re.subn(pattern, here, block, flags=re.MULTILINE)
            assert count == 1, pattern
        (folder / "haproxy.cfg").write_text(block)
        self._folder = folder
        self.port: int = listener.getsockname()[1]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(HAPROXY), "-db", "-f", "haproxy.cfg"], cwd=folder, stdout=log, stderr=log, pass_fds=[listener.fileno()]
            )

    def server(self, name: str) -> dict[str, str]:
        """What it knows of a server, by the columns of ``show stat``."""
        assert self.process.poll() is None, (self._folder / "log").read_text()
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(self._folder / "stats"))
            asked.sendall(b"show stat\n")
            lines = asked.makefile(encoding="utf-8").read().removeprefix("# ").splitlines()
        (row,) = [row for row in csv.DictReader(filter(None, lines)) if row["svname"] == name]
        return row

    def listens(self) -> bool:
        try:
            return bool(self.server("a"))
        except OSError:
            return False

    def is_up(self, name: str) -> bool:
        row = self.server(name)
        return row["status"].startswith("UP") and row["check_status"].endswith("L7OK")

    def is_down(self, name: str) -> bool:
        return self.server(name)["status"].startswith("DOWN")

    def answered(self, name: str) -> int:
        """Classification requests that a server has answered."""
        return int(self.server(name)["hrsp_2xx"]) + int(self.server(name)["hrsp_4xx"])


@contextmanager
def proxy_of(ports: dict[str, int]) -> Iterator[Proxy]:
    """Run HAProxy; its folder's path is short, since a Unix socket's has to be."""
    with tempfile.TemporaryDirectory(prefix="palisade-") as name, socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(Path(name), listener, ports)
        try:
            eventually(proxy.listens, "HAProxy listens")
            yield proxy
        finally:
            proxy.process.kill()
            proxy.process.wait()


def steady_ports(count: int) -> list[int]:
    """Free ports that the kernel gives to nobody who does not ask for them, so that a restart finds them free again."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, first_given), first_given - 10_000):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            break
    return found


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: bytes
    images: int
    answer: Callable[[bytes], Any]


def png(key: str) -> Request:
    """One picture, by v1; answered with its label."""
    headers = {"Content-Type": "image/png", **({"X-API-Key": key} if key else {})}
    label = lambda body: json.loads(body)["predictions"][0]["index"]  # noqa: E731
    return Request("/v1/classify", headers, encode(noise(0)), 1, label)


def tensors(key: str) -> Request:
    """Three pictures, by v2 with binary tensors both ways; answered with their labels."""
    images = np.stack([pixels(noise(seed)) for seed in range(MANY)])
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": list(images.shape),
        "parameters": {"binary_data_size": images.size},
    }
    wanted = {"name": "class_id", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), **({"X-API-Key": key} if key else {})}
    labels = lambda body: np.frombuffer(body[-8 * MANY :], "<i8").tolist()  # noqa: E731
    return Request("/v2/models/palisade/infer", headers, head + images.tobytes(), MANY, labels)


@dataclass
class Caller:
    """One caller with one connection, kept open, that repeats a request until it is told to stop.

    Attributes:
        address: Its own, which the proxy passes on.
        until_refused: Goes on, after it was told to stop, until its quota is used up.
        codes: How often each status came.
        answers: The different answers that came, written as JSON.
        problems: What no caller should ever meet.
    """

    port: int
    request: Request
    address: str = "127.0.0.1"
    until_refused: bool = False
    codes: Counter[int] = field(default_factory=Counter)
    answers: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    connections: int = 0

    @property
    def granted(self) -> int:
        """Images answered."""
        return self.request.images * self.codes[200]

    def run(self, stopping: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, PATIENCE_S, source_address=(self.address, 0))
        code = 0
        while not stopping.wait(PAUSE_S) or (self.until_refused and code != 429 and not self.problems):
            if connection.sock is None:
                self.connections += 1
            try:
                connection.request("POST", self.request.path, self.request.body, self.request.headers)
                reply = connection.getresponse()
                code, body = reply.status, reply.read()
            except (OSError, http.client.HTTPException) as error:
                self.problems.append(repr(error))
                connection.close()
                continue
            self.codes[code] += 1
            if code == 200:
                self.answers.add(json.dumps(self.request.answer(body)))
            elif not (code == 429 and self.until_refused):
                self.problems.append(f"{code} {body[:300]!r}")
        connection.close()


@dataclass(frozen=True)
class Story:
    """What became of everybody's requests while both instances were restarted."""

    unlimited: list[Caller]
    limited: list[Caller]
    statuses: list[int]
    logs: list[dict[str, Any]]


def restart(proxy: Proxy, name: str, other: str, instance: Instance, again: Callable[[], Instance]) -> Instance:
    """Restart one instance as the documentation says; the load has to go on in every phase of it."""

    def more(server: str) -> None:
        so_far = proxy.answered(server)
        eventually(lambda: proxy.answered(server) >= so_far + ENOUGH, f"{server} answers {ENOUGH} more")

    more(name)
    instance.process.send_signal(signal.SIGTERM)
    eventually(lambda: proxy.is_down(name), f"the proxy notices that {name} is leaving")
    more(other)
    assert instance.process.poll() is None
    assert instance.stop() == 0
    more(other)
    started = again()
    eventually(lambda: proxy.is_up(name), f"the proxy notices that {name} is back")
    more(name)
    return started


@pytest.fixture(scope="module")
def story(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp
    keys = folder("keys") / "keys.json"
    _, key = create_key(keys, "a load test", "trusted", None, datetime.now(UTC))
    ports = dict(zip("ab", steady_ports(2), strict=True))
    with redis_server(folder("redis")) as store, ExitStack() as stack, proxy_of(ports) as proxy:

        def start(name: str) -> Instance:
            instance = Instance(
                folder(name),
                port=str(ports[name]),
                checkpoint=str(checkpoint),
                precision="float32",
                answer_cache_images="0",
                frontends="1" if name == "a" else "2",
                keys_file=str(keys),
                trusted_proxies="127.0.0.1",
                drain_delay_ms=str(1000 * PATIENCE_S),
                request_deadline_ms=str(1000 * PATIENCE_S),
                body_deadline_ms=str(1000 * PATIENCE_S),
                limiter_store=store.url,
                limiter_secret="pepper",
                limiter_fail="closed",
                limiter_timeout_ms="10000",
                tier_anonymous_limits=f"{QUOTA}/day",
                tier_anonymous_watch="off",
                tier_trusted_watch="off",
            )
            return stack.enter_context(instance)

        first = {name: start(name) for name in ports}
        for name in ports:
            eventually(lambda name=name: proxy.is_up(name), f"{name} is up")  # type: ignore[misc]
        unlimited = [Caller(proxy.port, make(key)) for make in (png, tensors)]
        limited = [Caller(proxy.port, make(""), "127.0.0.9", until_refused=True) for make in (png, tensors)]
        stopping = threading.Event()
        threads = [threading.Thread(target=caller.run, args=[stopping]) for caller in (*unlimited, *limited)]
        for thread in threads:
            thread.start()
        try:
            second = [
                restart(proxy, name, other, first[name], lambda name=name: start(name))  # type: ignore[misc]
                for name, other in (("a", "b"), ("b", "a"))
            ]
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        statuses = [instance.process.wait() for instance in first.values()]
        logs = [line for instance in (*first.values(), *second) for line in instance.log_lines()]
        yield Story(unlimited, limited, statuses, logs)


def test_no_request_fails_while_one_instance_after_the_other_is_restarted(story: Story) -> None:
    for caller in story.unlimited:
        assert caller.problems == []
        assert caller.codes.keys() == {200}
        assert caller.connections == 1, "the caller's own connection was never closed"
        assert len(caller.answers) == 1, "both instances, before and after, say the same"


def test_not_one_image_too_many_is_granted_and_none_is_charged_twice(story: Story) -> None:
    for caller in story.limited:
        assert caller.problems == []
        assert caller.codes[200] > ENOUGH
        assert caller.codes[429] > 0
    assert sum(caller.granted for caller in story.limited) == QUOTA


def test_the_instances_end_well_and_log_no_error(story: Story) -> None:
    assert story.statuses == [0, 0]
    assert [line for line in story.logs if line["level"] in ("error", "critical")] == []
