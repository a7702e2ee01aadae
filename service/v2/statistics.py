"""Statistics: what the service has counted so far, in the shape of Triton's statistics extension."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from service.classify import MODEL_NAME

INFER_ROUTE = "/infer"


def statistics(registry: CollectorRegistry, version: str) -> dict[str, Any]:
    """Return the body of ``GET /v2/models/{model}/stats``, read from the service's metrics.

    Counts are of all protocols, except for ``success`` and ``fail``, which are of V2 requests: ``success`` and ``fail`` are
    requests, ``queue`` and ``compute_input`` (decoding) requests that got that far, ``compute_infer`` batches. Times are
    nanoseconds since the start; the metrics keep those of requests together, so ``success`` holds the time of both. What is not
    measured (``compute_output``, the cache) is 0.

    Args:
        registry: The metrics, as :class:`service.metrics.Metrics` names them.
        version: The model's version.
    """
    totals: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            name = sample.name
            if "route" in sample.labels:
                if not sample.labels["route"].endswith(INFER_ROUTE):
                    continue
                if "code" in sample.labels:
                    name += "_ok" if sample.labels["code"] == "200" else "_failed"
            totals[name] = totals.get(name, 0.0) + sample.value
    durations = {
        "success": _duration(totals.get("palisade_requests_total_ok"), totals.get("palisade_request_duration_seconds_sum")),
        "fail": _duration(totals.get("palisade_requests_total_failed"), 0.0),
        "queue": _histogram(totals, "palisade_queue_wait_seconds"),
        "compute_input": _histogram(totals, "palisade_decode_seconds"),
        "compute_infer": _histogram(totals, "palisade_inference_seconds"),
        **{name: _duration(0, 0) for name in ("compute_output", "cache_hit", "cache_miss")},
    }
    model = {
        "name": MODEL_NAME,
        "version": version,
        "inference_count": int(totals.get("palisade_predictions_total", 0)),
        "execution_count": int(totals.get("palisade_batch_size_images_count", 0)),
        "inference_stats": durations,
        "batch_stats": [],
    }
    return {"model_stats": [model]}


def _histogram(totals: dict[str, float], name: str) -> dict[str, int]:
    return _duration(totals.get(f"{name}_count"), totals.get(f"{name}_sum"))


def _duration(count: float | None, seconds: float | None) -> dict[str, int]:
    return {"count": int(count or 0), "ns": round(1e9 * (seconds or 0))}
