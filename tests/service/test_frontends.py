"""Several front ends and one engine process, as an operator and as clients meet them: real processes, real signals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import LABELS, PATIENCE_S, RunningServer, eventually
from tests.service.pictures import MULTIPART, encode, multipart, noise
from tests.service.test_cli import (
    Failures,
    SlowRequest,
    answers_and_sends_callers_elsewhere,
    bad_checkpoints,
    refuses_connections,
)

QUOTA = 12
PNG = encode(noise(0))


class Family(RunningServer):
    """A server of several processes, and what Linux knows of them."""

    def pids(self, kind: str) -> list[int]:
        """The living children whose command names this module."""
        return sorted(pid for pid, command in _children(self.process.pid).items() if f"service.{kind}" in command)

    def engine(self) -> int:
        (pid,) = self.pids("engine_process")
        return pid

    def client_of(self, front_end: int, address: str = "127.0.0.1") -> httpx.Client:
        """A client whose connection is with this front end: the others were stopped when it was made."""
        client = self.client(address)
        with stopped(*(pid for pid in self.pids("frontend") if pid != front_end)):
            assert client.get("/healthz").status_code == 200
        return client

    def metrics_folder(self) -> Path:
        variables = Path(f"/proc/{self.engine()}/environ").read_bytes().split(b"\0")
        (folder,) = [value for name, _, value in (each.partition(b"=") for each in variables) if name.startswith(b"PROMETHEUS")]
        return Path(folder.decode())

    def batches(self) -> float:
        return self.metric("palisade_batch_size_images_count")

    def queued(self) -> float:
        return self.metric("palisade_queue_images")


def _children(parent: int) -> dict[int, str]:
    """The commands of a process's children, by their number; those that are over and only not yet buried do not count."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, its_parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(its_parent) == parent and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def is_over(pid: int) -> bool:
    """Whether a process has ended; one that nobody has buried yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing for a while, but live."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # a test may have killed it
                os.kill(pid, signal.SIGCONT)


def classify(client: httpx.Client, *images: bytes) -> httpx.Response:
    return client.post("/v1/classify", content=multipart(*(images or (PNG,))), headers={"Content-Type": MULTIPART})


def scores(reply: httpx.Response) -> np.ndarray:
    """A reply's scores (N, C)."""
    assert reply.status_code == 200, reply.text
    return np.array([[each["scores"][label] for label in LABELS] for each in reply.json()["predictions"]])


def left(client: httpx.Client) -> int:
    (level,) = client.get("/v1/model").json()["quota"]
    return int(level["remaining"])


def try_later(reply: httpx.Response) -> bool:
    return reply.status_code == 503 and int(reply.headers["Retry-After"]) >= 1


@pytest.fixture(scope="module")
def family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """Two front ends and an engine of two lanes; tests call from addresses of their own, so that quotas are theirs."""
    with Family(
        tmp_path_factory.mktemp("family"),
        checkpoint=str(checkpoint),
        frontends="2",
        threads="2",
        precision="float32",
        answer_cache_images="0",
        request_deadline_ms=str(1000 * PATIENCE_S),
        drain_delay_ms="1",
        tier_anonymous_limits=f"{QUOTA}/day",
    ) as running:
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture
def closing() -> Iterator[list[httpx.Client]]:
    clients: list[httpx.Client] = []
    yield clients
    for client in clients:
        client.close()


def clients_of(family: Family, closing: list[httpx.Client], address: str) -> list[httpx.Client]:
    """One client for each front end."""
    clients = [family.client_of(pid, address) for pid in family.pids("frontend")]
    closing += clients
    return clients


def test_every_front_end_answers_as_one_process_does(
    family: Family, server: RunningServer, closing: list[httpx.Client]
) -> None:
    images = [encode(noise(seed)) for seed in range(5)]
    with server.client() as alone:
        expected = scores(classify(alone, *images))
    assert len(np.unique(expected.argmax(axis=1))) > 1
    for client in clients_of(family, closing, "127.0.1.1"):
        assert client.get("/readyz").json() == {"status": "ready"}
        np.testing.assert_allclose(scores(classify(client, *images)), expected, atol=0.0101)  # a last digit may round apart


def test_requests_at_the_same_time_get_their_own_answers(family: Family, threads: ThreadPoolExecutor) -> None:
    images = [encode(noise(seed)) for seed in range(QUOTA)]
    with family.client("127.0.1.2") as client:
        together = scores(classify(client, *images))

    def ask(image: bytes) -> np.ndarray:
        with family.client("127.0.1.3") as client:
            return scores(classify(client, image))[0]

    np.testing.assert_allclose(np.stack(list(threads.map(ask, images))), together, atol=0.0101)


def test_a_quota_is_exact_however_many_connections_use_it(family: Family, threads: ThreadPoolExecutor) -> None:
    def ask(_: int) -> int:
        with family.client("127.0.1.4") as client:
            return classify(client).status_code

    codes = list(threads.map(ask, range(QUOTA + 11)))
    assert (codes.count(200), codes.count(429)) == (QUOTA, 11)


def test_front_ends_share_a_quota(family: Family, closing: list[httpx.Client]) -> None:
    first, second = clients_of(family, closing, "127.0.1.5")
    assert classify(first, *[PNG] * (QUOTA - 2)).status_code == 200
    assert left(second) == 2
    over = classify(second, PNG, PNG, PNG)
    assert over.status_code == 429
    assert int(over.headers["Retry-After"]) > 80_000
    assert classify(second, PNG, PNG).status_code == 200
    assert classify(first).status_code == 429


def test_metrics_add_up_over_all_processes(family: Family, closing: list[httpx.Client]) -> None:
    first, second = clients_of(family, closing, "127.0.1.6")
    counts = {
        "requests": partial(family.metric, "palisade_requests_total", route="/v1/classify", code="200"),
        "predictions": partial(family.metric, "palisade_predictions_total"),
        "in batches": partial(family.metric, "palisade_batch_size_images_sum"),
        "weights": partial(family.metric, "palisade_expert_weight_total"),
    }
    before = {name: count() for name, count in counts.items()}
    for client, images in ((first, 2), (second, 1), (second, 3), (first, 1)):
        assert classify(client, *[PNG] * images).status_code == 200
    for name, more in {"requests": 4, "predictions": 7, "in batches": 7, "weights": 7}.items():
        eventually(lambda name=name, more=more: abs(counts[name]() - before[name] - more) < 1e-3, name)  # type: ignore[misc]
    assert family.metric("palisade_ready") == 1
    assert family.metric("palisade_engine_restarts_total") == 0
    assert family.queued() == 0
    assert first.get("/metrics").status_code == 404


def test_process_metrics_are_of_all_processes(family: Family) -> None:
    pids = [family.process.pid, *_children(family.process.pid)]
    assert family.metric("palisade_processes") == len(pids) == 4
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    assert family.metric("process_resident_memory_bytes") == pytest.approx(sum(pages) * os.sysconf("SC_PAGE_SIZE"), rel=0.1)
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    cpu_s = sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")
    assert family.metric("process_cpu_seconds_total") > cpu_s - 1e-6  # sums of the same, in another order


def in_engine(family: Family, client: httpx.Client, threads: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A request whose batch the engine has got."""
    before = family.batches()
    asked = threads.submit(classify, client)
    eventually(lambda: family.batches() == before + 1, "the batch is with the engine")
    return asked


def test_a_killed_engine_is_replaced_and_only_its_batch_is_refused(
    family: Family, threads: ThreadPoolExecutor, closing: list[httpx.Client]
) -> None:
    first, second = clients_of(family, closing, "127.0.1.7")
    expected = scores(classify(first))
    dead = family.engine()
    with stopped(dead):
        in_batch = in_engine(family, first, threads)
        waiting = threads.submit(classify, second)
        eventually(lambda: family.queued() == 1, "a request waits")
        os.kill(dead, signal.SIGKILL)
    eventually(lambda: len(family.pids("engine_process")) == 1 and family.engine() != dead, "a new engine")
    with stopped(family.engine()):  # it takes seconds to be warm
        assert try_later(in_batch.result())
        with family.client() as probe:
            eventually(lambda: try_later(probe.get("/readyz")), "this front end knows, too")
            assert probe.get("/healthz").status_code == 200
        assert family.metric("palisade_ready") == 0
        assert not waiting.done()
    np.testing.assert_array_equal(scores(waiting.result()), expected)
    with family.client() as probe:
        eventually(lambda: probe.get("/readyz").status_code == 200, "ready again")
    for client in (first, second):
        np.testing.assert_array_equal(scores(classify(client)), expected)
        assert client.get("/readyz").status_code == 200
    assert left(first) == QUOTA - 4, "what was answered is charged, before and after, and what was refused is not"
    assert family.metric("palisade_engine_restarts_total") == 1
    assert family.metric("palisade_processes") == 4
    assert family.metric("palisade_ready") == 1
    assert family.queued() == 0


def memory_files(pid: int) -> int:
    found = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection that has just been closed
            found += "memfd:palisade" in os.readlink(file)
    return found


def test_a_killed_front_end_takes_nobody_with_it_and_is_replaced(
    family: Family, threads: ThreadPoolExecutor, closing: list[httpx.Client]
) -> None:
    doomed, other = family.pids("frontend")
    files = memory_files(family.process.pid)
    first, second, third = (family.client_of(pid, "127.0.1.8") for pid in (doomed, doomed, other))
    closing += [first, second, third]
    expected = scores(classify(third))
    with stopped(family.engine()):
        lost = [in_engine(family, first, threads), threads.submit(classify, second)]
        eventually(lambda: family.queued() == 1, "a request waits")
        kept = threads.submit(classify, third)
        eventually(lambda: family.queued() == 2, "another waits")
        os.kill(doomed, signal.SIGKILL)
        eventually(lambda: family.queued() == 1, "the dead one's place is free again")
    np.testing.assert_array_equal(scores(kept.result()), expected)
    for request in lost:
        assert isinstance(request.exception(), httpx.TransportError)
    eventually(lambda: len(family.pids("frontend")) == 2, "a new front end")
    assert other in family.pids("frontend")
    assert doomed not in family.pids("frontend")
    for client in clients_of(family, closing, "127.0.1.8"):
        np.testing.assert_array_equal(scores(classify(client)), expected)
        assert client.get("/readyz").status_code == 200
    assert left(third) == QUOTA - 6, "the lost requests stay charged"
    assert family.queued() == 0
    eventually(lambda: memory_files(family.process.pid) == files, "its memory has gone with it")


def test_sigterm_answers_everything_accepted_and_leaves_no_process(checkpoint: Path, tmp_path: Path) -> None:
    delay_ms = str(1000 * PATIENCE_S)
    with (
        Family(tmp_path, checkpoint=str(checkpoint), frontends="2", drain_delay_ms=delay_ms) as family,
        family.client() as client,
    ):
        children, folder = _children(family.process.pid), family.metrics_folder()
        assert len(children) == 3
        assert "Connection" not in client.get("/readyz").headers
        family.process.send_signal(signal.SIGTERM)
        answers_and_sends_callers_elsewhere(family, client)
        slow = [SlowRequest(family.port, encode(noise(seed))) for seed in range(8)]
        family.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses_connections(family.port), "no new connections are taken")
        assert family.process.poll() is None
        for request in slow:
            status, rest = request.finish()
            assert status.startswith(b"HTTP/1.1 200")
            assert b'"predictions":[{' in rest
        assert family.process.wait(PATIENCE_S) == 0
        assert all(is_over(pid) for pid in children)
        assert not folder.exists()
    assert [line for line in family.log_lines() if line["level"] in ("error", "critical")] == []


def test_when_the_parent_is_killed_its_children_end_by_themselves(
    checkpoint: Path, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    with Family(tmp_path, checkpoint=str(checkpoint), frontends="2") as family:
        children, folder = _children(family.process.pid), family.metrics_folder()
        try:
            with family.client() as client, stopped(family.engine()):
                asked = in_engine(family, client, threads)
                family.process.kill()
                family.process.wait()
                assert try_later(asked.result())
            eventually(lambda: all(is_over(pid) for pid in children), "all children have ended")
        finally:
            shutil.rmtree(folder)
        assert refuses_connections(family.port)


@pytest.fixture(scope="module")
def failures(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    directory = tmp_path_factory.mktemp("failures")
    free: dict[str, Any] = {"port": "0", "metrics_port": "0", "frontends": "2"}
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        bad = bad_checkpoints(directory, checkpoint)
        commands = {name: {**free, "checkpoint": str(bad[name])} for name in ("damaged", "truncated")}
        commands |= {name: {**free, "checkpoint": str(checkpoint), name: port} for name in ("port", "metrics_port")}
        return Failures(directory, commands)


@pytest.mark.parametrize("name", ["damaged", "truncated"])
def test_a_checkpoint_that_cannot_be_used_is_one_line_that_names_the_file(failures: Failures, name: str) -> None:
    assert failures.status(name) == 1
    assert f"{name}.safetensors" in failures.the_line(name)


@pytest.mark.parametrize(("name", "words"), [("port", "the HTTP port"), ("metrics_port", "the metrics port")])
def test_a_busy_port_is_one_line(failures: Failures, name: str, words: str) -> None:
    assert failures.status(name) == 1
    assert words in failures.the_line(name)
