"""An engine process that is given up, or cannot be made: nothing of it may be left."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.engine_process import EngineProcess
from service.metrics import FOLDER, Metrics
from service.settings import Settings
from service.snapshot import Snapshot
from tests.service.conftest import PATIENCE_S
from tests.service.test_frontends import is_over


def open_files() -> set[str]:
    """What this process's descriptors are, by number; the one of the listing has gone by then."""
    gc.collect()  # what an earlier test has left to the collector is not this one's
    links = {}
    for file in Path("/proc/self/fd").iterdir():
        try:
            links[file.name] = os.readlink(file)
        except FileNotFoundError:
            continue
    return {f"{number}: {link}" for number, link in links.items()}


async def test_a_start_that_is_given_up_waits_for_nobody_and_leaves_no_process(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))  # where processes count together, as with every engine of this kind
    snapshot = Snapshot(str(checkpoint))
    engine = EngineProcess(Settings(max_batch_size=1), snapshot, Metrics(), lambda: None)
    starting = asyncio.create_task(engine.start())
    async with asyncio.timeout(PATIENCE_S):
        while engine.pid is None:  # noqa: ASYNC110 (it sets no event)
            await asyncio.sleep(0)
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)  # it will never say that it is warm
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        starting.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert starting.cancelled()
        await engine.stop()
        assert is_over(pid)
    finally:
        if not is_over(pid):
            os.kill(pid, signal.SIGKILL)
    assert snapshot.file == -1


def test_an_engine_whose_memory_cannot_be_had_leaves_none_behind() -> None:
    nothing = SimpleNamespace(height=0, input_width=0, num_classes=0)  # no memory can be mapped that has no bytes
    snapshot: Any = SimpleNamespace(header=SimpleNamespace(weights_sha256="abc", architecture=nothing))
    before = open_files()
    with pytest.raises(ValueError, match="empty"):
        EngineProcess(Settings(), snapshot, Metrics(), lambda: None)
    assert open_files() == before


async def test_a_process_that_cannot_be_started_leaves_no_socket(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(str(checkpoint))
    engine = EngineProcess(Settings(max_batch_size=1), snapshot, Metrics(), lambda: None)
    before = open_files()
    monkeypatch.setattr("sys.executable", "/missing/python")
    with pytest.raises(OSError, match="/missing/python"):
        await engine.start()
    assert open_files() == before
    await engine.stop()
    assert snapshot.file == -1
