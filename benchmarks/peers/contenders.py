"""Who is compared: how each server is started, asked and understood."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import Requests
from benchmarks.peers import environments
from benchmarks.peers.reference import TOLERANCE
from benchmarks.running_service import UNLIMITED
from model import execution

Answer = tuple[str, Mapping[str, float]]
"""A label, and the scores by label."""

V2_HEADER_BYTES = 160


def _as_it_is(body: bytes) -> bytes:
    return body


def _named(answer: Any, labels: Sequence[str]) -> Answer:
    del labels  # they are in the answer
    return answer["label"], answer["scores"]


def _palisade(answer: Any, labels: Sequence[str]) -> Answer:
    return _named(answer["predictions"][0], labels)


def _bentoml(answer: Any, labels: Sequence[str]) -> Answer:
    return _named(answer[0], labels)


def _v2(answer: Any, labels: Sequence[str]) -> Answer:
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    return outputs["label"][0], dict(zip(labels, outputs["scores"], strict=True))


def _json_body(body: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(body).decode()]}).encode()


def _v2_json_body(body: bytes) -> bytes:
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [base64.b64encode(body).decode()]}
    return json.dumps({"inputs": [tensor]}).encode()


def _v2_binary_body(body: bytes) -> bytes:
    """Return a JSON header, padded so that all are of one length, and one BYTES element."""
    parameters = {"binary_data_size": 4 + len(body)}
    header = {"inputs": [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": parameters}]}
    return json.dumps(header).encode().ljust(V2_HEADER_BYTES) + len(body).to_bytes(4, "little") + body


@dataclass(frozen=True)
class Contender:
    """A server.

    Attributes:
        name: Of its environment too.
        command: After the folder of its environment's programs; ``{port}`` stands for the port.
        environment: Variables; ``{port}`` as above, ``{folder}`` for a folder that is removed afterwards.
        path: Where requests go.
        headers: Of each request.
        body: Makes a request's body from a PNG file.
        read: Understands an answer, parsed from JSON.
        tolerance: How far its scores may be from the model's.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    path: str = "/classify"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "image/png"})
    body: Callable[[bytes], bytes] = _as_it_is
    read: Callable[[Any, Sequence[str]], Answer] = _named
    tolerance: float = TOLERANCE

    def programs(self) -> Path:
        """Return the folder of its programs, installed now if they were not."""
        return Path(sys.executable).parent if self.name == PALISADE else environments.prepare(self.name)

    def requests(self, bodies: Sequence[bytes]) -> Requests:
        """Return one request for each PNG file."""
        return Requests(self.path, self.headers, [self.body(body) for body in bodies])


PALISADE = "palisade"


def palisade(settings: Mapping[str, str]) -> Contender:
    """Return Palisade with settings, quotas and answer cache off: every request is computed, as the peers do.

    Answers in int8 are taken for right only if the settings say ``precision=int8``: such figures must not pass for others.
    """
    chosen = {"port": "{port}", "metrics_port": "0", **UNLIMITED, **settings}
    return Contender(
        name=PALISADE,
        command=("python", "-m", "service.cli", "run"),
        environment={f"PALISADE_{name.upper()}": value for name, value in chosen.items()},
        path="/v1/classify",
        read=_palisade,
        tolerance=execution.TOLERANCE["int8"] if settings.get("precision") == "int8" else TOLERANCE,
    )


def peers() -> dict[str, Contender]:
    """Return the peers by name. What else each is set to stands in its own file."""
    found = (
        Contender("fastapi", ("python", "-m", "benchmarks.peers.fastapi")),
        Contender("litserve", ("python", "-m", "benchmarks.peers.litserve")),
        Contender(
            "bentoml",
            ("bentoml", "serve", "benchmarks.peers.bentoml:Mixture", "--host", "127.0.0.1", "--port", "{port}"),
            {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{folder}"},
            headers={"Content-Type": "application/json"},
            body=_json_body,
            read=_bentoml,
        ),
        Contender(
            "ray_serve",
            ("python", "-m", "benchmarks.peers.ray_serve"),
            # What its documentation gives for throughput; the replica then has a port of its own, past the proxy.
            {
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "{port}",
                "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "65535",
                "PEER_FOLDER": "{folder}",
            },
        ),
        Contender(
            "mlserver",
            ("python", "-m", "benchmarks.peers.mlserver"),
            path="/v2/models/mixture/infer",
            headers={"Content-Type": "application/json"},
            body=_v2_json_body,
            read=_v2,
        ),
        Contender(
            "triton",
            ("python", "-m", "benchmarks.peers.triton"),
            path="/v2/models/mixture/infer",
            headers={"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(V2_HEADER_BYTES)},
            body=_v2_binary_body,
            read=_v2,
        ),
    )
    return {contender.name: contender for contender in found}
