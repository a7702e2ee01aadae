"""``POST /v1/classify`` and the other routes, end to end: over sockets where it matters, in this process elsewhere."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.conftest import LABELS, PATIENCE_S, RunningServer, SharedEngine, eventually, serve_in_process
from tests.service.pictures import BOUNDARY, MULTIPART, animation, base64_text, encode, multipart, noise, pixels, png_bomb

PNG = encode(noise(0))
PROBLEM = "application/problem+json"


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def image_body(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"content": data, "headers": {"Content-Type": kind}}


def images_json(*images: bytes) -> dict[str, Any]:
    return {"json": {"images": [base64_text(image) for image in images]}}


def images_multipart(*images: bytes) -> dict[str, Any]:
    return {"files": [("file", (f"{number}.png", image, "image/png")) for number, image in enumerate(images)]}


def scores_of(prediction: dict[str, Any]) -> np.ndarray:
    """A prediction's scores in the order of the classes."""
    return np.array([prediction["scores"][label] for label in LABELS])


def scores_from(client: httpx.Client, image: bytes) -> np.ndarray:
    """The scores (C,) that one image gets."""
    return scores_of(client.post("/v1/classify", **image_body(image)).json()["predictions"][0])


def check_problem(reply: httpx.Response, status: int) -> dict[str, Any]:
    """Check that a reply is a complete problem with this status, and return it."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == PROBLEM
    assert reply.headers["X-Request-ID"]
    problem = reply.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["type"].startswith("urn:palisade:problem:")
    assert "Traceback" not in reply.text
    return dict(problem)


# What a good request gets


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_classified(client: httpx.Client, kind: str) -> None:
    data = encode(noise(3, 50, 40), kind)
    reply = client.post("/v1/classify", **image_body(data, f"image/{kind.lower()}"))
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    answer = json.loads(reply.text, parse_float=Decimal)
    assert answer.keys() == {"id", "model", "version", "predictions"}
    assert answer["id"] == reply.headers["X-Request-ID"]
    assert answer["model"] == "palisade"
    (prediction,) = answer["predictions"]
    assert prediction.keys() == {"label", "index", "confidence", "scores"}
    assert LABELS[prediction["index"]] == prediction["label"]
    assert set(prediction["scores"]) == set(LABELS)
    assert prediction["confidence"] == prediction["scores"][prediction["label"]] == max(prediction["scores"].values())
    assert float(sum(prediction["scores"].values())) == pytest.approx(1, abs=0.05)
    for score in prediction["scores"].values():
        assert score == round(score, 2), "finer than the policy's two decimals"


def test_answers_are_those_of_the_model(client: httpx.Client, checkpoint: Path) -> None:
    import torch

    from model.checkpoint import load_checkpoint

    pictures = [noise(seed) for seed in range(12)]
    images = torch.from_numpy(np.stack([pixels(picture) for picture in pictures])).float() / 255
    expected = load_checkpoint(checkpoint)(images).exp().numpy()  # (N, C)
    answer = client.post("/v1/classify", **images_json(*(encode(picture) for picture in pictures))).json()
    got = np.stack([scores_of(prediction) for prediction in answer["predictions"]])
    np.testing.assert_allclose(got, expected, atol=0.0051)
    clear = np.sort(expected)[:, -1] - np.sort(expected)[:, -2] > 0.001
    assert clear.sum() >= 8
    assert [p["index"] for p, c in zip(answer["predictions"], clear, strict=True) if c] == expected.argmax(1)[clear].tolist()


def test_an_image_gets_the_same_answer_in_every_form_and_in_any_company(client: httpx.Client) -> None:
    first, second = PNG, encode(noise(1))
    forms = [image_body(first), images_multipart(first), images_json(first)]
    alone = [client.post("/v1/classify", **form).json()["predictions"] for form in forms]
    assert alone[0] == alone[1] == alone[2]
    other = client.post("/v1/classify", **image_body(second)).json()["predictions"]
    assert other != alone[0]
    for form in (images_multipart(second, first), images_json(second, first)):
        assert client.post("/v1/classify", **form).json()["predictions"] == other + alone[0]


def test_a_request_id_is_echoed_in_the_reply_and_in_the_answer(client: httpx.Client) -> None:
    request = image_body(PNG)
    request["headers"]["X-Request-ID"] = "order-66"
    reply = client.post("/v1/classify", **request)
    assert reply.headers["X-Request-ID"] == reply.json()["id"] == "order-66"


def test_the_model_describes_itself(client: httpx.Client, checkpoint: Path) -> None:
    from model.checkpoint import read_header

    view = client.get("/v1/model").json()
    assert view["name"] == "palisade"
    assert view["labels"] == list(LABELS)
    assert view["input"] == {"height": 32, "width": 32}
    assert read_header(checkpoint).weights_sha256.startswith(view["version"])
    assert client.post("/v1/classify", **image_body(PNG)).json()["version"] == view["version"]
    assert view["policy"] == {"tier": "anonymous", "decimals": 2, "top_n": None, "label_only": False}
    assert view["quota"] == []


def test_the_probes_answer(client: httpx.Client) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200


def test_the_documentation_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert any(path.endswith(".js") for path in loaded)
    for path in (*loaded, "/openapi.json"):
        assert path.startswith("/"), path
        assert not path.startswith("//"), path
        assert client.get(path).status_code == 200, path
    assert "/openapi.json" in page.text


def test_openapi_lists_the_routes_and_refers_to_nothing_that_is_missing(client: httpx.Client) -> None:
    reply = client.get("/openapi.json")
    described = reply.json()
    assert described["paths"].keys() >= {"/v1/classify", "/v1/model", "/healthz", "/readyz"}
    body = described["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert body.keys() == {"image/png", "image/jpeg", "image/webp", "multipart/form-data", "application/json"}
    for name in re.findall(r'"#/components/schemas/([^"]+)"', reply.text):
        assert name in described["components"]["schemas"]
    assert '"#/$defs' not in reply.text


# What a bad request gets


def test_an_unknown_path_is_a_404_problem(client: httpx.Client) -> None:
    assert "/v1/classification" in check_problem(client.get("/v1/classification"), 404)["detail"]


def test_a_wrong_method_is_a_405_problem_that_lists_the_right_ones(client: httpx.Client) -> None:
    reply = client.get("/v1/classify")
    check_problem(reply, 405)
    assert reply.headers["Allow"] == "POST"


def test_the_public_port_serves_no_metrics(client: httpx.Client) -> None:
    assert client.get("/metrics").status_code == 404


BAD: dict[str, tuple[int, dict[str, Any]]] = {
    "not an image": (400, image_body(b"hello")),
    "no body": (400, image_body(b"")),
    "a png cut short": (400, image_body(PNG[: len(PNG) // 2])),
    "a jpeg cut short": (400, image_body(encode(noise(0), "JPEG")[:400], "image/jpeg")),
    "a webp cut short": (400, image_body(encode(noise(0), "WEBP")[:60], "image/webp")),
    "a bomb": (413, image_body(png_bomb())),
    "an animated png": (422, image_body(animation("PNG"))),
    "an animated webp": (422, image_body(animation("WEBP"), "image/webp")),
    "a gif called png": (415, image_body(b"GIF89a" + bytes(50))),
    "a gif": (415, image_body(b"GIF89a" + bytes(50), "image/gif")),
    "text": (415, image_body(b"hello", "text/plain")),
    "a form": (415, {"data": {"image": "hello"}}),
    "no content type": (415, {"content": b"hello"}),
    "an image of too many bytes": (413, image_body(PNG + bytes(500_000))),
    "a body of too many bytes": (413, image_body(bytes(1_000_001))),
    "an endless body": (413, image_body(bytes(0)) | {"content": (bytes(100_000) for _ in range(11))}),
    "no json": (400, image_body(b"{", "application/json")),
    "json of another shape": (422, {"json": {"instances": []}}),
    "json with more fields": (422, {"json": {"images": [base64_text(PNG)], "tier": "trusted"}}),
    "json without an image": (422, {"json": {"images": []}}),
    "json with a number": (422, {"json": {"images": [1]}}),
    "json with bad base64": (400, {"json": {"images": ["!"]}}),
    "json with a bad image": (400, images_json(PNG, b"hello")),
    "json with an empty image": (400, images_json(PNG, b"")),
    "json with too many images": (413, images_json(*[b"x"] * 41)),
    "multipart with another field": (422, {"files": {"image": ("a.png", PNG, "image/png")}}),
    "multipart without a boundary": (400, image_body(multipart(PNG), "multipart/form-data")),
    "multipart with a long boundary": (400, image_body(multipart(PNG), "multipart/form-data; boundary=" + "b" * 300)),
    "multipart cut short": (400, image_body(multipart(PNG, closed=False), MULTIPART)),
    "multipart of garbage": (400, image_body(b"garbage", MULTIPART)),
    "multipart with a bad image": (400, images_multipart(PNG, b"hello")),
    "multipart with too many images": (413, images_multipart(*[b"x"] * 41)),
    "multipart without a file": (422, image_body(f"--{BOUNDARY}--\r\n".encode(), MULTIPART)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_a_problem_with_its_status(client: httpx.Client, name: str) -> None:
    status, request = BAD[name]
    check_problem(client.post("/v1/classify", **request), status)
    assert client.get("/readyz").status_code == 200


def test_a_bad_image_among_others_is_named_by_its_number(client: httpx.Client) -> None:
    problem = check_problem(client.post("/v1/classify", **images_json(PNG, b"hello", PNG)), 400)
    assert "image 2 of 3" in problem["detail"]


# Many clients at once


def test_concurrent_clients_each_get_the_answer_to_their_own_image(client: httpx.Client) -> None:
    images = [encode(noise(seed)) for seed in range(32)]
    ask = partial(scores_from, client)
    alone = np.stack([ask(image) for image in images])  # (32, C)
    apart = np.abs(alone[:, None] - alone[None]).max(axis=2)  # (32, 32)
    assert (apart > 0.04).sum() > 0.8 * apart.size, "the images are too much alike to tell their answers apart"
    with ThreadPoolExecutor(32) as pool:
        together = np.stack(list(pool.map(ask, images)))
    np.testing.assert_allclose(together, alone, atol=0.02)


def _send_and_vanish(server: RunningServer, announced: int, sent: int) -> None:
    """Send the beginning of a request and close the connection."""
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {announced}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + PNG[:sent])


def test_clients_that_vanish_do_not_disturb_the_others(server: RunningServer, client: httpx.Client) -> None:
    images = [encode(noise(seed)) for seed in range(16)]
    ask = partial(scores_from, client)
    alone = [ask(image) for image in images]
    gone = partial(server.metric, "palisade_requests_total", route="/v1/classify", code="499")
    ended = partial(server.metric, "palisade_requests_total", route="/v1/classify")
    before, ended_before = gone(), ended()
    with ThreadPoolExecutor(24) as pool:
        together = [pool.submit(ask, image) for image in images[:8]]
        for _ in range(4):
            pool.submit(_send_and_vanish, server, len(PNG), 20)  # in the middle of its body
            pool.submit(_send_and_vanish, server, len(PNG), len(PNG))  # without waiting for the answer
        together += [pool.submit(ask, image) for image in images[8:]]
    for future, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(future.result(), expected, atol=0.02)
    eventually(lambda: ended() >= ended_before + len(images) + 8, "the requests of the vanished clients are over")
    assert gone() >= before + 4
    eventually(lambda: server.metric("palisade_queue_images") == 0, "no queue place is held for the vanished clients")
    ask(images[0])  # with its answer, the engine is done with theirs, and has counted them


# Metrics


def test_the_metrics_port_counts_what_was_served(server: RunningServer, client: httpx.Client) -> None:
    served = {"route": "/v1/classify", "code": "200"}
    names = ("predictions_total", "gate_entropy_count", "batch_size_images_sum", "expert_weight_total", "decode_seconds_count")
    before = {name: server.metric(f"palisade_{name}") for name in names}
    requests = server.metric("palisade_requests_total", **served)
    answer = client.post("/v1/classify", **images_json(*(encode(noise(seed)) for seed in range(3)))).json()
    eventually(lambda: server.metric("palisade_requests_total", **served) == requests + 1, "the request is counted")
    grown = {name: server.metric(f"palisade_{name}") - before[name] for name in names}
    assert grown.pop("decode_seconds_count") == 1
    assert grown == pytest.approx(dict.fromkeys(grown, 3), abs=1e-3)
    assert server.metric("palisade_queue_images") == 0
    assert server.metric("palisade_ready") == 1
    assert server.metric("palisade_model_info", version=answer["version"], device="cpu", precision="float32") == 1
    label = answer["predictions"][0]["label"]
    assert server.metric("palisade_predictions_total", label=label) > 0
    assert "127.0.0.1" not in server.scrape()


def test_refusals_are_counted_by_their_reason(server: RunningServer, client: httpx.Client) -> None:
    before = server.metric("palisade_rejected_total", reason="bad-input")
    client.post("/v1/classify", **image_body(b"hello"))
    eventually(lambda: server.metric("palisade_rejected_total", reason="bad-input") == before + 1, "the refusal is counted")


def test_paths_that_do_not_exist_add_no_series(server: RunningServer, client: httpx.Client) -> None:
    before = server.metric("palisade_requests_total", route="other", code="404")
    for number in range(5):
        client.get(f"/made-up/{number}")
    eventually(lambda: server.metric("palisade_requests_total", route="other", code="404") == before + 5, "they are counted")
    assert "made-up" not in server.scrape()


def test_every_line_of_the_log_is_json_and_tells_no_address(server: RunningServer, client: httpx.Client) -> None:
    request = image_body(PNG)
    request["headers"]["X-Request-ID"] = "to-be-found"
    client.post("/v1/classify", **request)

    def found() -> list[dict[str, Any]]:
        return [line for line in server.log_lines() if line.get("request_id") == "to-be-found"]

    eventually(lambda: len(found()) == 1, "the request is logged")
    line = found()[0]
    assert (line["route"], line["status"], line["images"], line["tier"]) == ("/v1/classify", 200, 1, "anonymous")
    assert line["duration_ms"] > 0
    assert "127.0.0.1" not in json.dumps(line)


def test_an_unknown_variable_is_warned_of_at_the_start(server: RunningServer) -> None:
    warnings = [line["message"] for line in server.log_lines() if line["level"] == "warning"]
    assert any("PALISADE_COLOUR" in message for message in warnings)
    assert any("PALISADE_LIMITS=off" in message for message in warnings)


def test_no_request_of_these_tests_ended_in_an_internal_error(server: RunningServer) -> None:
    assert [line for line in server.log_lines() if line["level"] in ("error", "critical") or line.get("status") == 500] == []


# Quotas


def test_no_header_lets_a_caller_choose_who_it_is(limited_server: RunningServer) -> None:
    with limited_server.client("127.0.0.11") as client:
        for number in range(6):
            headers = dict.fromkeys(("X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP"), f"198.51.100.{number}")
            headers |= {"Forwarded": f"for=198.51.100.{number}", "Content-Type": "image/png"}
            assert client.post("/v1/classify", content=PNG, headers=headers).status_code == 200
        headers = {"X-Forwarded-For": "198.51.100.99", "Content-Type": "image/png"}
        check_problem(client.post("/v1/classify", content=PNG, headers=headers), 429)
    with limited_server.client("127.0.0.12") as other:
        assert other.post("/v1/classify", **image_body(PNG)).status_code == 200


def test_a_used_up_quota_is_a_429_that_says_when_to_come_back(limited_server: RunningServer) -> None:
    with limited_server.client("127.0.0.13") as client:
        reply = client.post("/v1/classify", **images_json(*[PNG] * 5))
        assert reply.status_code == 200
        assert reply.headers["RateLimit-Policy"] == '"hour";q=100;w=3600, "day";q=6;w=86400'
        assert re.fullmatch(r'"hour";r=95;t=[0-9]+, "day";r=1;t=[0-9]+', reply.headers["RateLimit"])
        refused = client.post("/v1/classify", **images_json(PNG, PNG))
        assert check_problem(refused, 429)["type"] == "urn:palisade:problem:quota-exceeded"
        assert 86000 < int(refused.headers["Retry-After"]) <= 86400
        assert '"day";r=1;' in refused.headers["RateLimit"]
        assert client.get("/v1/model").json()["quota"][1]["remaining"] == 1
        assert client.post("/v1/classify", **image_body(PNG)).status_code == 200  # one was left


async def _left(client: httpx.AsyncClient) -> int:
    (window,) = (await client.get("/v1/model")).json()["quota"]
    return int(window["remaining"])


async def test_many_images_in_one_request_cost_as_much_as_one_by_one(engine: SharedEngine) -> None:
    async with (
        serve_in_process(engine, limits="on", tier_anonymous_limits="10/day") as served,
        served.client("192.0.2.1") as one,
        served.client("192.0.2.2") as other,
    ):
        await one.post("/v1/classify", **images_json(PNG, PNG, PNG))
        for _ in range(3):
            await other.post("/v1/classify", **image_body(PNG))
        assert await _left(one) == await _left(other) == 7


async def test_a_request_that_the_quota_could_never_grant_is_a_413(engine: SharedEngine) -> None:
    async with serve_in_process(engine, limits="on", tier_anonymous_limits="2/day") as served, served.client() as client:
        problem = check_problem(await client.post("/v1/classify", **images_json(PNG, PNG, PNG)), 413)
        assert "2 per day" in problem["detail"]
        assert await _left(client) == 2


@pytest.mark.parametrize("bad", [b"hello", PNG[:100], png_bomb(), animation("WEBP")])
async def test_a_request_that_fails_costs_nothing(engine: SharedEngine, bad: bytes) -> None:
    async with serve_in_process(engine, limits="on", tier_anonymous_limits="5/day") as served, served.client() as client:
        reply = await client.post("/v1/classify", **images_json(PNG, bad))
        assert reply.status_code in (400, 413, 422)
        assert await _left(client) == 5
        assert '"day";r=5;' in reply.headers["RateLimit"]


async def test_a_request_that_the_engine_fails_is_a_503_that_costs_nothing(engine: SharedEngine) -> None:
    class Failing(SharedEngine):
        async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
            raise RuntimeError("out of memory")

    settings = {"limits": "on", "tier_anonymous_limits": "5/day"}
    async with serve_in_process(Failing(engine._engine), **settings) as served, served.client() as client:
        reply = await client.post("/v1/classify", **image_body(PNG))
        check_problem(reply, 503)
        assert "out of memory" not in reply.text
        assert reply.headers["Retry-After"]
        assert await _left(client) == 5


async def test_the_neighbours_of_an_ipv6_caller_share_its_quota(engine: SharedEngine) -> None:
    async with serve_in_process(engine, limits="on", tier_anonymous_limits="2/day") as served:
        statuses = []
        for address in ("2001:db8::1", "2001:db8::ffff:1", "2001:db8::2", "2001:db8:0:1::2"):
            async with served.client(address) as client:
                statuses.append((await client.post("/v1/classify", **image_body(PNG))).status_code)
    assert statuses == [200, 200, 429, 200]


# Policies


async def test_a_policy_of_few_scores_shows_that_many(engine: SharedEngine) -> None:
    async with serve_in_process(engine, tier_anonymous_top_n=3, tier_anonymous_decimals=1) as served, served.client() as client:
        (prediction,) = (await client.post("/v1/classify", **image_body(PNG))).json()["predictions"]
        assert len(prediction["scores"]) == 3
        assert prediction["confidence"] == round(prediction["confidence"], 1)
        assert (await client.get("/v1/model")).json()["policy"]["top_n"] == 3


async def test_a_policy_of_labels_alone_shows_no_number_of_the_model(engine: SharedEngine) -> None:
    async with serve_in_process(engine, tier_anonymous_label_only=True) as served, served.client() as client:
        (prediction,) = (await client.post("/v1/classify", **image_body(PNG))).json()["predictions"]
        assert prediction.keys() == {"label", "index"}


@pytest.mark.parametrize(("capacity", "different"), [(100, 1), (0, 8)])
async def test_sending_an_image_again_does_not_average_rounding_away(
    engine: SharedEngine, capacity: int, different: int
) -> None:
    class Drifting(SharedEngine):
        """Answers every batch a little differently, as hardware does, but so that it shows."""

        batches = 0

        async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
            self.batches += 1
            return np.roll(np.linspace(0, 0.2, 10, dtype=np.float32), self.batches)[None].repeat(len(images), axis=0)

    drifting = Drifting(engine._engine)
    drifting.lanes = 1  # so that the two images of one request ride in one batch on every machine
    async with serve_in_process(drifting, answer_cache_images=capacity) as served, served.client() as client:
        forms = [image_body(PNG), images_json(PNG), images_multipart(PNG), images_json(PNG, PNG)] * 2
        answers = [(await client.post("/v1/classify", **form)).json()["predictions"] for form in forms]
    assert len({json.dumps(prediction) for predictions in answers for prediction in predictions}) == different


# Overload, deadlines, shutdown


class HeldEngine(SharedEngine):
    """Starts every batch only when the test lets it."""

    def __init__(self, engine: SharedEngine) -> None:
        super().__init__(engine._engine)
        self.let_go = asyncio.Event()
        self.batches = 0

    async def classify(self, images: np.ndarray, alone: bool) -> np.ndarray:
        self.batches += 1
        await self.let_go.wait()
        return await super().classify(images, alone)


async def test_a_full_queue_is_a_503_at_once_and_the_accepted_are_answered(engine: SharedEngine) -> None:
    held = HeldEngine(engine)
    async with serve_in_process(held, max_queue_images=2, max_batch_size=1) as served, served.client() as client:
        accepted = [asyncio.create_task(client.post("/v1/classify", **image_body(PNG)))]
        await served.eventually(lambda: held.batches == 1)
        accepted += [asyncio.create_task(client.post("/v1/classify", **image_body(PNG))) for _ in range(2)]
        await served.eventually(lambda: served.metric("palisade_queue_images") == 2)
        reply = await client.post("/v1/classify", **image_body(PNG))
        check_problem(reply, 503)
        assert reply.headers["Retry-After"]
        held.let_go.set()
        assert [(await request).status_code for request in accepted] == [200, 200, 200]
        assert (await client.post("/v1/classify", **image_body(PNG))).status_code == 200


async def test_overload_refuses_an_image_before_it_would_be_decoded(engine: SharedEngine) -> None:
    held = HeldEngine(engine)
    async with serve_in_process(held, max_queue_images=1, max_batch_size=1) as served, served.client() as client:
        accepted = [asyncio.create_task(client.post("/v1/classify", **image_body(PNG)))]
        await served.eventually(lambda: held.batches == 1)
        accepted.append(asyncio.create_task(client.post("/v1/classify", **image_body(PNG))))
        await served.eventually(lambda: served.metric("palisade_queue_images") == 1)
        check_problem(await client.post("/v1/classify", **image_body(b"not an image")), 503)
        held.let_go.set()
        assert [(await request).status_code for request in accepted] == [200, 200]


async def test_a_request_past_its_deadline_is_a_504_that_costs_nothing(engine: SharedEngine) -> None:
    settings = {"request_deadline_ms": 0.001, "limits": "on", "tier_anonymous_limits": "5/day"}
    async with serve_in_process(engine, **settings) as served, served.client() as client:
        check_problem(await client.post("/v1/classify", **image_body(PNG)), 504)
        assert await _left(client) == 5


async def test_a_body_that_never_ends_is_a_408(engine: SharedEngine) -> None:
    async def stalls() -> Any:
        yield PNG[:50]
        await asyncio.Event().wait()

    async with serve_in_process(engine, body_deadline_ms=20) as served, served.client() as client:
        headers = {"Content-Type": "image/png"}
        reply = await client.post("/v1/classify", content=stalls(), headers=headers)
        check_problem(reply, 408)
        assert reply.headers["Connection"] == "close"


async def test_more_bytes_at_a_time_than_memory_is_kept_for_are_a_503(engine: SharedEngine) -> None:
    goes_on = asyncio.Event()

    async def slow() -> Any:
        yield PNG[:-1]
        await goes_on.wait()
        yield PNG[-1:]

    bound = len(PNG) + 10
    async with serve_in_process(engine, max_in_flight_bytes=bound) as served, served.client() as client:
        first = asyncio.create_task(client.post("/v1/classify", content=slow(), headers={"Content-Type": "image/png"}))
        await asyncio.sleep(0)  # its first bytes are taken in this turn of the loop
        await asyncio.sleep(0)
        second = await client.post("/v1/classify", **image_body(PNG))
        check_problem(second, 503)
        goes_on.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/classify", **image_body(PNG))).status_code == 200


async def test_an_instance_that_is_to_stop_is_unready_and_still_answers(engine: SharedEngine) -> None:
    async with serve_in_process(engine) as served, served.client() as client:
        served.service.turn_unready()
        check_problem(await client.get("/readyz"), 503)
        assert served.metric("palisade_ready") == 0
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.post("/v1/classify", **image_body(PNG))).status_code == 200


async def test_a_stopped_instance_refuses_with_a_503(engine: SharedEngine) -> None:
    async with serve_in_process(engine) as served:
        pass
    async with served.client() as client:
        check_problem(await client.get("/readyz"), 503)
        check_problem(await client.post("/v1/classify", **image_body(PNG)), 503)
