"""Peer: LitServe with its batching: one API server and one inference worker, which computes on all cores.

Neither ``fast_queue`` nor two workers with a thread each made it faster on two cores.
"""

# Without "from __future__ import annotations": LitServe hands the annotation of decode_request to FastAPI as it is.

import os
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body

from benchmarks.peers.classifier import MAX_BATCH_SIZE, MAX_DELAY_S, Classifier, decode


class Mixture(litserve.LitAPI):
    """The model; everything but HTTP happens in LitServe's inference worker, a process of its own."""

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        del device
        self.classifier = Classifier()

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/png")]) -> np.ndarray:
        """Decode one PNG file."""
        return decode(request)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Put images together."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[list[float]]:
        """Return rows of scores."""
        return self.classifier.scores(x).tolist()

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """Take rows apart."""
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        """Return one answer."""
        return self.classifier.answer(output)


if __name__ == "__main__":
    api = Mixture(max_batch_size=MAX_BATCH_SIZE, batch_timeout=MAX_DELAY_S, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=int(os.environ["PEER_PORT"]), log_level="warning", generate_client_file=False)
