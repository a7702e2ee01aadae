"""Metadata: what the service says of itself and its model, in the protocol's and in Triton's shapes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from service.classify import MODEL_NAME
from service.v2.encoded import IMAGE_BYTES
from service.v2.outputs import CLASS_ID, PROBABILITIES, TOLERATED
from service.v2.pixels import IMAGES

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")
PLATFORM = "palisade"


@dataclass(frozen=True)
class ModelCard:
    """What metadata tell of a model.

    Attributes:
        version: The model's version.
        classes: How many classes it tells apart.
        height: Input height in pixels.
        width: Input width in pixels.
        max_images: Most images in one request.
        max_queue_delay_us: How long a batch may wait for more images, in microseconds.
        label_only: Whether the caller's policy shows no probabilities, so that there seem to be none.
        certified: Whether the caller is shown certificates; without them there seem to be none.
    """

    version: str
    classes: int
    height: int
    width: int
    max_images: int
    max_queue_delay_us: int
    label_only: bool
    certified: bool = False


def describe_server() -> dict[str, Any]:
    """Return the body of ``GET /v2``."""
    return {"name": "palisade", "version": version("palisade"), "extensions": list(EXTENSIONS)}


def describe_model(card: ModelCard) -> dict[str, Any]:
    """Return the body of ``GET /v2/models/{model}``."""
    outputs = [{"name": CLASS_ID, "datatype": "INT64", "shape": [-1]}]
    if not card.label_only:
        outputs.insert(0, {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, card.classes]})
    if card.certified:
        outputs.append({"name": TOLERATED, "datatype": "INT64", "shape": [-1]})
    return {
        "name": MODEL_NAME,
        "versions": [card.version],
        "platform": PLATFORM,
        "inputs": [
            {"name": IMAGES, "datatype": "FP32", "shape": [-1, 3, card.height, card.width]},
            {"name": IMAGE_BYTES, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": outputs,
    }


def configuration(card: ModelCard) -> dict[str, Any]:
    """Return the body of ``GET /v2/models/{model}/config``: Triton's model configuration, whose ``dims`` leave out the batch.

    Both inputs are optional, since a request has either of them; a tensor of one number per image has ``dims`` of 1, since
    Triton has no way to write none.
    """
    one = {"dims": [1], "reshape": {"shape": []}}
    outputs: list[dict[str, Any]] = [{"name": CLASS_ID, "data_type": "TYPE_INT64", **one}]
    if not card.label_only:
        outputs.insert(0, {"name": PROBABILITIES, "data_type": "TYPE_FP32", "dims": [card.classes]})
    if card.certified:
        outputs.append({"name": TOLERATED, "data_type": "TYPE_INT64", **one})
    pixels = {"data_type": "TYPE_FP32", "format": "FORMAT_NCHW", "dims": [3, card.height, card.width]}
    return {
        "name": MODEL_NAME,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": card.max_images,
        "input": [
            {"name": IMAGES, "optional": True, **pixels},
            {"name": IMAGE_BYTES, "optional": True, "data_type": "TYPE_STRING", **one},
        ],
        "output": outputs,
        "dynamic_batching": {"max_queue_delay_microseconds": card.max_queue_delay_us},
    }
