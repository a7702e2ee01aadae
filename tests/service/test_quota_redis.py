"""Quotas in a real Redis: the same answers as in memory, exact for many processes, and nothing left lying about."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from service.quota import Charge, Limiter, MemoryLimiter, QuotaExceededError, RequestTooLargeError, parse_windows
from service.quota_redis import RedisLimiter
from service.quota_store import Store
from tests.service.conftest import PATIENCE_S, ROOT
from tests.service.redis_server import ENCODED_PASSWORD, PASSWORD, RedisServer, needs_redis, redis_server
from tests.service.test_quota import FakeClock

pytestmark = needs_redis

PROCESSES = 8
ADDRESS = "192.0.2.77"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest_asyncio.fixture
async def store(server: RedisServer) -> AsyncIterator[Store]:
    """A store without any key."""
    server.client.flushall()
    connected = Store(server.url, PATIENCE_S, lambda up: None)
    await connected.start()
    assert connected.is_up
    yield connected
    await closed(connected)


async def closed(store: Store) -> None:
    store.stop()
    assert store._heart is not None
    await asyncio.wait([store._heart])


def quota_keys(server: RedisServer) -> list[bytes]:
    keys = server.client.keys("palisade:quota:*")
    assert isinstance(keys, list)
    return keys


# ---- the twin in memory

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("charge"), st.sampled_from("ab"), st.integers(1, 12)),
        st.tuples(st.just("refund"), st.just(""), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.just(""), st.integers(1, 20_000)),  # quarters of a second
        st.tuples(st.just("wait"), st.just(""), st.sampled_from([4, 240, 14_400, 345_600])),  # just as long as a window
        st.tuples(st.just("levels"), st.sampled_from("ab"), st.just(0)),
    ),
    max_size=40,
)
WINDOWS = st.tuples(
    st.sampled_from(["", "{}/second;"]), st.just("{}/minute;"), st.sampled_from(["", "{}/hour;"]),
    st.sampled_from(["", "{}/day;"]), st.sampled_from(["", "{}/lifetime"]),
).map("".join)  # fmt: skip


async def answer(limiter: Limiter, caller: str, images: int) -> tuple[Charge | None, Any]:
    """What a charge comes to."""
    try:
        charge = await limiter.charge(caller, images)
    except QuotaExceededError as error:
        return None, ("full", error.level)
    except RequestTooLargeError as error:
        return None, ("never", error.window)
    return charge, ("granted", charge.levels)


def test_every_answer_is_the_one_that_the_limiter_in_memory_gives(server: RedisServer) -> None:
    clock = FakeClock()
    runner = asyncio.Runner()
    store = Store(server.url, PATIENCE_S, lambda up: None)
    runner.run(store.start())
    rounds = iter(range(10**9))

    @given(actions=ACTIONS, text=WINDOWS, quotas=st.lists(st.integers(1, 30), min_size=5, max_size=5))
    @settings(max_examples=150, deadline=None)
    def compare(actions: list[tuple[str, str, int]], text: str, quotas: list[int]) -> None:
        windows = parse_windows(text.format(*quotas))
        number = next(rounds)
        here: Limiter = MemoryLimiter(windows, 100, clock)
        there: Limiter = RedisLimiter(store, "anonymous", windows, b"key", clock)

        async def play() -> None:
            charges: list[tuple[Charge, Charge]] = []
            for action, letter, amount in actions:
                caller = f"{letter}{number}"
                if action == "charge":
                    ours, said = await answer(here, caller, amount)
                    theirs, also_said = await answer(there, caller, amount)
                    assert also_said == said
                    if ours and theirs:
                        charges.append((ours, theirs))
                elif action == "wait":
                    clock.now += amount / 4
                elif action == "refund" and charges:
                    ours, theirs = charges.pop(amount % len(charges))
                    here.refund(ours)
                    there.refund(theirs)
                elif action == "levels":
                    assert await there.levels(caller) == await here.levels(caller)
            for caller in (f"a{number}", f"b{number}"):
                assert await there.levels(caller) == await here.levels(caller)

        runner.run(play())

    compare()
    runner.run(closed(store))
    runner.close()


# ---- many processes


class Chargers:
    """Processes that charge the same caller at the same time."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "tests.service.charger", url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(PROCESSES)]  # type: ignore[call-overload]

    def charge(self, windows: str, charges: int, images: int = 1, now: float | None = None) -> int:
        """Let every process make as many charges; return how many were granted to all of them."""
        for process in self._processes:
            process.stdin.write(f"{windows} {charges} {images} {'-' if now is None else now}\n")
        return sum(int(process.stdout.readline()) for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
        assert [process.wait(PATIENCE_S) for process in self._processes] == [0] * PROCESSES
        for process in self._processes:
            process.stdout.close()


@pytest.fixture(scope="module")
def chargers(server: RedisServer) -> Iterator[Chargers]:
    many = Chargers(server.url)
    yield many
    many.close()


def test_10000_charges_by_8_processes_grant_exactly_the_quota(server: RedisServer, chargers: Chargers) -> None:
    server.client.flushall()
    assert chargers.charge("7001/day;9000/lifetime", 1250) == 7001
    (key,) = quota_keys(server)
    assert server.client.hget(key, "day:used") == server.client.hget(key, "lifetime:used") == b"7001"


def test_over_a_days_boundary_they_grant_exactly_two_quotas(server: RedisServer, chargers: Chargers) -> None:
    server.client.flushall()
    windows, over = "500/day;5000/lifetime", 1000.0 + 86_400
    assert chargers.charge(windows, 50, now=1000.0) == 400
    assert chargers.charge(windows, 50, images=3, now=over - 0.001) == 33  # 100 are left
    assert chargers.charge(windows, 50, now=over - 0.001) == 1
    assert chargers.charge(windows, 50, images=3, now=over) == 166
    assert chargers.charge(windows, 50, now=over + 1) == 2
    (key,) = quota_keys(server)
    assert server.client.hget(key, "lifetime:used") == b"1000"


# ---- what lies in the store


async def test_a_caller_lies_in_the_store_for_as_long_as_its_windows_and_never_by_its_address(
    server: RedisServer, store: Store
) -> None:
    tiers = {"anonymous": "5/minute", "standard": "5/minute;7/day", "trusted": "5/minute;7/lifetime"}
    limiters = {tier: RedisLimiter(store, tier, parse_windows(text), b"") for tier, text in tiers.items()}
    for limiter in limiters.values():
        await limiter.charge(ADDRESS, 2)
        assert (await limiter.levels(ADDRESS))[0].remaining == 3
    lives = {tier: server.client.pttl(key) for tier in tiers for key in server.client.keys(f"palisade:quota:{tier}:*")}
    assert 0 < lives["anonymous"] <= 60_000 < lives["standard"] <= 86_400_000
    assert lives["trusted"] == -1
    everything = [(key, server.client.hgetall(key)) for key in server.client.keys("*")]
    assert len(everything) == 4  # and a beat
    assert ADDRESS not in str(everything)
    assert 0 < server.client.pttl("palisade:beat") <= 60_000


async def test_a_secret_keys_the_hash(server: RedisServer, store: Store) -> None:
    windows = parse_windows("5/day")
    for secret in (b"", b"one", b"two", b"two"):
        await RedisLimiter(store, "anonymous", windows, secret).charge(ADDRESS, 1)
    assert len(quota_keys(server)) == 3


async def test_refused_callers_and_those_who_only_ask_leave_nothing(server: RedisServer, store: Store) -> None:
    limiter = RedisLimiter(store, "anonymous", parse_windows("5/day"), b"")
    charge = await limiter.charge("gone", 1)
    server.client.flushall()
    limiter.refund(charge)
    await limiter.levels("gone")
    with pytest.raises(RequestTooLargeError):
        await limiter.charge(ADDRESS, 6)
    assert quota_keys(server) == []


async def test_a_store_whose_clock_goes_back_forgets_no_image_and_locks_nobody_out(store: Store) -> None:
    clock = FakeClock()
    clock.now = 1e9
    limiter = RedisLimiter(store, "anonymous", parse_windows("5/day"), b"", clock)
    await limiter.charge("a", 4)
    clock.now -= 30 * 86400
    with pytest.raises(QuotaExceededError):
        await limiter.charge("a", 2)
    await limiter.charge("a", 1)
    (level,) = await limiter.levels("a")
    assert (level.remaining, level.reset_s) == (0, 86400)


async def test_an_operator_may_change_the_quotas_of_callers_who_have_used_some(store: Store) -> None:
    await RedisLimiter(store, "anonymous", parse_windows("50/hour"), b"").charge("a", 40)
    tighter = RedisLimiter(store, "anonymous", parse_windows("30/hour;60/lifetime"), b"")
    assert [level.remaining for level in await tighter.levels("a")] == [0, 60]
    with pytest.raises(QuotaExceededError):
        await tighter.charge("a", 1)
    wider = RedisLimiter(store, "anonymous", parse_windows("45/hour"), b"")
    assert [level.remaining for level in (await wider.charge("a", 2)).levels] == [3]


async def test_scripts_that_the_store_has_forgotten_are_sent_again(server: RedisServer, store: Store) -> None:
    limiter = RedisLimiter(store, "anonymous", parse_windows("5/day"), b"")
    await limiter.charge("a", 1)
    server.client.script_flush()
    assert (await limiter.charge("a", 1)).levels[0].remaining == 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_tls_checks_whom_it_talks_to(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(  # noqa: ASYNC221 (nobody else is on this loop)
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=store", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    options = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"]
    with redis_server(tmp_path, *map(str, options), tls=f"?ssl_ca_certs={certificate}") as server:
        stranger = server.url.partition("?")[0]  # only authorities that the machine trusts
        for url, is_up in ((server.url, True), (stranger, False)):
            store = Store(url, PATIENCE_S, lambda up: None)
            await store.start()
            assert store.is_up is is_up
            await closed(store)


async def test_no_log_line_has_a_password(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    wrong = server.url.replace(ENCODED_PASSWORD, "wr0ng%21word")
    nobody = server.url.replace(str(server.port), "1")
    for url in (server.url, wrong, nobody):
        store = Store(url, PATIENCE_S, lambda up: None)
        await store.start()
        await closed(store)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("service")]
    assert [line.split(str(server.port))[-1].split(":1 ")[-1].strip() for line in lines] == [
        "is up",
        "is down (AuthenticationError): the fall-back counts",
        "is down (ConnectionError, Connection refused): the fall-back counts",
    ]
    for word in (PASSWORD, ENCODED_PASSWORD, "wr0ng%21word", "wr0ng!word"):
        assert word not in caplog.text


async def test_the_documented_rights_are_enough(server: RedisServer) -> None:
    (rights,) = re.findall(r"user palisade on >password (.+)", (ROOT / "docs/operations.md").read_text())
    server.client.execute_command("ACL", "SETUSER", "palisade", "reset", "on", f">{PASSWORD}", *rights.split())
    store = Store(server.url.replace("//:", "//palisade:"), PATIENCE_S, lambda up: None)
    await store.start()
    assert store.is_up
    for text in ("5/day", "5/day;5/lifetime"):
        limiter = RedisLimiter(store, "anonymous", parse_windows(text), text.encode())
        limiter.refund(await limiter.charge("a", 2))
        assert (await limiter.levels("a"))[0].remaining == 5
    assert store.is_up
    await closed(store)
