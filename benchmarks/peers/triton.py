"""Peer: NVIDIA Triton Inference Server through PyTriton, with Triton's dynamic batching.

Over the Open Inference Protocol: the PNG file as binary data of a BYTES tensor, the answer as JSON. One instance, computing
on all cores; two with a thread each are no faster on two.
"""

from __future__ import annotations

import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.classifier import MAX_BATCH_SIZE, MAX_DELAY_S, Classifier, decode_all


def main() -> None:
    """Serve until SIGTERM."""
    classifier = Classifier()
    labels = np.char.encode(classifier.labels)  # (C,)

    @batch
    def classify(image: np.ndarray) -> dict[str, np.ndarray]:
        rows = classifier.scores(decode_all(image[:, 0].tolist()))  # (B, C)
        return {"label": labels[rows.argmax(axis=1)][:, None], "scores": rows}

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=int(os.environ["PEER_PORT"]),
        allow_grpc=False,
        allow_metrics=False,
    )
    batcher = DynamicBatcher(max_queue_delay_microseconds=round(MAX_DELAY_S * 1e6))
    with Triton(config=config) as triton:
        triton.bind(
            "mixture",
            classify,
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[
                Tensor(name="label", dtype=bytes, shape=(1,)),
                Tensor(name="scores", dtype=np.float64, shape=(len(labels),)),
            ],
            config=ModelConfig(max_batch_size=MAX_BATCH_SIZE, batcher=batcher),
        )
        triton.serve()


if __name__ == "__main__":
    main()
