"""Problems: everything that can go wrong with a request, each with its status and its words.

Rendered as RFC 9457 ``application/problem+json``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response


@dataclass(eq=False)
class Problem(Exception):
    """A request that is refused.

    Attributes:
        status: The HTTP status.
        detail: What was wrong and what to do, for the caller to read.
        reason: A short fixed word for metrics and logs, also the last part of the problem's ``type``.
        headers: More response headers.
    """

    status: int
    detail: str
    reason: str
    headers: dict[str, str] = field(default_factory=dict)

    def view(self) -> dict[str, Any]:
        """Return the problem as a JSON object."""
        return {
            "type": f"urn:palisade:problem:{self.reason}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }

    def response(self) -> Response:
        """Return the problem as a response."""
        return Response(orjson.dumps(self.view()), self.status, self.headers, media_type="application/problem+json")


def bad_input(detail: str) -> Problem:
    """Return a 400: the body is not what its type says."""
    return Problem(400, detail, "bad-input")


def unauthorized(detail: str) -> Problem:
    """Return a 401: no API key, or none that is known."""
    return Problem(401, detail, "unauthorized", {"WWW-Authenticate": 'Bearer realm="palisade"'})


def forbidden(detail: str) -> Problem:
    """Return a 403: a known caller may not do this."""
    return Problem(403, detail, "forbidden")


def no_such_version(asked: str, served: str) -> Problem:
    """Return a 404: the caller names a version of the model that is not served (any more)."""
    return Problem(404, f"model 'palisade' has no version {asked}; it has '{served}'", "not-found")


def body_too_slow(seconds: float) -> Problem:
    """Return a 408: the body did not arrive in time; the rest of it is not read."""
    return Problem(408, f"the request body did not arrive within {seconds:g} s", "body-too-slow", {"Connection": "close"})


def too_large(detail: str) -> Problem:
    """Return a 413: a limit on bytes, pixels or images, or a request larger than its quota could ever grant."""
    return Problem(413, detail, "too-large")


def unsupported_type(detail: str) -> Problem:
    """Return a 415: a body or image format that is not taken."""
    return Problem(415, detail, "unsupported-type")


def unprocessable(detail: str) -> Problem:
    """Return a 422: readable, but not something that can be classified."""
    return Problem(422, detail, "unprocessable")


def quota_exceeded(window: str, retry_after_s: float | None) -> Problem:
    """Return a 429 that names the window and says when it opens again; ``None`` is never."""
    if retry_after_s is None:
        return Problem(429, "the quota of images is used up for good; ask the operator for more", "quota-exceeded")
    wait = max(1, math.ceil(retry_after_s))
    detail = f"the quota of images per {window} is used up; try again in {wait} s"
    return Problem(429, detail, "quota-exceeded", {"Retry-After": str(wait)})


def abnormal_usage(retry_after_s: float, refused: Sequence[int], images: int) -> Problem:
    """Return a 429 for a whole request: some of its images continue a long run of nearly equal ones, as attacks send them.

    Args:
        retry_after_s: How long such images are refused.
        refused: Their numbers in the request, from 1; one at least.
        images: How many the request has.
    """
    wait = max(1, math.ceil(retry_after_s))
    which = others = ""
    if len(refused) < images:
        which = f"image{'s' if len(refused) > 1 else ''} {', '.join(map(str, refused))}: "
        others = "; send the others without them"
    detail = (
        f"{which}too many nearly equal images, as an attack sends them; more of them are refused for {wait} s{others}; "
        "for video send fewer frames of a scene, or ask the operator for a trusted key"
    )
    return Problem(429, detail, "abnormal-usage-detected", {"Retry-After": str(wait)})


def overloaded(detail: str) -> Problem:
    """Return a 503: no place now, but likely soon."""
    return Problem(503, detail, "overloaded", {"Retry-After": "1"})


def quota_unknown() -> Problem:
    """Return a 503: nobody knows what is left of the caller's quota."""
    detail = "the service can't tell what is left of your quota at the moment; try again"
    return Problem(503, detail, "quota-unknown", {"Retry-After": "2"})


def draining() -> Problem:
    """Return a 503: this instance is about to stop."""
    return Problem(503, "the service is shutting down; send the request again", "draining", {"Retry-After": "1"})


def internal(request_id: str) -> Problem:
    """Return a 500: a bug; the log says more."""
    return Problem(500, f"an internal error; quote request id {request_id}", "internal")


def engine_failed() -> Problem:
    """Return a 503: the engine failed on this batch; its log says why."""
    return Problem(503, "the model failed on this batch; send the request again", "engine-failed", {"Retry-After": "1"})


def engine_down() -> Problem:
    """Return a 503: the engine is being started again."""
    return Problem(503, "the model is being loaded again; try again", "engine-down", {"Retry-After": "1"})


def deadline_passed() -> Problem:
    """Return a 504: the request waited longer than its deadline."""
    return Problem(504, "the request's deadline passed before it reached the model", "deadline-passed")
