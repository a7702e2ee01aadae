"""What OpenAPI says of the routes: bodies, headers, keys, answers and problems.

tests/service/test_openapi.py holds the running service to it.
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, Field

from service import examples
from service.classify import MODEL_NAME
from service.decode import MEDIA_TYPES
from service.v2 import schemas
from service.v2.descriptions import description


class Certificate(BaseModel):
    """What poisoned training data could not have changed; only of a model whose experts vote, where your policy shows it."""

    tolerated_partitions: int = Field(
        ge=0,
        description="Of so many partitions of the training data any samples could be others, and the label would be the same. "
        "A sample that is inserted, removed or relabelled changes one partition, one whose pixels change two.",
    )


class Prediction(BaseModel):
    """One image's answer; a policy may leave out ``confidence``, ``scores`` and ``certificate``."""

    label: str
    index: int
    confidence: float | None = None
    scores: dict[str, float] | None = Field(None, description="From the largest to the smallest, as many as the policy shows.")
    certificate: Certificate | None = None


class Answer(BaseModel):
    """The answer to a classification, one prediction per image, in order."""

    id: str = Field(description="The request's id, as in X-Request-ID.")
    model: str
    version: str = Field(description="The start of the weights' digest.")
    predictions: list[Prediction]


class InputSize(BaseModel):
    """The model's input; images of other sizes are resized."""

    height: int
    width: int


class PolicyView(BaseModel):
    """What the caller's tier lets out."""

    tier: str
    decimals: int
    top_n: int | None = Field(None, description="Scores shown, the largest ones; null shows all.")
    label_only: bool


class CertificateView(BaseModel):
    """Present where your answers carry certificates."""

    partitions: int = Field(description="Into how many the training data were divided; as many experts vote.")


class QuotaView(BaseModel):
    """What is left of one window."""

    window: str
    limit: int = Field(description="Images.")
    remaining: int = Field(description="Images.")
    reset_s: int | None = Field(description="Seconds until the window starts anew; null if it never does.")


class ModelView(BaseModel):
    """The model, the caller's policy and what is left of its quota."""

    name: str
    version: str
    labels: list[str]
    input: InputSize
    policy: PolicyView
    certificate: CertificateView | None = None
    quota: list[QuotaView]


class Status(BaseModel):
    """A probe's answer."""

    status: str


class ProblemView(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="urn:palisade:problem:<reason>")
    title: str
    status: int
    detail: str = Field(description="What was wrong and what to do.")


Fields = dict[str, Any]

TEXT = {"type": "string"}
REQUEST_ID = {
    "X-Request-ID": {
        "description": "The request's id, as it is in the log.",
        "required": True,
        "schema": TEXT,
        "example": "order-66",
    }
}
QUOTA = {
    "RateLimit-Policy": {
        "description": "Every window's quota in images (q) and its seconds (w; not if it is for life); absent without a quota.",
        "schema": TEXT,
        "example": '"minute";q=60;w=60, "day";q=500;w=86400',
    },
    "RateLimit": {
        "description": "What is left of every window in images (r), and seconds until it starts anew (t; not if never).",
        "schema": TEXT,
        "example": '"minute";r=59;t=60, "day";r=499;t=86400',
    },
}
RETRY = {
    "description": "Seconds after which to try again; absent where waiting does not help.",
    "schema": {"type": "integer", "minimum": 1},
    "example": 17,
}
CHALLENGE = {"WWW-Authenticate": {"description": "Bearer.", "required": True, "schema": TEXT}}
PACKED = {
    "Inference-Header-Content-Length": {
        "description": "Bytes of the JSON, unpacked; present when outputs follow it as bytes.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Content-Encoding": {"description": "As Accept-Encoding asks.", "schema": {"enum": ["gzip", "deflate"]}},
}

# These only describe: the pipeline identifies every caller, whichever way its request takes.
KEYS = [
    Depends(HTTPBearer(scheme_name="bearer", description="An API key, palisade_<id>_<secret>.", auto_error=False)),
    Depends(APIKeyHeader(name="X-API-Key", scheme_name="apiKey", description="The same key.", auto_error=False)),
]
NO_KEY: list[dict[str, list[str]]] = [{}]

ID_PARAMETER = {
    "name": "X-Request-ID",
    "in": "header",
    "description": "Taken over when it has at most 128 characters of A-Z a-z 0-9 . _ : / + = -, else replaced.",
    "schema": TEXT,
}
LENGTH_PARAMETER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of the JSON (unpacked) at the start of the body. Absent when all of it is JSON.",
    "schema": {"type": "integer", "minimum": 1},
}
ENCODING_PARAMETER = {
    "name": "Content-Encoding",
    "in": "header",
    "description": "How the body is packed. The limits hold for the unpacked bytes.",
    "schema": {"enum": ["gzip", "deflate", "identity"]},
}
PATH_PARAMETERS = {
    "model": {"name": "model", "in": "path", "required": True, "schema": {"enum": [MODEL_NAME]}},
    "version": {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "The model's version, as GET /v2/models/palisade lists it.",
        "schema": {**TEXT, "minLength": 1, "pattern": "^[^/]+$"},
    },
}

FILE = {"schema": {"type": "string", "format": "binary"}}
BODY: Fields = {
    "required": True,
    "content": {
        **dict.fromkeys(MEDIA_TYPES, FILE),
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "additionalProperties": False,
                "properties": {"file": {"type": "array", "minItems": 1, "items": FILE["schema"]}},
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {"images": {"type": "array", "minItems": 1, "items": {**TEXT, "contentEncoding": "base64"}}},
            },
            "examples": {
                "an image": {"value": {"images": [examples.SHIP]}},
                "two images": {"value": {"images": [examples.SHIP, examples.SHIP]}},
            },
        },
    },
}
INFER_BODY: Fields = {
    "required": True,
    "description": "JSON; or JSON followed by the bytes of a tensor, with Inference-Header-Content-Length. What it is is told "
    "by that header alone: no Content-Type is needed.",
    "content": {
        "application/json": {"schema": schemas.INFER_REQUEST, "examples": schemas.infer_examples(examples.SHIP)},
        "application/octet-stream": FILE,
    },
}

IDENTIFIED = (400, 401, 403)
ANSWERED = (400, 401, 403, 408, 413, 415, 422, 429, 503, 504)


def _refusals(statuses: tuple[int, ...], v2: bool = False) -> dict[int | str, Fields]:
    """Return what OpenAPI says of each status that refuses a request."""
    refusals: dict[int | str, Fields] = {}
    for status in statuses:
        meaning, problem = examples.PROBLEMS[status]
        if v2:
            content = {"application/json": {"schema": schemas.ERROR, "example": {"error": problem.detail}}}
        else:
            schema = ProblemView.model_json_schema()
            content = {"application/problem+json": {"schema": schema, "example": problem.view()}}
        headers = {
            **REQUEST_ID,
            **(QUOTA if 429 in statuses else {}),
            **({"Retry-After": {**RETRY, "required": status == 503}} if status in (429, 503) else {}),
            **(CHALLENGE if status == 401 else {}),
        }
        refusals[status] = {"description": meaning, "headers": headers, "content": content}
    return refusals


def _success(example: Fields, schema: Fields | None = None, **headers: Fields) -> dict[int | str, Fields]:
    """Return what OpenAPI says of status 200, in addition to what FastAPI knows of the handler."""
    described = {"example": example} if schema is None else {"schema": schema, "example": example}
    content = {"application/json": described}
    return {200: {"description": "OK", "headers": {**REQUEST_ID, **headers}, "content": content}}


DESCRIPTION: Fields = {
    "title": "Palisade",
    "redirect_slashes": False,  # a path with a slash too many does not exist; nobody is sent to an address of its own making
    "version": "1",
    "description": "Image classification that stays right when someone is trying to make it wrong.\n\n"
    "A path that does not exist is a 404, another method than those below a 405 with `Allow`, each in the form of its "
    'protocol: `application/problem+json` (RFC 9457) or, under `/v2`, `{"error": ...}`. Quotas count images, not requests.',
}
HEALTHZ: Fields = {
    "summary": "Is the process alive?",
    "tags": ["Probes"],
    "response_model": Status,
    "responses": _success({"status": "alive"}),
    "openapi_extra": {"parameters": [ID_PARAMETER]},
}
READYZ: Fields = {
    "summary": "Are requests accepted?",
    "tags": ["Probes"],
    "response_model": Status,
    "responses": {**_success({"status": "ready"}), **_refusals((503,))},
    "openapi_extra": {"parameters": [ID_PARAMETER]},
}
MODEL: Fields = {
    "summary": "The model, your policy and your quota",
    "tags": ["Images in, labels out"],
    "response_model": ModelView,
    "response_model_exclude_unset": True,
    "responses": {**_success(examples.MODEL), **_refusals((*IDENTIFIED, 503))},
    "dependencies": KEYS,
    "openapi_extra": {"parameters": [ID_PARAMETER], "security": NO_KEY},
}
CLASSIFY: Fields = {
    "summary": "Classify one or many images",
    "description": "One image as it is, several as files of a form, or in base64 as JSON. Images of any size are resized.",
    "tags": ["Images in, labels out"],
    "responses": {
        200: {"model": Answer, **_success(examples.ANSWER, **QUOTA)[200]},
        **_refusals(ANSWERED),
    },
    "dependencies": KEYS,
    "openapi_extra": {"parameters": [ID_PARAMETER], "requestBody": BODY, "security": NO_KEY},
}


def v2(method: str, path: str) -> Fields:
    """Return what OpenAPI says of a route of the Open Inference Protocol."""
    said = description(path)
    extra: Fields = {"parameters": [parameter for name, parameter in PATH_PARAMETERS.items() if f"{{{name}}}" in path]}
    extra["parameters"].append(ID_PARAMETER)
    success = _success(said.example, said.schema)
    if method == "POST":
        extra["parameters"] += [LENGTH_PARAMETER, ENCODING_PARAMETER]
        extra["requestBody"] = INFER_BODY
        success = _success(said.example, said.schema, **QUOTA, **PACKED)
        success[200]["content"]["application/octet-stream"] = FILE
    route: Fields = {
        "summary": said.summary,
        "description": said.words,
        "tags": ["Open Inference Protocol"],
        "openapi_extra": extra,
    }
    if set(IDENTIFIED) <= set(said.refusals):
        extra["security"] = NO_KEY
        route["dependencies"] = KEYS
    return {**route, "responses": {**success, **_refusals(said.refusals, v2=True)}}
