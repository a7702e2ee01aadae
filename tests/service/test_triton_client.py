"""The Open Inference Protocol against a running server: NVIDIA's own client, and what it never sends."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import LABELS, PATIENCE_S, RunningServer
from tests.service.pictures import base64_text, encode, noise, pixels

triton = pytest.importorskip("tritonclient.http")
triton_aio = pytest.importorskip("tritonclient.http.aio")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException

SEEDS = (3, 4, 5)
PIXELS = np.stack([pixels(noise(seed)) for seed in SEEDS])  # (3, 3, 32, 32) uint8
FLOATS = PIXELS.astype(np.float32) / np.float32(255)
FILES = [encode(noise(seed)) for seed in SEEDS]


@pytest.fixture
def client(server: RunningServer) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def version(server: RunningServer) -> str:
    found: str = httpx.get(f"{server.url}/v1/model", timeout=PATIENCE_S).json()["version"]
    return found


@pytest.fixture(scope="module")
def plain(server: RunningServer) -> list[dict[str, Any]]:
    """What v1 says of the same pictures."""
    reply = httpx.post(f"{server.url}/v1/classify", json={"images": [base64_text(file) for file in FILES]}, timeout=PATIENCE_S)
    predictions: list[dict[str, Any]] = reply.json()["predictions"]
    assert len({prediction["confidence"] for prediction in predictions}) > 1, "pictures that look alike would prove nothing"
    return predictions


@pytest.fixture(scope="module")
def label_only_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(
        tmp_path_factory.mktemp("labels"), checkpoint=str(checkpoint), tier_anonymous_label_only="true", limits="off"
    ) as running:
        yield running


def image_input(values: np.ndarray, binary: bool = True, **parameters: str) -> Any:
    datatype = {"uint8": "UINT8", "float32": "FP32"}[values.dtype.name]
    one = triton.InferInput("images", list(values.shape), datatype).set_data_from_numpy(values, binary_data=binary)
    one._parameters.update(parameters)  # the client offers no other way to set a tensor's parameters
    return one


def file_input(files: list[bytes], binary: bool = True) -> Any:
    values = np.array(files, np.object_)
    return triton.InferInput("image_bytes", [len(files)], "BYTES").set_data_from_numpy(values, binary_data=binary)


def scores(plain: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[prediction["scores"][label] for label in LABELS] for prediction in plain], np.float32)


def same_as_v1(result: Any, plain: list[dict[str, Any]]) -> None:
    assert result.as_numpy("class_id").tolist() == [prediction["index"] for prediction in plain]
    assert result.as_numpy("class_id").dtype == np.int64
    np.testing.assert_array_equal(result.as_numpy("probabilities"), scores(plain))


def test_the_server_and_its_model_are_live_ready_and_described(client: Any, version: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "palisade"
    for model_version in ("", version):
        assert client.is_model_ready("palisade", model_version)
        metadata = client.get_model_metadata("palisade", model_version)
        assert metadata["versions"] == [version]
        assert metadata["inputs"][0]["shape"] == [-1, 3, 32, 32]
        config = client.get_model_config("palisade", model_version)
        assert config["input"][0]["dims"] == [3, 32, 32]
        assert config["max_batch_size"] == 40
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("palisade", "7")


@pytest.mark.parametrize("binary_reply", [True, False])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("values", [PIXELS, FLOATS], ids=["uint8", "fp32"])
def test_tensors_get_the_answer_that_v1_gives(
    client: Any, plain: list[dict[str, Any]], values: np.ndarray, binary: bool, binary_reply: bool
) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_reply) for name in ("probabilities", "class_id")]
    same_as_v1(client.infer("palisade", [image_input(values, binary)], outputs=outputs), plain)


def test_colours_may_come_last(client: Any, plain: list[dict[str, Any]]) -> None:
    values = np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1))
    same_as_v1(client.infer("palisade", [image_input(values, layout="NHWC")]), plain)


def test_encoded_images_get_the_answer_that_v1_gives(client: Any, plain: list[dict[str, Any]]) -> None:
    same_as_v1(client.infer("palisade", [file_input(FILES)]), plain)
    texts = [base64_text(file).encode() for file in FILES]
    same_as_v1(client.infer("palisade", [file_input(texts, binary=False)]), plain)
    large = encode(noise(3, 300, 200), "JPEG")
    assert client.infer("palisade", [file_input([large])]).as_numpy("class_id").shape == (1,)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_and_replies_may_be_compressed(client: Any, plain: list[dict[str, Any]], algorithm: str) -> None:
    options = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    for binary in (True, False):
        same_as_v1(client.infer("palisade", [image_input(PIXELS, binary)], **options), plain)
    many = np.repeat(PIXELS[:1], 40, axis=0)
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=False)]
    long = client.infer("palisade", [image_input(many)], outputs=outputs, **options)
    np.testing.assert_array_equal(long.as_numpy("probabilities"), np.repeat(scores(plain)[:1], 40, axis=0))


def test_a_long_reply_is_compressed_as_the_client_asks(server: RunningServer) -> None:
    files = {"name": "image_bytes", "datatype": "BYTES", "shape": [40], "data": [base64_text(FILES[0])] * 40}
    for algorithm in ("gzip", "deflate"):
        reply = httpx.post(
            f"{server.url}/v2/models/palisade/infer",
            json={"inputs": [files]},
            headers={"Accept-Encoding": algorithm},
            timeout=PATIENCE_S,
        )
        assert reply.headers["content-encoding"] == algorithm
        assert reply.json()["outputs"][1]["shape"] == [40]


@pytest.mark.parametrize("binary", [True, False])
def test_classification_tells_what_v1_tells(client: Any, plain: list[dict[str, Any]], binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)]
    result = client.infer("palisade", [image_input(PIXELS)], outputs=outputs).as_numpy("probabilities")
    assert result.shape == (3, 3)
    for row, prediction in zip(result, plain, strict=True):
        told = [(text.decode() if isinstance(text, bytes) else text).split(":") for text in row]
        best = list(prediction["scores"].items())[:3]
        assert [(label, float(value)) for value, _, label in told] == best
        assert [LABELS[int(index)] for _, index, _ in told] == [label for label, _ in best]


def test_many_requests_at_once_get_their_own_answers(server: RunningServer, plain: list[dict[str, Any]]) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4) as client:
        order = [0, 1, 2, 2, 1, 0, 0, 2]
        waiting = [client.async_infer("palisade", [image_input(PIXELS[i : i + 1])], request_id=str(i)) for i in order]
        for index, handle in zip(order, waiting, strict=True):
            result = handle.get_result()
            assert result.get_response()["id"] == str(index)
            same_as_v1(result, plain[index : index + 1])


async def test_the_asyncio_client_is_answered(server: RunningServer, plain: list[dict[str, Any]], version: str) -> None:
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("palisade", version)
        result = await client.infer(
            "palisade",
            [image_input(PIXELS)],
            version,
            request_compression_algorithm="gzip",
            response_compression_algorithm="gzip",
        )
        same_as_v1(result, plain)
        with pytest.raises(InferenceServerException, match="no model"):
            await client.infer("other", [image_input(PIXELS)])


def test_a_reply_names_the_model_its_version_and_the_request(client: Any, version: str) -> None:
    response = client.infer("palisade", [image_input(PIXELS)], version, request_id="my request").get_response()
    assert response["model_name"] == "palisade"
    assert response["model_version"] == version
    assert response["id"] == "my request"


def test_values_between_the_levels_of_a_byte_are_answered(client: Any) -> None:
    result = client.infer("palisade", [image_input(np.clip(FLOATS + np.float32(0.001), 0, 1))])
    assert result.as_numpy("probabilities").sum(axis=1) == pytest.approx(1, abs=0.06)


def test_a_deadline_that_can_not_be_met_is_a_504_and_a_priority_is_taken(client: Any, plain: list[dict[str, Any]]) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer("palisade", [image_input(PIXELS)], timeout=1)
    assert caught.value.status() == "504"
    same_as_v1(client.infer("palisade", [image_input(PIXELS)], timeout=60_000_000, priority=1), plain)


def test_statistics_count_what_was_answered(client: Any) -> None:
    def stats() -> dict[str, Any]:
        (model,) = client.get_inference_statistics("palisade")["model_stats"]
        return {"images": model["inference_count"], "requests": model["inference_stats"]["success"]["count"]}

    before = stats()
    client.infer("palisade", [image_input(PIXELS)])
    assert stats() == {"images": before["images"] + 3, "requests": before["requests"] + 1}


def test_the_client_understands_why_it_is_refused(client: Any) -> None:
    bad: list[tuple[str, str, str, list[Any], dict[str, Any]]] = [
        ("404", "no model 'other'", "other", [image_input(PIXELS)], {}),
        ("404", "no version '9'", "palisade", [image_input(PIXELS)], {"model_version": "9"}),
        ("413", "at most 40", "palisade", [image_input(np.zeros((41, 3, 32, 32), np.uint8))], {}),
        ("422", "[1,3,16,16]", "palisade", [image_input(np.zeros((1, 3, 16, 16), np.uint8))], {}),
        ("400", "position 0", "palisade", [image_input(FLOATS * np.nan)], {}),
        ("400", "either", "palisade", [image_input(PIXELS), file_input(FILES)], {}),
        ("400", "'logits'", "palisade", [image_input(PIXELS)], {"outputs": [triton.InferRequestedOutput("logits")]}),
        ("400", "image 2 of 2", "palisade", [file_input([FILES[0], b"no image"])], {}),
    ]
    for status, said, model, inputs, options in bad:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, inputs, **options)
        assert (caught.value.status(), said in caught.value.message()) == (status, True), caught.value


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2/nothing", 404), ("GET", "/v2/models/a/b/c/d", 404), ("GET", "/v2/models/palisade/infer", 405),
     ("DELETE", "/v2", 405), ("POST", "/v2/models/palisade", 405), ("POST", "/v2/models/palisade/infer", 400),
     ("POST", "/v2/models/x%00/infer", 404), ("GET", "/v2/models/palisade/versions/1/config", 404)],
)  # fmt: skip
def test_every_refusal_is_json_with_an_error(server: RunningServer, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, f"{server.url}{path}", timeout=PATIENCE_S)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    assert isinstance(reply.json()["error"], str)


def test_bodies_that_no_client_sends_are_refused(server: RunningServer) -> None:
    entry = {"name": "images", "datatype": "UINT8", "shape": [3, 3, 32, 32], "parameters": {"binary_data_size": PIXELS.nbytes}}
    text = json.dumps({"inputs": [entry]}).encode()
    whole, length = text + PIXELS.tobytes(), {"Inference-Header-Content-Length": str(len(text))}
    bad: list[tuple[int, bytes, dict[str, str]]] = [
        (400, whole, {}),
        (400, whole, {"Inference-Header-Content-Length": "-1"}),
        (400, whole, {"Inference-Header-Content-Length": str(10**9)}),
        (400, whole[:-1], length),
        (400, gzip.compress(whole)[:-9], {**length, "Content-Encoding": "gzip"}),
        (400, whole, {**length, "Content-Encoding": "gzip"}),
        (413, gzip.compress(bytes(50_000_000)), {"Content-Encoding": "gzip"}),
        (415, whole, {**length, "Content-Encoding": "br"}),
        (413, b"[" * 400_000, {}),
        (400, b"[" * 50_000, {}),
        (400, b'{"inputs": ' * 5000, {}),
    ]
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        for status, body, headers in bad:
            reply = client.post("/v2/models/palisade/infer", content=body, headers=headers)
            assert reply.status_code == status, reply.text
            assert reply.headers["content-type"] == "application/json"
            assert reply.json()["error"]
        good = client.post(
            "/v2/models/palisade/infer", content=gzip.compress(whole), headers={**length, "Content-Encoding": "gzip"}
        )
        assert good.status_code == 200


def test_a_request_uses_up_the_quota_by_its_images(limited_server: RunningServer) -> None:
    entry = {"name": "images", "datatype": "UINT8", "shape": [4, 3, 32, 32], "data": [7] * 4 * 3 * 32 * 32}
    with limited_server.client("127.0.0.61") as client:
        first = client.post("/v2/models/palisade/infer", json={"inputs": [entry]})
        assert first.status_code == 200
        assert '"day";r=2;' in first.headers["ratelimit"]
        refused = client.post("/v2/models/palisade/infer", json={"inputs": [entry]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "quota" in refused.json()["error"]
        nonsense = client.post(
            "/v2/models/palisade/infer", json={"inputs": [{**entry, "data": [-1] * 2 * 3072, "shape": [2, 3, 32, 32]}]}
        )
        assert nonsense.status_code == 400
        assert client.post("/v1/classify", content=FILES[0], headers={"Content-Type": "image/png"}).status_code == 200
        assert client.post("/v1/classify", content=FILES[1], headers={"Content-Type": "image/png"}).status_code == 200
        assert client.post("/v1/classify", content=FILES[2], headers={"Content-Type": "image/png"}).status_code == 429


def test_under_label_only_there_are_no_probabilities(label_only_server: RunningServer) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{label_only_server.port}") as client:
        names = [output["name"] for output in client.get_model_metadata("palisade")["outputs"]]
        assert names == ["class_id"]
        assert "probabilities" not in json.dumps(client.get_model_config("palisade"))
        response = client.infer("palisade", [image_input(PIXELS)]).get_response()
        assert [output["name"] for output in response["outputs"]] == ["class_id"]
        for class_count in (0, 1):
            outputs = [triton.InferRequestedOutput("probabilities", class_count=class_count)]
            with pytest.raises(InferenceServerException) as caught:
                client.infer("palisade", [image_input(PIXELS)], outputs=outputs)
            assert caught.value.status() == "403"
