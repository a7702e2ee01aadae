"""What the coordinator does with an engine that cannot be made."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from service.admin_server import AdminServer
from service.coordinator import Coordinator
from service.metrics import Metrics
from service.quota_tiers import TierQuotas
from service.settings import Settings
from service.slab import Slab
from service.snapshot import Snapshot


async def test_the_snapshot_of_an_engine_that_cannot_be_made_is_let_go(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    settings = Settings(checkpoint=str(checkpoint), frontends=2, max_batch_size=1)
    with socket.socket() as listener, contextlib.closing(AdminServer(settings)) as door:
        coordinator = Coordinator(settings, listener, Metrics(), door)
        snapshot = Snapshot(str(checkpoint))
        monkeypatch.setattr(Slab, "make_file", full)
        with pytest.raises(OSError, match="Cannot allocate"):
            await coordinator.make(snapshot)
        assert snapshot.file == -1
        await coordinator.engine.stop()


async def test_refunds_on_their_way_are_waited_for_at_the_end(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    async def finish(_: TierQuotas) -> None:
        await asyncio.sleep(0)
        done.append("refunds")

    monkeypatch.setattr(TierQuotas, "finish", finish)
    settings = Settings(checkpoint=str(checkpoint), frontends=2, max_batch_size=1)
    with socket.socket() as listener, contextlib.closing(AdminServer(settings)) as door:
        coordinator = Coordinator(settings, listener, Metrics(), door)
        await coordinator._drain()
        await coordinator.engine.stop()
    assert done == ["refunds"]
