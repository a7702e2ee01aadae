"""The GPU's series. The library's own calls are replaced, since few machines that run tests have a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.gpu import READINGS, Gpu
from service.metrics import Metrics

pynvml = pytest.importorskip("pynvml")

UUID = "8c1bdd93-7f7c-4a8e-9d2e-0a4f3f2b6c11"
EXPECTED = {
    "palisade_gpu_utilization_ratio": 0.37,
    "palisade_gpu_memory_used_bytes": 5 * 2**30,
    "palisade_gpu_memory_total_bytes": 80 * 2**30,
    "palisade_gpu_temperature_celsius": 61,
    "palisade_gpu_power_watts": 412.5,
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What NVML says of the second GPU of a machine; change it to make it say something else."""
    says: dict[str, Any] = {"name": f"GPU-{UUID}", "utilization": 37, "milliwatts": 412_500, "celsius": 61}

    def handle(name: str) -> str:
        if name != says["name"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "the handle"

    def told(key: str) -> Any:
        if isinstance(says[key], Exception):
            raise says[key]
        return says[key]

    calls = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetIndex": {"the handle": 1}.__getitem__,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=told("utilization"), memory=3),
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=5 * 2**30, total=80 * 2**30, free=75 * 2**30),
        "nvmlDeviceGetTemperature": lambda _, sensor: {pynvml.NVML_TEMPERATURE_GPU: told("celsius")}[sensor],
        "nvmlDeviceGetPowerUsage": lambda _: told("milliwatts"),
    }
    for name, call in calls.items():
        monkeypatch.setattr(pynvml, name, call)
    return says


def shown(registry: CollectorRegistry) -> dict[str, float]:
    """The GPU's series as Prometheus reads them; all are of one device, the machine's second."""
    samples = [
        sample
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name.startswith("palisade_gpu_")
    ]
    assert all(sample.labels == {"device": "1"} for sample in samples)
    return {sample.name: sample.value for sample in samples}


def test_the_gpu_in_use_is_shown_in_base_units(card: dict[str, Any]) -> None:
    metrics = Metrics()
    metrics.gpu.use(UUID)
    assert shown(metrics.registry) == EXPECTED
    card["utilization"] = 0
    assert shown(metrics.registry)["palisade_gpu_utilization_ratio"] == 0, "asked anew with every scrape"


def test_a_part_of_a_gpu_is_found_by_its_own_name(card: dict[str, Any]) -> None:
    card["name"] = f"MIG-{UUID}"
    metrics = Metrics()
    metrics.gpu.use(UUID)
    assert shown(metrics.registry) == EXPECTED


def test_what_a_gpu_does_not_tell_is_left_out(card: dict[str, Any]) -> None:
    metrics = Metrics()
    metrics.gpu.use(UUID)
    card["milliwatts"] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert shown(metrics.registry) == {name: value for name, value in EXPECTED.items() if "power" not in name}
    card["utilization"] = card["celsius"] = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    assert shown(metrics.registry).keys() == {"palisade_gpu_memory_used_bytes", "palisade_gpu_memory_total_bytes"}


def test_several_processes_show_it_too(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    metrics = Metrics()
    metrics.gpu.use(UUID)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path_factory.mktemp("metrics")))
    assert shown(metrics.collected) == EXPECTED


def test_without_a_gpu_nothing_is_shown_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it would fail
    metrics = Metrics()
    metrics.gpu.use("")
    assert shown(metrics.registry) == {}


def test_without_the_library_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = Gpu()
    gpu.use(UUID)
    gpu.use(UUID)  # by a reload
    assert list(gpu.collect()) == []
    (line,) = caplog.messages
    assert "pip install 'palisade[gpu]'" in line


def test_without_a_driver_the_log_says_what_nvml_says(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    gpu = Gpu()
    gpu.use(UUID)
    assert list(gpu.collect()) == []
    (line,) = caplog.messages
    assert UUID in line
    assert "Driver Not Loaded" in line


def test_every_series_is_expected_here() -> None:
    assert READINGS.keys() == EXPECTED.keys()
