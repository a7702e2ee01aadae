"""The engine: the one file of the service that runs torch, on one thread of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from model.checkpoint import load_checkpoint, read_header
from model.fast import FastMixture
from model.mixture import check_top_k
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Engine:
    """Loads a checkpoint, warms it up and classifies batches.

    Loading, warm-up and every batch happen on one thread: torch keeps a team of worker threads for each thread that
    computes, and two teams on the same cores slow each other down several times.

    Args:
        settings: Which checkpoint, device, precision and number of threads.
        metrics: Told how long batches take and how the gate weighs the experts.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: A setting does not fit this machine or checkpoint.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self.header = read_header(settings.checkpoint)
        self.version = self.header.weights_sha256[:12]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        try:
            self._mixture = self._thread.submit(self._load, settings).result()
        except BaseException:
            self.close()
            raise
        metrics.model_info.labels(
            version=self.version, precision=str(self._mixture.dtype).removeprefix("torch."), device=str(self._mixture.device)
        ).set(1)

    async def classify(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities ``(B, C)`` float32 for images ``(B, 3, H, W)`` uint8."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._predict, images)
        except Exception:
            log.exception("the engine failed on a batch of %d images", len(images))
            raise

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    def _load(self, settings: Settings) -> FastMixture:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        device = choose_device(settings.device)
        mixture = load_checkpoint(settings.checkpoint, device)
        if settings.top_k:
            mixture.top_k = check_top_k(settings.top_k, mixture.architecture.num_experts)
        fast = FastMixture(mixture, DTYPES[settings.precision])
        shape = (3, self.header.architecture.height, self.header.architecture.input_width)
        started = time.perf_counter()
        for size in {1, settings.max_batch_size}:
            fast.predict(torch.zeros(size, *shape, dtype=torch.uint8))
        log.info("engine ready: %s on %s, warm after %.2f s", fast.dtype, device, time.perf_counter() - started)
        return fast

    def _predict(self, images: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        prediction = self._mixture.predict(torch.from_numpy(images))
        probabilities: np.ndarray = prediction.probabilities.cpu().numpy()
        self._metrics.batch_done(time.perf_counter() - started, prediction.gate.cpu().numpy())
        return probabilities


def choose_device(name: str) -> torch.device:
    """Return the device that a setting means; raises ``ValueError`` when this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"PALISADE_DEVICE={name}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"PALISADE_DEVICE={name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"PALISADE_DEVICE={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
