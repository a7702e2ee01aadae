"""Two replicas that share one Redis, as operators and callers meet them: real processes, one of them with two front ends."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.service.conftest import PATIENCE_S, RunningServer, eventually
from tests.service.pictures import MULTIPART, encode, multipart, noise
from tests.service.redis_server import ENCODED_PASSWORD, PASSWORD, RedisServer, needs_redis, redis_server

pytestmark = needs_redis

QUOTA = 50
SECRET = "pepper-and-salt"
PNG = encode(noise(0))


class Replicas(NamedTuple):
    """One fails open, the other, with two front ends, closed."""

    store: RedisServer
    open: RunningServer
    closed: RunningServer


@pytest.fixture(scope="module")
def replicas(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp
    with redis_server(folder("redis")) as store:
        settings = {
            "checkpoint": str(checkpoint),
            "precision": "float32",
            "limiter_store": store.url,
            "limiter_secret": SECRET,
            "limiter_timeout_ms": "10000",
            "tier_anonymous_watch": "off",
            "tier_anonymous_limits": f"{QUOTA}/minute;{QUOTA}/day",
            "request_deadline_ms": str(1000 * PATIENCE_S),
        }
        opened = RunningServer(folder("open"), **settings, limiter_fail="open")
        closed = RunningServer(folder("closed"), **settings, limiter_fail="closed", frontends="2")
        with opened, closed:
            yield Replicas(store, opened, closed)


def ask(server: RunningServer, address: str, *images: bytes) -> httpx.Response:
    with server.client(address) as client:
        return client.post("/v1/classify", content=multipart(*(images or (PNG,))), headers={"Content-Type": MULTIPART})


def left(server: RunningServer, address: str) -> dict[str, int]:
    with server.client(address) as client:
        return {level["window"]: level["remaining"] for level in client.get("/v1/model").json()["quota"]}


def store_up(server: RunningServer) -> bool:
    return server.metric("palisade_limiter_store_up") == 1


def test_replicas_share_a_quota_exactly(replicas: Replicas) -> None:
    servers = [replicas.open, replicas.closed] * (QUOTA // 2 + 6)
    with ThreadPoolExecutor(12) as threads:
        replies = list(threads.map(lambda server: ask(server, "127.0.3.1"), servers))
    assert Counter(reply.status_code for reply in replies) == {200: QUOTA, 429: 12}
    over = next(reply for reply in replies if reply.status_code == 429)
    assert 86_000 < int(over.headers["Retry-After"]) <= 86_400
    for server in (replicas.open, replicas.closed):
        assert left(server, "127.0.3.1")["day"] == 0
        assert store_up(server)


def test_what_fails_or_is_too_much_is_charged_nothing_by_any_replica(replicas: Replicas) -> None:
    address, everything = "127.0.3.2", {"minute": QUOTA, "day": QUOTA}
    for server in (replicas.open, replicas.closed):
        broken = ask(server, address, PNG, b"no picture")
        assert broken.status_code == 400
        assert f'"day";r={QUOTA};' in broken.headers["RateLimit"]
        assert ask(server, address, *[PNG] * (QUOTA + 1)).status_code == 413
        assert left(server, address) == everything
    assert ask(replicas.open, address, *[PNG] * (QUOTA - 1)).status_code == 200
    partly = ask(replicas.closed, address, PNG, PNG)
    assert partly.status_code == 429
    assert '"day";r=1;' in partly.headers["RateLimit"]
    assert ask(replicas.closed, address).status_code == 200


@contextmanager
def load(server: RunningServer) -> Iterator[Counter[int]]:
    """Threads that ask without a pause, each time from another address; yields the statuses so far."""
    seen: Counter[int] = Counter()
    numbers = itertools.count()
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            number = next(numbers)
            connection = http.client.HTTPConnection(
                "127.0.0.1", server.port, PATIENCE_S, source_address=(f"127.1.{number // 250 % 250}.{number % 250 + 1}", 0)
            )
            connection.request("POST", "/v1/classify", PNG, {"Content-Type": "image/png"})
            reply = connection.getresponse()
            reply.read()
            connection.close()
            seen[reply.status] += 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    try:
        yield seen
    finally:
        over.set()
        for worker in workers:
            worker.join()


def more(seen: Counter[int], requests: int) -> None:
    """Wait until so many more requests were answered."""
    goal = seen.total() + requests
    eventually(lambda: seen.total() >= goal, f"{requests} more answers")


def test_a_store_that_is_killed_and_restarted_under_load_fails_no_request(replicas: Replicas) -> None:
    store, opened, closed = replicas
    address = "127.0.3.3"
    assert ask(opened, address, *[PNG] * QUOTA).status_code == 200
    assert ask(closed, address).status_code == 429
    with load(opened) as seen:
        more(seen, 20)
        store.kill()
        eventually(lambda: not store_up(opened), "one replica has noticed")
        eventually(lambda: not store_up(closed), "the other replica has noticed")
        more(seen, 20)

        # Failing open: the day is waived, the minute is counted by this process.
        waived = ask(opened, address, *[PNG] * QUOTA)
        assert waived.status_code == 200
        assert waived.headers["RateLimit-Policy"] == f'"minute";q={QUOTA};w=60'
        eventually(lambda: ask(opened, address, *[PNG] * QUOTA).status_code == 429, "the minute is used up")
        assert opened.metric("palisade_limiter_fallback_total", decision="granted") >= 21
        assert opened.metric("palisade_limiter_fallback_total", decision="refused") >= 1

        # Failing closed: refused, and alive.
        refused = ask(closed, "127.0.3.4")
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["type"] == "urn:palisade:problem:quota-unknown"
        assert closed.metric("palisade_limiter_fallback_total", decision="closed") >= 1
        assert httpx.get(f"{closed.url}/readyz", timeout=PATIENCE_S).status_code == 200

        store.start()
        eventually(lambda: store_up(opened) and store_up(closed), "both have recovered")
        more(seen, 20)
    assert set(seen) == {200}
    assert ask(closed, address, *[PNG] * (QUOTA - 3)).status_code == 200  # the store is new
    assert left(opened, address)["day"] == 3


def test_nothing_that_is_shown_has_a_password_or_an_address(replicas: Replicas) -> None:
    with replicas.open.client() as client:
        shown = client.get("/v1/model").text + client.get("/v2").text
    for server in (replicas.open, replicas.closed):
        shown += server.log_text() + server.scrape()
    for secret in (PASSWORD, ENCODED_PASSWORD, SECRET, "127.0.3."):
        assert secret not in shown
    kept = str([(key, replicas.store.client.hgetall(key)) for key in replicas.store.client.keys("*")])
    assert "palisade:quota:anonymous:" in kept
    for secret in (SECRET, "127."):
        assert secret not in kept
