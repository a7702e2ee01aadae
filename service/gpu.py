"""The GPU that the engine computes on, as NVIDIA's management library (NVML) sees it; without one there are no series."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

READINGS: dict[str, tuple[str, Callable[[Any, Any], float]]] = {
    "palisade_gpu_utilization_ratio": (
        "Share of the last moment in which the GPU computed anything.",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    "palisade_gpu_memory_used_bytes": (
        "Memory in use, by everybody on that GPU.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    "palisade_gpu_memory_total_bytes": ("Memory that there is.", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
    "palisade_gpu_temperature_celsius": (
        "Temperature of the chip.",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
    "palisade_gpu_power_watts": ("Power drawn.", lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
}
"""Each series' meaning, and how NVML is asked for it; in base units, where NVML has percent and milliwatts."""


class Gpu(Collector):
    """Shows one GPU, asked when somebody scrapes.

    The process that is scraped asks, whichever one computes: a driver answers everybody, and prometheus-client's multiprocess
    mode would lose what the engine's process collects.
    """

    def __init__(self) -> None:
        self._uuid = ""
        self._nvml: Any = None
        self._gpu: Any = None
        self._index = ""

    def use(self, uuid: str) -> None:
        """Show the GPU with this UUID (of a MIG instance: the instance); an empty one is no GPU.

        Without the library or its driver nothing is shown, and the log says why.
        """
        if uuid in (self._uuid, ""):
            return
        self._uuid = uuid
        try:
            import pynvml  # here, so that nobody without a GPU loads it
        except ModuleNotFoundError:
            log.warning("no metrics of the GPU: they need the extra `gpu`: pip install 'palisade[gpu]'")
            return
        try:
            pynvml.nvmlInit()
            self._gpu = _find(pynvml, uuid)
            self._index = str(pynvml.nvmlDeviceGetIndex(self._gpu))
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            log.warning("no metrics of the GPU %s: NVIDIA's management library says: %s", uuid, error)

    def collect(self) -> Iterator[Metric]:
        """Return what the GPU tells of itself; some tell less than others."""
        if self._nvml is None:
            return
        for name, (text, read) in READINGS.items():
            try:
                value = read(self._nvml, self._gpu)
            except self._nvml.NVMLError:
                continue
            family = GaugeMetricFamily(name, text, labels=["device"])
            family.add_metric([self._index], value)
            yield family


def _find(nvml: Any, uuid: str) -> Any:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError_NotFound:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
