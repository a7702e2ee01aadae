"""Descriptions: what the OpenAPI document says of each of the protocol's routes, with examples made as the routes make them."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from service.classify import MODEL_NAME
from service.examples import BEST, LABELS, MODEL, SCORES, VERSION
from service.v2 import schemas
from service.v2.metadata import ModelCard, configuration, describe_model, describe_server
from service.v2.schemas import Schema
from service.v2.statistics import statistics

CARD = ModelCard(VERSION, len(LABELS), MODEL["input"]["height"], MODEL["input"]["width"], 128, 2000, label_only=False)

MODEL_ROUTE = "/v2/models/{model}"
VERSION_ROUTE = "/v2/models/{model}/versions/{version}"

KEYED = (400, 401, 403, 404, 503)


@dataclass(frozen=True)
class Description:
    """What is said of a route.

    Attributes:
        summary: In a few words.
        words: In a sentence or two.
        schema: Of the answer.
        example: An answer.
        refusals: The statuses other than 200.
    """

    summary: str
    words: str
    schema: Schema
    example: Schema
    refusals: tuple[int, ...] = ()


def description(path: str) -> Description:
    """Return what is said of a route, by its path with or without a version."""
    return ROUTES[path.replace(VERSION_ROUTE, MODEL_ROUTE)]


ROUTES = {
    "/v2": Description(
        "The server and its extensions", "The version is that of the program.", schemas.SERVER, describe_server()
    ),
    "/v2/health/live": Description(
        "Is the process alive?", "It is, where this is answered at all.", schemas.LIVE, {"live": True}
    ),
    "/v2/health/ready": Description(
        "Are requests accepted?", "For probes: 503 says to ask another replica.", schemas.READY, {"ready": True}, (503,)
    ),
    "/v2/models": Description("The models", "There is one.", schemas.MODELS, {"models": [MODEL_NAME]}),
    MODEL_ROUTE: Description(
        "The model's inputs and outputs",
        "`probabilities` is absent where your policy shows labels only, `tolerated_partitions` unless the model's experts vote "
        "and your policy shows certificates.",
        schemas.METADATA,
        describe_model(CARD),
        KEYED,
    ),
    f"{MODEL_ROUTE}/ready": Description(
        "Does the model answer?",
        "With a version: does that very version?",
        schemas.MODEL_READY,
        {"name": MODEL_NAME, "ready": True},
        (404, 503),
    ),
    f"{MODEL_ROUTE}/config": Description(
        "The model's configuration",
        "In the shape of Triton's model configuration, whose `dims` leave out the batch.",
        schemas.CONFIGURATION,
        configuration(CARD),
        KEYED,
    ),
    f"{MODEL_ROUTE}/stats": Description(
        "What was counted so far",
        "In the shape of Triton's statistics. The counts are of the whole service since its start.",
        schemas.STATISTICS,
        statistics(CollectorRegistry(), VERSION),
        KEYED,
    ),
    f"{MODEL_ROUTE}/infer": Description(
        "Classify images",
        "Send either `images`, pixels of the model's own size, or `image_bytes`, whole image files of any size. "
        "Rounding, hidden scores and quotas are those of `/v1/classify`.",
        schemas.INFER_REPLY,
        schemas.reply_example(VERSION, list(SCORES), BEST),
        (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504),
    ),
}
