"""Certificates of a vote, as callers of the service see them, or don't."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.certificate import read_votes, tolerated_partitions
from model.checkpoint import read_header
from service.cli import main
from service.metrics import Metrics
from service.openapi import Answer, ModelView
from service.settings import Settings
from tests.service.conftest import LABELS, SharedEngine, serve_in_process
from tests.service.v2.messages import reply_tensors

SEEN = {"tier_anonymous_certificate": True, "tier_anonymous_decimals": 6}
INFER = "/v2/models/palisade/infer"


@pytest.fixture(scope="module")
def ballot(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' checkpoint, whose experts vote; five of them are of one opinion, so that there are majorities."""
    import torch

    from model.checkpoint import load_checkpoint, save_checkpoint
    from model.mixture import Mixture

    header = read_header(checkpoint)
    architecture = replace(header.architecture, aggregation="vote")
    mixture = Mixture(architecture).eval()
    mixture.experts.load_state_dict(load_checkpoint(checkpoint).experts.state_dict())
    inputs = mixture.normalise(torch.from_numpy(pictures()).float() / 255)
    with torch.no_grad():
        for expert in mixture.experts:
            expert.head.bias -= expert(inputs).mean(dim=0)  # or it would say the same of every picture
    for expert in mixture.experts[1:5]:
        expert.load_state_dict(mixture.experts[0].state_dict())
    path = tmp_path_factory.mktemp("ballot") / "ballot.safetensors"
    save_checkpoint(path, mixture, replace(header, architecture=architecture, data={"partitions": 9}))
    return path


@pytest.fixture(scope="module")
def voters(ballot: Path) -> Iterator[SharedEngine]:
    from service.engine import Engine

    real = Engine(Settings(checkpoint=str(ballot), device="cpu", precision="float32", max_batch_size=8), Metrics())
    yield SharedEngine(real)
    real.close()


def pictures(count: int = 24) -> np.ndarray:
    """Coloured patches ``(N, 3, 32, 32)`` uint8, on which the experts are not all of one opinion."""
    generator = np.random.default_rng(5)
    patches: np.ndarray = generator.integers(0, 256, (count, 3, 2, 2)).repeat(16, axis=2).repeat(16, axis=3).astype(np.uint8)
    return patches


def as_v2(outputs: list[str] | None = None, **more: Any) -> dict[str, Any]:
    images = pictures()
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
    return {"inputs": [tensor], **more, **({"outputs": [{"name": name} for name in outputs]} if outputs else {})}


def as_v1() -> list[tuple[str, tuple[str, bytes, str]]]:
    import io

    from PIL import Image

    files = []
    for index, image in enumerate(pictures()):
        data = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(data, "PNG")
        files.append(("file", (f"{index}.png", data.getvalue(), "image/png")))
    return files


@pytest.fixture(scope="module")
def expected(ballot: Path) -> tuple[list[int], list[int]]:
    """The labels and the tolerated partitions of the pictures, from every expert's own answer."""
    import torch

    from model.checkpoint import load_checkpoint

    mixture = load_checkpoint(ballot)
    inputs = torch.from_numpy(pictures()).float() / 255
    answers = mixture.components(inputs)[1].numpy()  # (N, E, C)
    counts = np.sort([np.bincount(row, minlength=10) for row in answers.argmax(axis=2)], axis=1)
    tolerated = [max(0, (int(row[-1] - row[-2]) - 1) // 2) for row in counts]
    assert any(tolerated)
    return mixture(inputs).argmax(dim=1).tolist(), tolerated


@pytest.fixture(scope="module")
def means(ballot: Path, expected: tuple[list[int], list[int]]) -> np.ndarray:
    """What scores without votes are, ``(N, 10)``: means of the experts' probabilities, the answer's lifted to the largest."""
    import torch

    from model.checkpoint import load_checkpoint

    mixture, inputs = load_checkpoint(ballot), torch.from_numpy(pictures()).float() / 255
    scores: np.ndarray = mixture.components(inputs)[1].exp().double().mean(dim=1).numpy()
    for row, label in zip(scores, expected[0], strict=True):
        row[label] = row.max()
        row /= row.sum()
    shares = mixture(inputs).exp().numpy()
    assert np.abs(scores - shares).max(axis=1).min() > 0.02, "one can tell them from shares of votes"
    return scores


def check_means(plain: httpx.Response, tensors: httpx.Response, means: np.ndarray) -> None:
    """Compare what both protocols show with the means, rounded to two decimals."""
    predictions = plain.json()["predictions"]
    (flat,) = [output["data"] for output in tensors.json()["outputs"] if output["name"] == "probabilities"]
    by_name = np.array([[prediction["scores"][name] for name in LABELS] for prediction in predictions])
    for scores in (by_name, np.array(flat).reshape(means.shape)):
        np.testing.assert_allclose(scores, means, rtol=0, atol=0.0051)


async def test_every_protocol_gives_the_certificate_that_the_experts_answers_have(
    voters: SharedEngine, expected: tuple[list[int], list[int]]
) -> None:
    async with serve_in_process(voters, **SEEN) as served, served.client() as client:
        plain = await client.post("/v1/classify", files=as_v1())
        told = await client.post(INFER, json=as_v2())
        binary = await client.post(INFER, json=as_v2(["tolerated_partitions"], parameters={"binary_data_output": True}))
        model, metadata, configuration = [
            (await client.get(path)).json() for path in ("/v1/model", "/v2/models/palisade", "/v2/models/palisade/config")
        ]
    labels, tolerated = expected
    predictions = plain.json()["predictions"]
    assert [prediction["index"] for prediction in predictions] == labels
    assert [prediction["certificate"] for prediction in predictions] == [{"tolerated_partitions": r} for r in tolerated]
    assert Answer.model_validate(plain.json()).predictions[0].certificate
    outputs = {output["name"]: output for output in told.json()["outputs"]}
    assert list(outputs) == ["probabilities", "class_id", "tolerated_partitions"]
    assert outputs["tolerated_partitions"] == {
        "name": "tolerated_partitions",
        "datatype": "INT64",
        "shape": [24],
        "data": tolerated,
    }
    tensors = reply_tensors(binary.content, binary.headers)
    assert {name: values.tolist() for name, values in tensors.items()} == {"tolerated_partitions": tolerated}
    assert model["certificate"] == {"partitions": 9}
    assert ModelView.model_validate(model).certificate
    assert metadata["outputs"][-1] == {"name": "tolerated_partitions", "datatype": "INT64", "shape": [-1]}
    assert configuration["output"][-1]["name"] == "tolerated_partitions"
    scores = np.array([[prediction["scores"][name] for name in model["labels"]] for prediction in predictions])
    assert tolerated_partitions(read_votes(scores, 9)).tolist() == tolerated  # who sees it, sees the votes


@pytest.mark.parametrize(
    "settings",
    [{}, {**SEEN, "tier_anonymous_label_only": True}],
    ids=["by default", "under label only"],
)
async def test_a_tier_that_is_not_shown_certificates_finds_no_trace_of_them(
    voters: SharedEngine, means: np.ndarray, settings: dict[str, Any]
) -> None:
    async with serve_in_process(voters, **settings) as served, served.client() as client:
        replies = [
            await client.post("/v1/classify", files=as_v1()),
            await client.post(INFER, json=as_v2()),
            await client.get("/v1/model"),
            await client.get("/v2/models/palisade"),
            await client.get("/v2/models/palisade/config"),
        ]
        named = await client.post(INFER, json=as_v2(["class_id", "tolerated_partitions"]))
    for reply in replies:
        assert reply.status_code == 200
        assert "tolerated" not in reply.text
        assert "certificate" not in reply.text
    if settings:
        assert not any("scores" in reply.text or "probabilities" in reply.text for reply in replies)
    else:
        check_means(replies[0], replies[1], means)
    assert named.status_code == 403
    assert named.json() == {
        "error": "output 'tolerated_partitions' is not shown to your tier; ask for 'class_id', or name no outputs"
    }


async def test_a_mixture_with_a_gate_has_no_certificates(engine: SharedEngine) -> None:
    async with serve_in_process(engine, **SEEN) as served, served.client() as client:
        replies = [await client.post("/v1/classify", files=as_v1()), await client.get("/v1/model")]
        named = await client.post(INFER, json=as_v2(["tolerated_partitions"]))
    assert not any("certificate" in reply.text for reply in replies)
    assert named.status_code == 400
    assert "the outputs are 'probabilities' and 'class_id'" in named.json()["error"]


async def test_a_vote_of_experts_that_shared_their_data_has_no_certificates(
    voters: SharedEngine, means: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voters, "header", replace(voters.header, data={}))
    async with serve_in_process(voters, tier_anonymous_certificate=True) as served, served.client() as client:
        replies = [
            await client.post("/v1/classify", files=as_v1()),
            await client.post(INFER, json=as_v2()),
            await client.get("/v1/model"),
            await client.get("/v2/models/palisade"),
        ]
        named = await client.post(INFER, json=as_v2(["tolerated_partitions"]))
    assert not any("certificate" in reply.text or "tolerated" in reply.text for reply in replies)
    check_means(replies[0], replies[1], means)
    assert named.status_code == 400
    assert "the outputs are 'probabilities' and 'class_id'" in named.json()["error"]


def test_only_the_trusted_tier_is_shown_them_by_default_and_suspects_never() -> None:
    shown = {tier for tier, policy in Settings().policies().items() if policy.shows_certificates}
    assert shown == {"trusted"}
    everybody = Settings(tier_anonymous_certificate=True, tier_standard_certificate=True)
    assert not everybody.policies()["suspect"].shows_certificates


def test_the_card_says_what_the_certificate_means(ballot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ballot)]) == 0
    rows = {line[:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()}
    assert "9 ResNet-18 experts of width 4, who vote; " in rows["architecture"]
    assert "gate" not in rows["architecture"]
    assert "inserted, removed or relabelled" in rows["certificate"]
    assert main(["inspect", str(ballot), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certified"] is True
    assert main(["inspect", "compact", "--no-verify"]) == 0
    assert "certificate" not in capsys.readouterr().out


def test_predicting_offline_tells_the_certificate(
    ballot: Path, expected: tuple[list[int], list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, data, _ in (file for _, file in as_v1()):
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_bytes(data)
    assert main(["predict", "--checkpoint", str(ballot), "--precision", "float32", "--device", "cpu", "--json", *paths]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["certificate"]["tolerated_partitions"] for line in lines] == expected[1]
