"""Where engines of this process are made: threads, as many as the engine has lanes."""

from __future__ import annotations

import asyncio
import threading

from model.checkpoint import CheckpointError
from service.engine import Engine
from service.metrics import Metrics
from service.settings import Settings
from service.snapshot import Snapshot


class ThreadGarage:
    """Makes engines that run on threads of this process; see :class:`service.reload.Garage`.

    Args:
        settings: Device, precision and number of threads, the same for all engines.
        metrics: Show which model is in use.
        engine: The first one.

    Attributes:
        engine: The one in use.
    """

    def __init__(self, settings: Settings, metrics: Metrics, engine: Engine) -> None:
        self.engine = engine
        self._settings = settings
        self._metrics = metrics

    async def make(self, snapshot: Snapshot) -> Engine:
        """Load and warm an engine on its own threads, which have the engine's low priority.

        Raises:
            CheckpointError: The checkpoint cannot be used, or not with these settings.
            RuntimeError: The device has no room for it, say.
        """
        settings = self._settings.model_copy(update={"checkpoint": str(snapshot.path)})
        given_up = threading.Event()

        def load() -> Engine:
            try:
                engine = Engine(settings, self._metrics)
            finally:
                snapshot.close()  # not before: a thread cannot be stopped, and reads on when nobody waits for it any more
            if given_up.is_set():
                engine.close()
            return engine

        try:
            return await asyncio.to_thread(load)
        except ValueError as error:
            raise CheckpointError(snapshot.explain(str(error))) from error
        except asyncio.CancelledError:
            given_up.set()
            raise

    async def changed(self, engine: Engine) -> None:
        """Show the model in use and no other."""
        before, self.engine = self.engine.facts, engine
        if (before.version, before.precision, before.device) != (engine.version, engine.facts.precision, engine.facts.device):
            self._metrics.model_info.remove(before.version, before.precision, before.device)
