"""What docs/operations.md reckons and configures is right."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from service.settings import Settings
from tests.deploy.manifests import ROOT
from tests.deploy.test_k8s_running import granted, listens
from tests.service.conftest import eventually
from tests.service.redis_server import needs_redis

OPERATIONS = (ROOT / "docs/operations.md").read_text()
PLANNED = 0.7
CORES = 2
UNITS = ("ms", "minutes", "bytes", "images", "pixels")
COUNTS = ("port", "frontends", "threads", "callers", "per_request", "decimals", "top_n", "top_k", "batch_size")
SHARES = ("reverse_sigmoid", "unsure_below", "share", "false_alarms", "least_w")
"""How names of settings end that hold numbers: with their unit, with what is counted, or with what is from 0 to 1."""


def test_the_table_of_sizes_is_reckoned_right() -> None:
    section = OPERATIONS.partition("\n## Size\n")[2].partition("\n## ")[0]
    (head,) = re.findall(r"^\| what callers send \|(.*)\|$", section, re.MULTILINE)
    wanted = [int(column.split()[0].replace(",", "")) for column in head.split("|") if column.strip()[0].isdigit()]
    rows = re.findall(
        r"^\| [^|]* \| (\d+)(?: \(reckoned\))? \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", section, re.MULTILINE
    )
    assert wanted == [100, 1000, 10_000]
    assert len(rows) == 4
    for row in rows:
        measured, a_core, planned, *replicas = map(int, row)
        assert a_core == measured / CORES
        assert planned == round(PLANNED * measured)
        assert replicas == [math.ceil(images / planned) for images in wanted]
    first_core_ms = 1000 / int(rows[0][1])
    decoding = [int(each.replace(",", "")) for each in re.findall(r"1000 / ([\d,]+) = [\d.]+ ms", section)]
    reckoned = [int(1000 / (first_core_ms + 1000 / each)) for each in decoding[1:]]
    assert [row[1] for row in rows[1:3]] == [str(each) for each in reckoned]


def test_every_setting_is_explained_in_the_words_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `(PALISADE_\w+)` \| `[^`]*` \| (.*) \|$", OPERATIONS, re.MULTILINE))
    for name, field in Settings.model_fields.items():
        assert rows[f"PALISADE_{name.upper()}"] == field.description


def test_every_number_has_its_unit_in_its_name() -> None:
    for name, field in Settings.model_fields.items():
        if field.annotation in (int, float):
            assert name.endswith((*UNITS, *COUNTS, *SHARES)), name
            is_share = any(getattr(bound, "le", getattr(bound, "lt", None)) == 1 for bound in field.metadata)
            assert name.endswith(SHARES) == is_share, name


@contextmanager
def redis_with(rules: list[str], folder: Path) -> Iterator[int]:
    """Run a redis-server that keeps what it holds, with these users."""
    (folder / "users.acl").write_text("\n".join(rules) + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--aclfile", str(folder / "users.acl")]
    with subprocess.Popen(
        ["redis-server", *where, "--appendonly", "yes", "--appendfsync", "always", "--save", ""], stdout=subprocess.DEVNULL
    ) as process:
        try:
            eventually(lambda: listens(port, process), "redis-server listens")
            yield port
        finally:
            process.terminate()


def documented_users() -> list[str]:
    (block,) = re.findall(r"^  ```redis\n(.*?)^  ```", OPERATIONS, re.MULTILINE | re.DOTALL)
    return [line.strip() for line in block.splitlines()]


@needs_redis
def test_the_documented_users_count_keep_what_they_counted_and_can_do_nothing_else(tmp_path: Path) -> None:
    with redis_with(documented_users(), tmp_path) as port:
        assert asyncio.run(granted(f"redis://palisade:password@127.0.0.1:{port}/0", 4)) == [True, True, True, False]
        with redis.Redis(port=port, username="palisade", password="password") as own:
            for forbidden in (own.flushall, lambda: own.get("another:key"), lambda: own.keys("*")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    forbidden()
        with redis.Redis(port=port) as stranger, pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
    with redis_with(documented_users(), tmp_path) as port:
        assert asyncio.run(granted(f"redis://palisade:password@127.0.0.1:{port}/0", 1)) == [False]
