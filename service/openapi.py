"""What OpenAPI says of the routes: bodies, answers and problems, with examples."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from service.decode import MEDIA_TYPES


class Prediction(BaseModel):
    """One image's answer; a policy may leave out ``confidence`` and ``scores``."""

    label: str = Field(examples=["cat"])
    index: int = Field(examples=[3])
    confidence: float | None = Field(None, examples=[0.87])
    scores: dict[str, float] | None = Field(None, examples=[{"cat": 0.87, "dog": 0.09}])


class Answer(BaseModel):
    """The answer to a classification, one prediction per image, in order."""

    id: str
    model: str = Field(examples=["palisade"])
    version: str
    predictions: list[Prediction]


class InputSize(BaseModel):
    """The model's input; images of other sizes are resized."""

    height: int
    width: int


class PolicyView(BaseModel):
    """What the caller's tier lets out."""

    tier: str
    decimals: int
    top_n: int | None
    label_only: bool


class QuotaView(BaseModel):
    """What is left of one window."""

    window: str
    limit: int
    remaining: int
    reset_s: int


class ModelView(BaseModel):
    """The model, the caller's policy and what is left of its quota."""

    name: str
    version: str
    labels: list[str]
    input: InputSize
    policy: PolicyView
    quota: list[QuotaView]


class Status(BaseModel):
    """A probe's answer."""

    status: str


class ProblemView(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": ProblemView.model_json_schema()}}
    return {status: {"description": DESCRIPTIONS[status], "content": content} for status in statuses}


DESCRIPTIONS = {
    400: "The body is not what its type says, or an image is damaged.",
    401: "An API key is needed, or this one is not known.",
    403: "The API key is expired or revoked, or the policy does not allow this.",
    404: "No such model or version.",
    408: "The body did not arrive in time.",
    413: "Too many bytes, pixels or images.",
    415: "A body or image format that is not taken.",
    422: "Readable, but nothing to classify.",
    429: "The quota is used up; see Retry-After and RateLimit.",
    503: "Overloaded or shutting down; see Retry-After.",
    504: "The deadline passed before the model was reached.",
}

BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "required": True,
    "content": {
        **dict.fromkeys(MEDIA_TYPES, BINARY),
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {
                    "images": {"type": "array", "minItems": 1, "items": {"type": "string", "contentEncoding": "base64"}}
                },
            }
        },
    },
}

DESCRIPTION: dict[str, Any] = {
    "title": "Palisade",
    "version": "1",
    "description": "Image classification that stays right when someone is trying to make it wrong.",
}
HEALTHZ: dict[str, Any] = {"summary": "Is the process alive?", "response_model": Status}
READYZ: dict[str, Any] = {
    "summary": "Are requests accepted?",
    "response_model": Status,
    "responses": _problems(503),
}
MODEL: dict[str, Any] = {
    "summary": "The model, your policy and your quota",
    "response_model": ModelView,
    "responses": _problems(400, 401, 403, 503),
}
CLASSIFY: dict[str, Any] = {
    "summary": "Classify one or many images",
    "responses": {
        200: {"model": Answer},
        **_problems(400, 401, 403, 408, 413, 415, 422, 429, 503, 504),
    },
    "openapi_extra": {"requestBody": BODY},
}


def v2(method: str, path: str) -> dict[str, Any]:
    """Return what OpenAPI says of a route of the Open Inference Protocol, whose own document has the details."""
    statuses = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504) if method == "POST" else (400, 401, 403, 404, 503)
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    problems = {
        status: {"description": DESCRIPTIONS[status], "content": {"application/json": {"schema": error}}} for status in statuses
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in ("model", "version")
        if f"{{{name}}}" in path
    ]
    described: dict[str, Any] = {"parameters": parameters}
    if method == "POST":
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"responses": problems, "openapi_extra": described, "tags": ["Open Inference Protocol"]}
