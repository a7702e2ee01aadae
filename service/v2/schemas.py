"""Schemas: the protocol's JSON bodies as JSON Schema, with examples, for the OpenAPI document.

They say what every caller may rely on. What depends on the checkpoint (the model's size) or on another field (as many values as
the shape says) they leave to words: the service checks more than a schema can tell.
"""

from __future__ import annotations

from typing import Any

from service.classify import MODEL_NAME
from service.v2.encoded import IMAGE_BYTES
from service.v2.outputs import CLASS_ID, PROBABILITIES, TOLERATED
from service.v2.pixels import DTYPES, IMAGES, LAYOUTS
from service.v2.request import MAX_ID

Schema = dict[str, Any]


def fields(required: str, **properties: Schema) -> Schema:
    """Return the schema of an object; fields that are not named may be present too."""
    return {"type": "object", "required": required.split(), "properties": properties}


def array(items: Schema, **more: Any) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **more}


def or_null(kind: str, **more: Any) -> Schema:
    """Return the schema of a field that clients may also send as null, which is as if it was absent."""
    return {"type": [kind, "null"], **more}


OUTPUTS = [PROBABILITIES, CLASS_ID, TOLERATED]
STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SHAPE = array({"type": "integer"})

ERROR = fields("error", error=STRING)
LIVE = fields("live", live={"type": "boolean"})
READY = fields("ready", ready={"type": "boolean"})
MODELS = fields("models", models=array(STRING))
MODEL_READY = fields("name ready", name=STRING, ready={"type": "boolean"})
SERVER = fields("name version extensions", name=STRING, version=STRING, extensions=array(STRING))

_TENSOR = fields("name datatype shape", name=STRING, datatype=STRING, shape=SHAPE)
METADATA = fields(
    "name versions platform inputs outputs",
    name=STRING,
    versions=array(STRING),
    platform=STRING,
    inputs=array(_TENSOR),
    outputs=array(_TENSOR),
)

_CONFIGURED = fields("name data_type dims", name=STRING, data_type=STRING, dims=array(COUNT))
CONFIGURATION = fields(
    "name platform max_batch_size input output",
    name=STRING,
    platform=STRING,
    max_batch_size=COUNT,
    input=array(_CONFIGURED),
    output=array(_CONFIGURED),
)

_DURATION = fields("count ns", count=COUNT, ns=COUNT)
STATISTICS = fields(
    "model_stats",
    model_stats=array(
        fields(
            "name version inference_count execution_count inference_stats",
            name=STRING,
            version=STRING,
            inference_count=COUNT,
            execution_count=COUNT,
            inference_stats={"type": "object", "additionalProperties": _DURATION},
        )
    ),
)

_BINARY_SIZE = {**or_null("integer", minimum=0), "description": "Bytes that this tensor has after the JSON."}
_IMAGES = {
    "title": "pixels of the model's own size",
    **fields(
        "name datatype shape",
        name={"const": IMAGES},
        datatype={"enum": sorted(DTYPES), "description": "FP32 lies in [0, 1], UINT8 goes from 0 to 255."},
        shape=array(COUNT, minItems=4, maxItems=4, description="[N, 3, H, W], or [N, H, W, 3] with the layout NHWC."),
        data={"type": ["array", "null"], "description": "Numbers, flat or nested as the shape says; or binary."},
        parameters=or_null("object", properties={"layout": {"enum": [*LAYOUTS, None]}, "binary_data_size": _BINARY_SIZE}),
    ),
}
_IMAGE_BYTES = {
    "title": "image files of any size",
    **fields(
        "name datatype shape",
        name={"const": IMAGE_BYTES},
        datatype={"const": "BYTES"},
        shape=array(COUNT, minItems=1, maxItems=2, description="[N] or [N, 1]."),
        data={"type": ["array", "null"], "description": "Strings, each a whole PNG, JPEG or WebP file in base64; or binary."},
        parameters=or_null("object", properties={"content_type": {"enum": ["base64", None]}, "binary_data_size": _BINARY_SIZE}),
    ),
}
_REQUESTED_OUTPUT = fields(
    "name",
    name={"enum": OUTPUTS},
    parameters=or_null(
        "object",
        properties={
            "binary_data": or_null("boolean"),
            "classification": {
                **or_null("integer", minimum=1),
                "description": f"For {PROBABILITIES}: answer with this many 'value:index:label' strings, best first.",
            },
        },
    ),
)
INFER_REQUEST = fields(
    "inputs",
    id=or_null("string", maxLength=MAX_ID),
    inputs=array({"oneOf": [_IMAGES, _IMAGE_BYTES]}, minItems=1, maxItems=1),
    outputs={"type": ["array", "null"], "items": _REQUESTED_OUTPUT, "maxItems": len(OUTPUTS), "description": "Default: all."},
    parameters=or_null(
        "object",
        properties={
            "timeout": {**or_null("integer", minimum=0), "description": "Deadline in microseconds; 0 is none of its own."},
            "priority": {**or_null("integer", minimum=0), "description": "Accepted; has no effect."},
            "binary_data_output": {**or_null("boolean"), "description": "Whether outputs come as bytes."},
        },
    ),
)
INFER_REPLY = fields(
    "model_name model_version outputs",
    model_name={"const": MODEL_NAME},
    model_version=STRING,
    id=STRING,
    outputs=array(
        fields(
            "name datatype shape",
            name={"enum": OUTPUTS},
            datatype={"enum": ["FP32", "INT64", "BYTES"]},
            shape=array(COUNT),
            data={"type": "array", "description": "Flat. Absent from an output that comes as bytes."},
            parameters={"type": "object", "properties": {"binary_data_size": COUNT}},
        ),
        minItems=1,
        maxItems=len(OUTPUTS),
    ),
)


def infer_examples(image: str) -> dict[str, Any]:
    """Return requests by name, each as an OpenAPI example; every one is answered.

    Args:
        image: A picture in base64.
    """
    file = {"name": IMAGE_BYTES, "datatype": "BYTES", "shape": [1], "data": [image]}
    best = {"name": PROBABILITIES, "parameters": {"classification": 3}}
    return {
        "an image file": {"value": {"id": "ship-1", "inputs": [file]}},
        "the three best classes as strings": {"value": {"inputs": [file], "outputs": [best]}},
        "two image files, the classes alone": {
            "value": {"inputs": [{**file, "shape": [2], "data": [image, image]}], "outputs": [{"name": CLASS_ID}]}
        },
    }


def reply_example(version: str, scores: list[float], best: int) -> Schema:
    """Return the reply to the first of the requests."""
    return {
        "model_name": MODEL_NAME,
        "model_version": version,
        "outputs": [
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [1, len(scores)], "data": scores},
            {"name": CLASS_ID, "datatype": "INT64", "shape": [1], "data": [best]},
        ],
        "id": "ship-1",
    }
