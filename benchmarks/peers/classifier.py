"""The model as every peer runs it: PNG files in, labels and rounded scores out, computed by OpenVINO.

The peers' servers import this in environments of their own, so it uses nothing but OpenVINO, NumPy and Pillow.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
from PIL import Image

MAX_BATCH_SIZE = 64
MAX_DELAY_S = 0.002
DECIMALS = 2


class Classifier:
    """The exported mixture, compiled as Palisade compiles it: bfloat16 where the processor has it, for latency, on all cores.

    Not safe to call from two threads at once.

    Args:
        largest: The largest batch that will come; this size and 1 are run once beforehand.
    """

    def __init__(self, largest: int = MAX_BATCH_SIZE) -> None:
        core = openvino.Core()
        model = core.read_model(os.environ["PEER_MODEL"])
        self.labels: list[str] = json.loads(model.get_rt_info("labels").astype(str))
        threads = len(os.sched_getaffinity(0))
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
        self._request = core.compile_model(model, "CPU", hints).create_infer_request()
        shape = [axis.get_length() for axis in list(model.input().partial_shape)[1:]]
        for size in (1, largest):
            self.scores(np.zeros((size, *shape), np.float32))

    def scores(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return rounded probabilities ``(B, C)`` of images ``(B, 3, H, W)`` in ``[0, 1]``."""
        self._request.infer([images], share_inputs=True)
        rounded: npt.NDArray[np.float64] = self._request.get_output_tensor(0).data.astype(np.float64).round(DECIMALS)
        return rounded

    def answers(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """Return an answer for each PNG file."""
        return [self.answer(row) for row in self.scores(decode_all(bodies)).tolist()]

    def answer(self, row: list[float]) -> dict[str, Any]:
        """Return what a caller gets for one image: the label and the score of every class."""
        return {"label": self.labels[row.index(max(row))], "scores": dict(zip(self.labels, row, strict=True))}


def decode_all(bodies: list[bytes]) -> npt.NDArray[np.float32]:
    """Return PNG files of the model's size as images ``(B, 3, H, W)`` in ``[0, 1]``."""
    return np.stack([decode(body) for body in bodies])


def decode(body: bytes) -> npt.NDArray[np.float32]:
    """Return one PNG file of the model's size as ``(3, H, W)`` in ``[0, 1]``."""
    with Image.open(io.BytesIO(body), formats=("PNG",)) as image:
        pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
