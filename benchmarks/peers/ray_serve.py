"""Peer: Ray Serve with ``serve.batch``: one replica that computes on all cores and whose own port is asked.

Started with the variables that its documentation gives for throughput (in ``contenders.py``). Slower here: asking its proxy,
HAProxy in front of the replica, and inference in a thread beside the replica's event loop.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request

from benchmarks.peers.classifier import MAX_BATCH_SIZE, MAX_DELAY_S, Classifier

QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH_SIZE, ray_actor_options={"num_cpus": 0}, logging_config=QUIET)
class Mixture:
    """The model."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one PNG file."""
        return await self.classify(await request.body())

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=MAX_DELAY_S)
    async def classify(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """Answer several."""
        return self.classifier.answers(bodies)


if __name__ == "__main__":
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.environ["PEER_FOLDER"],
    )
    serve.start(http_options={"location": "NoServer", "host": "127.0.0.1"})
    serve.run(Mixture.bind(), route_prefix="/classify")
    threading.Event().wait()
