"""Peer: MLServer with its adaptive batching, over the Open Inference Protocol: the PNG file as base64 in a BYTES tensor.

The model runs in the server's own process, on all cores: a parallel worker is no faster on two, and starts later. Custom routes
would not be batched. ``uvloop`` is kept below 0.22: later ones fail where code asks for an event loop and none is set.
"""

from __future__ import annotations

import asyncio
import base64
import os

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from mlserver.utils import install_uvloop_event_loop

from benchmarks.peers.classifier import MAX_BATCH_SIZE, MAX_DELAY_S, Classifier, decode_all


class Mixture(MLModel):
    """The model."""

    async def load(self) -> bool:
        """Load it."""
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer a batch that MLServer has put together."""
        bodies = [base64.b64decode(body) for body in payload.inputs[0].data.root]
        rows = self.classifier.scores(decode_all(bodies))
        labels = [self.classifier.labels[index] for index in rows.argmax(axis=1)]
        outputs = [
            ResponseOutput(name="label", shape=[len(bodies), 1], datatype="BYTES", data=labels),
            ResponseOutput(name="scores", shape=list(rows.shape), datatype="FP64", data=rows.ravel().tolist()),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def main() -> None:
    """Serve until SIGTERM."""
    settings = Settings(
        host="127.0.0.1",
        http_port=int(os.environ["PEER_PORT"]),
        grpc_port=0,
        metrics_endpoint=None,
        debug=False,
        parallel_workers=0,
    )
    model = ModelSettings(name="mixture", implementation=Mixture, max_batch_size=MAX_BATCH_SIZE, max_batch_time=MAX_DELAY_S)
    await MLServer(settings).start([model])


if __name__ == "__main__":
    install_uvloop_event_loop()
    asyncio.run(main())
