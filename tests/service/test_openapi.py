"""The OpenAPI document: schemathesis holds the running service to it, and its examples are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.keys import KEY_TEXT
from tests.service.conftest import PATIENCE_S, RunningServer

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


@pytest.fixture(scope="module")
def described(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("described"), checkpoint=str(checkpoint), limits="off") as running:
        yield running


@pytest.fixture(scope="module")
def document(described: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{described.url}/openapi.json", timeout=PATIENCE_S).json()
    return found


def test_the_service_does_what_its_document_says(described: RunningServer, tmp_path: Path) -> None:
    version, report_file = (
        httpx.get(f"{described.url}/v1/model", timeout=PATIENCE_S).json()["version"],
        tmp_path / "report.json",
    )
    ran = subprocess.run(
        [SCHEMATHESIS, "--config-file", CONFIG, "run", f"{described.url}/openapi.json", "--report-json-path", report_file],
        cwd=tmp_path,
        env={**os.environ, "MODEL_VERSION": version, "HOOKS": str(HOOKS)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(report_file.read_text())
    phases = {name: phase["status"] for name, phase in report["phases"].items()}
    assert phases == dict.fromkeys(("examples", "coverage", "fuzzing", "stateful"), "success")
    for operation, rates in report["valid_rates"].items():
        assert sum(rate["accepted"] for rate in rates.values()) > 0, f"{operation} was never answered with success"
    assert len(report["valid_rates"]) == report["operations"]["total"] == report["operations"]["tested"]


def test_every_route_of_the_protocols_is_described(document: dict[str, Any]) -> None:
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == {
        ("get", "/healthz"), ("get", "/readyz"), ("get", "/v1/model"), ("post", "/v1/classify"),
        ("get", "/v2"), ("get", "/v2/health/live"), ("get", "/v2/health/ready"), ("get", "/v2/models"),
        *((method, base + path) for base in (model, version)
          for method, path in (("get", ""), ("get", "/ready"), ("get", "/config"), ("get", "/stats"), ("post", "/infer"))),
    }  # fmt: skip


INFER = "/v2/models/{model}/infer"


def test_inference_is_described_with_its_bodies_headers_keys_and_refusals(document: dict[str, Any]) -> None:
    infer = document["paths"][INFER]["post"]
    assert infer["requestBody"]["content"].keys() == {"application/json", "application/octet-stream"}
    sent = {parameter["name"] for parameter in infer["parameters"] if parameter["in"] == "header"}
    assert sent == {"X-Request-ID", "Inference-Header-Content-Length", "Content-Encoding"}
    refusals = {"400", "401", "403", "404", "408", "413", "415", "422", "429", "503", "504"}
    assert infer["responses"].keys() == {"200"} | refusals
    assert document["paths"]["/v1/classify"]["post"]["responses"].keys() == {"200"} | refusals - {"404"}
    assert infer["responses"]["200"]["content"].keys() == {"application/json", "application/octet-stream"}
    told = {"X-Request-ID", "RateLimit", "RateLimit-Policy", "Inference-Header-Content-Length", "Content-Encoding"}
    assert infer["responses"]["200"]["headers"].keys() == told
    assert "Retry-After" in infer["responses"]["429"]["headers"]
    assert infer["responses"]["503"]["headers"]["Retry-After"]["required"]
    schemes = document["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("scheme"), scheme.get("name")) for scheme in schemes.values()} == {
        ("http", "bearer", None),
        ("apiKey", None, "X-API-Key"),
    }
    assert infer["security"] == [*({name: []} for name in schemes), {}]  # either of them, or none


def test_the_examples_of_answers_are_what_the_embedded_model_says(document: dict[str, Any], tmp_path: Path) -> None:
    """The examples' picture goes to the checkpoint that is shipped; scores may differ by a grain from CPU to CPU."""
    classify, infer = document["paths"]["/v1/classify"]["post"], document["paths"][INFER]["post"]
    sent, said = _example(classify["requestBody"], "an image"), _example(classify["responses"]["200"])
    sent_v2, said_v2 = _example(infer["requestBody"], "an image file"), _example(infer["responses"]["200"])
    with RunningServer(tmp_path, limits="off") as running:
        (prediction,) = httpx.post(f"{running.url}/v1/classify", json=sent, timeout=PATIENCE_S).json()["predictions"]
        reply = httpx.post(f"{running.url}/v2/models/palisade/infer", json=sent_v2, timeout=PATIENCE_S).json()
    (expected,) = said["predictions"]
    assert (prediction["label"], prediction["index"]) == (expected["label"], expected["index"])
    assert prediction["scores"] == pytest.approx(expected["scores"], abs=0.011)
    assert list(expected["scores"].values()) == sorted(expected["scores"].values(), reverse=True)
    assert (reply["id"], [output["name"] for output in reply["outputs"]]) == (
        said_v2["id"],
        [output["name"] for output in said_v2["outputs"]],
    )
    for output, described_output in zip(reply["outputs"], said_v2["outputs"], strict=True):
        assert (output["datatype"], output["shape"]) == (described_output["datatype"], described_output["shape"])
        assert output["data"] == pytest.approx(described_output["data"], abs=0.011)


def _example(holder: dict[str, Any], name: str = "") -> Any:
    content = holder["content"]["application/json"]
    return content["examples"][name]["value"] if name else content["example"]


def test_the_document_holds_no_key_no_docstring_and_no_other_address(described: RunningServer) -> None:
    text = httpx.get(f"{described.url}/openapi.json", timeout=PATIENCE_S).text
    assert "Raises:" not in text, "a docstring is for who reads the code"
    assert not KEY_TEXT.search(text)
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize("path", ["/v2/", "/v2/models/palisade/", "/v1/model/", "/healthz/"])
def test_a_slash_too_many_is_the_404_that_the_document_says(described: RunningServer, path: str) -> None:
    reply = httpx.get(f"{described.url}{path}", timeout=PATIENCE_S)
    assert reply.status_code == 404
    assert reply.headers["content-type"] == ("application/json" if path.startswith("/v2") else "application/problem+json")
