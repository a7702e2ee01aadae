"""The engine: loads a checkpoint and runs batches, on threads of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model.device import gpu_uuid
from model.fast_path import FastPath
from service.fast_path import fast_path_of
from service.metrics import Metrics
from service.serving import ModelFacts
from service.settings import Settings

log = logging.getLogger(__name__)

NICENESS = 10


class Engine:
    """Loads a checkpoint, warms it up and classifies batches.

    With one lane, loading, warm-up and every batch happen on one thread: torch keeps a team of worker threads for each thread
    that computes, and two teams on the same cores slow each other down several times.

    Args:
        settings: Which checkpoint, device, precision and number of threads.
        metrics: Told how long batches take and how the gate weighs the experts.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: A setting does not fit this machine or checkpoint.

    Attributes:
        header: The checkpoint's.
        facts: What it runs.
        version: Of its model.
        lanes: How many batches may run at a time.
        is_up: Always true: it lives as long as the process.
    """

    is_up = True

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine", initializer=step_back)
        try:
            self._fast_path = self._threads.submit(load, settings, metrics).result()
        except BaseException:
            self.close()
            raise
        self.header, self.lanes = self._fast_path.header, self._fast_path.lanes
        self.facts = facts_of(self._fast_path)
        self.version = self.facts.version
        metrics.gpu.use(self.facts.gpu)
        if self.lanes > 1:
            self.close()
            self._threads = ThreadPoolExecutor(self.lanes, thread_name_prefix="engine", initializer=step_back)

    async def up(self) -> None:
        """Return at once: this engine lives as long as the process."""

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        """Return probabilities ``(B, C)`` float32 for images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, predict, self._fast_path, images, alone, self._metrics)
        except Exception:
            log.exception("the engine failed on a batch of %d images", len(images))
            raise

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    async def stop(self) -> None:
        """Stop the threads, without holding the event loop up."""
        await asyncio.to_thread(self.close)


def step_back() -> None:
    """Let HTTP go first where this thread and an event loop want the same core; threads that start from here inherit it.

    The event loop's work is short, the next batch waits for it, and under overload it has to refuse quickly.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def load(settings: Settings, metrics: Metrics) -> FastPath:
    """Return a checkpoint's fast path, warm."""
    fast_path = fast_path_of(settings)
    started = time.perf_counter()
    fast_path.warm_up()
    log.info("engine: %s on %s, warm after %.2f s", fast_path.description, fast_path.device, time.perf_counter() - started)
    metrics.model_info.labels(version=fast_path.version, precision=fast_path.precision, device=fast_path.device).set(1)
    return fast_path


def facts_of(fast_path: FastPath) -> ModelFacts:
    """Return what a fast path runs."""
    digest, device = fast_path.header.weights_sha256, fast_path.device
    return ModelFacts(digest, fast_path.description, fast_path.precision, device, gpu_uuid(device))


def predict(fast_path: FastPath, images: np.ndarray, alone: bool, metrics: Metrics) -> np.ndarray:
    """Run one batch, with all cores if it is alone, and count it."""
    started = time.perf_counter()
    prediction = fast_path.predict(images, alone)
    metrics.batch_done(time.perf_counter() - started, prediction.gate)
    return prediction.probabilities
