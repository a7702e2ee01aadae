"""The service's processes, as Linux counts them: processor time, memory, open files. Several are shown as one."""

from __future__ import annotations

import os
from collections.abc import Iterator

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Processes(Collector):
    """Shows this process and its children under the names that every Prometheus client uses, ``process_*``.

    prometheus-client's multiprocess mode loses custom collectors, its own for processes included, so the parent looks at
    everybody's.
    """

    def __init__(self) -> None:
        self._children: set[int] = set()
        self._cpu_s = 0.0

    def started(self, pid: int) -> None:
        """Look at a child, too."""
        self._children.add(pid)

    def gone(self, pid: int) -> None:
        """Look at a child no more; the processor time that it used still counts."""
        self._children.discard(pid)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        times = os.times()  # before the children's: one that ends in between is missing once rather than counted twice
        own = _samples("self")
        all_of_them = [own, *(_samples(str(pid)) for pid in tuple(self._children))]
        cpu_s = times.children_user + times.children_system + sum(each.get("cpu_seconds", 0.0) for each in all_of_them)
        self._cpu_s = max(self._cpu_s, cpu_s)  # Prometheus would take any step back for a restart
        fullest = max(all_of_them, key=lambda each: each.get("open_fds", 0.0) / each.get("max_fds", 1.0))
        yield CounterMetricFamily("process_cpu_seconds", "Processor time of all processes, ended ones included.", self._cpu_s)
        for name, text in (
            ("resident_memory_bytes", "Resident memory of all processes; what they share counts in each."),
            ("virtual_memory_bytes", "Virtual memory of all processes."),
        ):
            yield GaugeMetricFamily(f"process_{name}", text, sum(each.get(name, 0.0) for each in all_of_them))
        yield GaugeMetricFamily("process_start_time_seconds", "When the service started.", own.get("start_time_seconds", 0.0))
        yield GaugeMetricFamily(
            "process_open_fds", "Open files of the process nearest to its limit.", fullest.get("open_fds", 0.0)
        )
        yield GaugeMetricFamily("process_max_fds", "That process's limit.", fullest.get("max_fds", 0.0))
        yield GaugeMetricFamily("palisade_processes", "Processes of the service.", sum(bool(each) for each in all_of_them))


def _samples(pid: str) -> dict[str, float]:
    """Return what prometheus-client says of a process, by name without prefix; nothing of one that has ended."""
    collector = ProcessCollector(pid=lambda: pid, registry=None)
    return {family.name.removeprefix("process_"): family.samples[0].value for family in collector.collect()}
