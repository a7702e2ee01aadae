"""Metrics: what Prometheus scrapes, on a port of its own. For operators only: never a key or an address."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from threading import Thread
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from service.gpu import Gpu
from service.processes import Processes

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asked for

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable: the folder through which several processes share metrics; set before this file is imported."""


class Metrics:
    """All series of one service instance, in a registry of its own.

    Where several processes serve together, each counts for itself into files of a shared folder, and whoever is scraped adds
    them up (prometheus-client's multiprocess mode).
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("palisade_requests", "Requests answered.", ["route", "code"], registry=registry)
        self.request_duration = Histogram(
            "palisade_request_duration_seconds", "From first byte to last.", ["route"], buckets=SECONDS, registry=registry
        )
        self.queue_images = Gauge("palisade_queue_images", "Queue places held.", registry=registry, multiprocess_mode="livesum")
        self.queue_capacity = Gauge(
            "palisade_queue_capacity_images", "Queue places there are.", registry=registry, multiprocess_mode="livemax"
        )
        self.queue_wait = Histogram(
            "palisade_queue_wait_seconds", "From the queue's end to a batch.", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram("palisade_batch_size_images", "Images per batch.", buckets=IMAGES, registry=registry)
        self.inference = Histogram("palisade_inference_seconds", "Engine time per batch.", buckets=SECONDS, registry=registry)
        self.decode = Histogram("palisade_decode_seconds", "Decoding per request.", buckets=SECONDS, registry=registry)
        self.rejected = Counter("palisade_rejected", "Requests refused.", ["reason"], registry=registry)
        self.quota_denied = Counter("palisade_quota_denied", "Requests over quota.", ["tier", "window"], registry=registry)
        self.expert_weight = Counter(
            "palisade_expert_weight", "Sum of the gate's weights over images.", ["expert"], registry=registry
        )
        self.gate_entropy = Histogram(
            "palisade_gate_entropy", "Entropy of an image's gate weights, in nats.",
            buckets=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25), registry=registry,
        )  # fmt: skip
        self.predictions = Counter("palisade_predictions", "Images answered.", ["label"], registry=registry)
        self.engine_restarts = Counter("palisade_engine_restarts", "Engines started in place of dead ones.", registry=registry)
        self.model_info = Gauge(
            "palisade_model_info", "The model.", ["version", "precision", "device"], registry=registry,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self.ready = Gauge("palisade_ready", "1 when requests are accepted.", registry=registry, multiprocess_mode="livemax")
        self.limiter_store_up = Gauge(
            "palisade_limiter_store_up", "1 while quotas are counted where they should be.", registry=registry,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self.limiter_fallback = Counter(
            "palisade_limiter_fallback", "Requests decided on while the quotas' store was down.", ["decision"],
            registry=registry,
        )  # fmt: skip
        self.suspicious = Counter(
            "palisade_suspicious", "Images that a detector found suspicious.", ["detector"], registry=registry
        )
        # To Prometheus a series that begins at 1 has not grown, so what may count later is there from the start.
        for decision in ("granted", "refused", "closed", "unshared"):
            self.limiter_fallback.labels(decision)
        self.processes = Processes()
        registry.register(self.processes)
        self.gpu = Gpu()
        registry.register(self.gpu)
        # Looking a child up by its labels costs as much as counting does.
        self._requests = cache(self.requests.labels)
        self._request_duration = cache(self.request_duration.labels)
        self._expert_weight = cache(self.expert_weight.labels)
        self._predictions = cache(self.predictions.labels)

    @property
    def collected(self) -> CollectorRegistry:
        """The series of all processes together."""
        if FOLDER not in os.environ:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        registry.register(self.processes)
        registry.register(self.gpu)
        return registry

    def serve(self, host: str, port: int) -> tuple[WSGIServer, Thread]:
        """Answer ``GET /metrics`` on a thread; returns the server (``server_port``, ``shutdown()``) and the thread."""
        return start_http_server(port, host, self.collected)

    def expect_detectors(self, names: Iterable[str]) -> None:
        """Show detectors that have found nothing yet."""
        for name in names:
            self.suspicious.labels(name)

    def expect_quotas(self, windows: Iterable[tuple[str, str]]) -> None:
        """Show quotas ``(tier, window)`` that have refused nobody yet."""
        for tier, window in windows:
            self.quota_denied.labels(tier, window)

    def process_started(self, pid: int) -> None:
        """Count a child process's memory, files and processor time in."""
        self.processes.started(pid)

    def process_gone(self, pid: int) -> None:
        """Stop showing the gauges of a process that has ended; what it counted stays."""
        self.processes.gone(pid)
        mark_process_dead(pid)  # type: ignore[no-untyped-call]

    def waited(self, seconds: float) -> None:
        """Count a request's wait in the queue."""
        self.queue_wait.observe(seconds)

    def batch_formed(self, images: int) -> None:
        """Count a batch."""
        self.batch_size.observe(images)

    def queue_changed(self, images: int) -> None:
        """Show how many queue places are held."""
        self.queue_images.set(images)

    def batch_done(self, seconds: float, gate: np.ndarray) -> None:
        """Count a batch's engine time and its gate weights ``(B, E)``."""
        self.inference.observe(seconds)
        for expert, weight in enumerate(gate.sum(axis=0).tolist()):
            self._expert_weight(str(expert)).inc(weight)
        for entropy in (-(gate * np.log(np.maximum(gate, 1e-12))).sum(axis=1)).tolist():
            self.gate_entropy.observe(entropy)

    def answered(self, labels: Sequence[str], best: np.ndarray) -> None:
        """Count predictions by label; ``best`` holds the classes' indices, ``(N,)``."""
        for index in best.tolist():
            self._predictions(labels[index]).inc()

    def request_over(self, route: str, status: int, seconds: float, reason: str | None) -> None:
        """Count a request, and why it was refused if it was."""
        self._requests(route, str(status)).inc()
        self._request_duration(route).observe(seconds)
        if reason is not None:
            self.rejected.labels(reason).inc()
