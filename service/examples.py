"""Examples that the OpenAPI document shows: a picture, what the embedded model says of it, and every refusal."""

from __future__ import annotations

from typing import Any

from service import problems
from service.classify import MODEL_NAME
from service.problems import Problem

SHIP = (
    "UklGRrgAAABXRUJQVlA4IKwAAABQBQCdASogACAAPzmGuVOvKSWisAgB4CcJQBhmjSvZxVJaQLsf8JnROgVRQFnGPfPQBSAA/vfl5c/Si9MzQ8V7"
    "FDoHmE86BlNBf0WBI+HR6FJclvHu8+CNE/fQqQSdPqwoPAbvKU0pFk1YI11bA0STcukApjW0/fFZen8mFbWUaO+gxebjagwf1/3oRenB7Z+2gBSl"
    "st9H+62vUYJXKXjvUiM8JVO1yGLZAAAA"
)
"""A WebP of 32 x 32 pixels in base64."""

VERSION = "0123456789ab"
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SCORES = (0.07, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.88, 0.02)
"""Of the ship, by class, at the two decimals of the anonymous tier."""

BEST = 8
ORDERED = (8, 0, 1, 9, 2, 3, 4, 5, 6, 7)

ANSWER: dict[str, Any] = {
    "id": "order-66",
    "model": MODEL_NAME,
    "version": VERSION,
    "predictions": [
        {
            "label": LABELS[BEST],
            "index": BEST,
            "confidence": SCORES[BEST],
            "scores": {LABELS[index]: SCORES[index] for index in ORDERED},
        }
    ],
}
MODEL: dict[str, Any] = {
    "name": MODEL_NAME,
    "version": VERSION,
    "labels": list(LABELS),
    "input": {"height": 32, "width": 32},
    "policy": {"tier": "anonymous", "decimals": 2, "label_only": False},
    "quota": [
        {"window": "minute", "limit": 60, "remaining": 59, "reset_s": 60},
        {"window": "day", "limit": 500, "remaining": 499, "reset_s": 86400},
    ],
}

PROBLEMS: dict[int, tuple[str, Problem]] = {
    400: (
        "The body is not what its type says, an image is damaged, a header makes no sense, or there are several keys.",
        problems.bad_input("the body is empty; send an image"),
    ),
    401: (
        "An API key is needed, or this one is not known.",
        problems.unauthorized("the API key is not known: check that it is whole, or ask the operator for one"),
    ),
    403: (
        "The API key is expired or revoked, or the policy does not show what was asked for.",
        problems.forbidden("the API key qz4mh2xk7d is expired: ask the operator for a new one"),
    ),
    404: (
        "No such model or version.",
        Problem(404, f"there is no model 'resnet'; this service has '{MODEL_NAME}'", "not-found"),
    ),
    408: ("The body did not arrive in time; the connection is closed.", problems.body_too_slow(10)),
    413: (
        "Too many bytes, pixels, values or images, or more images than the quota could ever grant.",
        problems.too_large("200 images in one request; at most 128 are taken"),
    ),
    415: (
        "A Content-Type, a Content-Encoding or an image format that is not taken.",
        problems.unsupported_type("the image is a GIF; PNG, JPEG, WEBP are taken"),
    ),
    422: (
        "Readable, but not what the model takes.",
        problems.unprocessable("the image is animated (2 frames); send one frame"),
    ),
    429: (
        "The quota is used up, or the images are those of an attack.",
        problems.quota_exceeded("minute", 17),
    ),
    503: (
        "Overloaded, shutting down, the model is being loaded again, or nobody knows what is left of the quota.",
        problems.overloaded("512 images are waiting and the queue holds 512; try again"),
    ),
    504: ("The deadline passed before the request reached the model.", problems.deadline_passed()),
}
"""What each status means, and one case of it."""
