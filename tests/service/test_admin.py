"""The admin interface of real servers: reloads under load, in one process and in several; what is refused; and the command."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.cli import main
from tests.service.conftest import LABELS, PATIENCE_S, RunningServer, eventually
from tests.service.pictures import MULTIPART, encode, multipart, noise, pixels
from tests.service.test_frontends import Family, is_over, stopped

KEY = "0123456789abcdef0123456789abcdef"
IMAGES = 24
ROUNDED = 0.0052  # half of the last decimal, and what two executions of the same weights may differ by


@dataclass(frozen=True)
class Weights:
    """A checkpoint, and what it answers to the pictures of the tests, computed by the reference implementation."""

    path: Path
    version: str
    answers: np.ndarray  # (IMAGES, 10)


@dataclass(frozen=True)
class Zoo:
    """Checkpoints: two that are good and unlike each other, and bad ones by what is wrong with them."""

    folder: Path
    old: Weights
    new: Weights
    bad: dict[str, Path] = field(default_factory=dict)


def weights(path: Path) -> Weights:
    import torch

    from model.checkpoint import load_checkpoint, read_header

    images = torch.from_numpy(np.stack([pixels(noise(seed)) for seed in range(IMAGES)])).float() / 255
    answers = load_checkpoint(path)(images).exp().numpy()
    return Weights(path, read_header(path).weights_sha256[:12], answers)


@pytest.fixture(scope="module")
def zoo(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    import torch

    from model.architecture import Architecture
    from model.checkpoint import Header, load_checkpoint, read_header, save_checkpoint
    from model.mixture import Mixture

    folder = tmp_path_factory.mktemp("zoo")
    header = read_header(checkpoint)
    mixture = load_checkpoint(checkpoint)
    for expert in mixture.experts:
        expert.head.weight.copy_(expert.head.weight.roll(1, dims=0))  # every class gets another one's answers
    save_checkpoint(folder / "new.safetensors", mixture, header)
    zoo = Zoo(folder, weights(checkpoint), weights(folder / "new.safetensors"))
    assert np.abs(zoo.old.answers - zoo.new.answers).max(axis=1).min() > 20 * ROUNDED, "one can tell whose answer it is"

    def save(name: str, header: Header, mixture: Mixture) -> None:
        zoo.bad[name] = folder / f"{name}.safetensors"
        save_checkpoint(zoo.bad[name], mixture, header)

    mixture.gate.head.bias.fill_(torch.nan)
    save("nan", header, mixture)
    small = Architecture(width=4, num_classes=10, height=16, input_width=24)
    save("small", Header(small, LABELS, ""), Mixture(small))
    save("renamed", Header(header.architecture, (*LABELS[:9], "lorry"), ""), load_checkpoint(checkpoint))
    few = Architecture(width=4, num_classes=9, height=32, input_width=32)
    save("few", Header(few, LABELS[:9], ""), Mixture(few))
    voting = Architecture(width=4, num_classes=10, height=32, input_width=32, aggregation="vote")
    save("voting", Header(voting, LABELS, ""), Mixture(voting))
    damaged = bytearray(checkpoint.read_bytes())
    damaged[-1000] ^= 1
    zoo.bad["damaged"] = folder / "damaged.safetensors"
    zoo.bad["damaged"].write_bytes(damaged)
    zoo.bad["missing"] = folder / "missing.safetensors"
    return zoo


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key, for the sockets."""
    folder = tmp_path_factory.mktemp("doors")
    (folder / "key").write_text(KEY)
    return folder


@pytest.fixture(scope="module")
def single(zoo: Zoo, doors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One process, batches of eight, answers cached, and both doors to the admin routes."""
    with RunningServer(
        tmp_path_factory.mktemp("single"), checkpoint=str(zoo.old.path), precision="float32", max_batch_size="8", limits="off",
        admin_socket=str(doors / "single"), admin_port="0", admin_key_file=str(doors / "key"),
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def family(zoo: Zoo, doors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """Two front ends and an engine of two lanes."""
    with Family(
        tmp_path_factory.mktemp("family"), checkpoint=str(zoo.old.path), precision="float32", max_batch_size="8", limits="off",
        frontends="2", threads="2", admin_socket=str(doors / "family"),
    ) as running:  # fmt: skip
        yield running


@contextmanager
def admin(doors: Path, name: str) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(doors / name))
    with httpx.Client(transport=transport, base_url="http://palisade", timeout=PATIENCE_S) as client:
        yield client


def load(door: httpx.Client, checkpoint: Path) -> dict[str, Any]:
    reply = door.post("/reload", json={"checkpoint": str(checkpoint)})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def classify(client: httpx.Client, seeds: list[int]) -> tuple[str, np.ndarray]:
    """The version and the scores (N, C) of an answer by v1."""
    body = multipart(*(encode(noise(seed)) for seed in seeds))
    reply = client.post("/v1/classify", content=body, headers={"Content-Type": MULTIPART})
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    return answer["version"], np.array([[each["scores"][label] for label in LABELS] for each in answer["predictions"]])


def infer(client: httpx.Client, seeds: list[int], version: str) -> tuple[str, np.ndarray] | None:
    """The same by v2, from this version only; ``None`` when it is not served."""
    data = np.stack([pixels(noise(seed)) for seed in seeds])
    tensor = {"name": "images", "datatype": "UINT8", "shape": data.shape, "data": data.ravel().tolist()}
    reply = client.post(f"/v2/models/palisade/versions/{version}/infer", json={"inputs": [tensor]})
    if reply.status_code == 404:
        assert version in reply.json()["error"]
        return None
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    (scores,) = [output["data"] for output in answer["outputs"] if output["name"] == "probabilities"]
    return answer["model_version"], np.array(scores).reshape(len(seeds), -1)


class Load:
    """Callers who never stop, each checking every answer against the weights that it names."""

    def __init__(self, server: RunningServer, zoo: Zoo) -> None:
        self._server = server
        self._answers = {each.version: each.answers for each in (zoo.old, zoo.new)}
        self._over = Event()
        self._tasks: list[Future[None]] = []
        self.answered: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # of v2, whose version was not served

    def wait(self, version: str) -> None:
        """Return when every kind of caller has been answered some more by this version."""
        before = self.answered.copy()
        kinds = [f"{kind} {version}" for kind in ("many", "single", "pinned")]

        def is_enough() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()  # says why
            return all(self.answered[kind] >= before[kind] + 3 for kind in kinds)

        eventually(is_enough, f"{version} answers everybody")

    @contextmanager
    def running(self) -> Iterator[None]:
        callers = (self._many, self._single, self._single, self._pinned)
        with ThreadPoolExecutor(len(callers)) as threads:
            self._tasks = [threads.submit(self._call, caller) for caller in callers]
            try:
                yield
            finally:
                self._over.set()
            for task in self._tasks:
                task.result()

    def _call(self, caller: Callable[[httpx.Client, int], None]) -> None:
        with self._server.client() as client:
            turn = 0
            while not self._over.is_set():
                caller(client, turn)
                turn += 1

    def _check(self, kind: str, seeds: list[int], version: str, scores: np.ndarray) -> None:
        np.testing.assert_allclose(scores, self._answers[version][seeds], atol=ROUNDED, err_msg=f"{kind} {version}")
        self.answered[f"{kind} {version}"] += 1

    def _many(self, client: httpx.Client, turn: int) -> None:
        seeds = [(turn + each) % IMAGES for each in range(20)]  # more than two batches
        self._check("many", seeds, *classify(client, seeds))

    def _single(self, client: httpx.Client, turn: int) -> None:
        self._check("single", [turn % IMAGES], *classify(client, [turn % IMAGES]))

    def _pinned(self, client: httpx.Client, turn: int) -> None:
        version, seed = list(self._answers)[turn % 2], turn // 2 % IMAGES
        answer = infer(client, [seed], version)
        if answer is None:
            self.refused[version] += 1
        else:
            assert answer[0] == version
            self._check("pinned", [seed], *answer)


def reload_to_and_fro(server: RunningServer, door: httpx.Client, zoo: Zoo) -> None:
    load_ = Load(server, zoo)
    with load_.running():
        load_.wait(zoo.old.version)
        for each, before in ((zoo.new, zoo.old), (zoo.old, zoo.new)):
            outcome = load(door, each.path)
            assert (outcome["outcome"], outcome["version"], outcome["previous"]) == ("done", each.version, before.version)
            load_.wait(each.version)
            assert load_.refused[before.version] > 0


def test_a_reload_under_load_fails_nobody_and_every_answer_is_of_the_weights_it_names(
    single: RunningServer, zoo: Zoo, doors: Path
) -> None:
    with admin(doors, "single") as door:
        reload_to_and_fro(single, door, zoo)


def test_the_same_with_several_front_ends(family: Family, zoo: Zoo, doors: Path) -> None:
    front_ends = family.pids("frontend")
    with admin(doors, "family") as door:
        reload_to_and_fro(family, door, zoo)
        processes = door.get("/status").json()["processes"]
    assert processes == {"coordinator": family.process.pid, "engine": family.engine(), "front_ends": front_ends}
    assert [line for line in family.log_lines() if line["level"] in ("error", "critical")] == []


def says(client: httpx.Client) -> dict[str, Any]:
    """What a server says everywhere of its model's version."""
    return {
        "v1": client.get("/v1/model").json()["version"],
        "v2": client.get("/v2/models/palisade").json()["versions"],
        "statistics": client.get("/v2/models/palisade/stats").json()["model_stats"][0]["version"],
    }


def all_say(version: str) -> dict[str, Any]:
    return {"v1": version, "v2": [version], "statistics": version}


def test_everything_that_names_the_version_follows(single: RunningServer, zoo: Zoo, doors: Path) -> None:
    with single.client() as client, admin(doors, "single") as door:
        load(door, zoo.new.path)
        assert says(client) == all_say(zoo.new.version)
        assert client.get(f"/v2/models/palisade/versions/{zoo.new.version}").status_code == 200
        assert client.get(f"/v2/models/palisade/versions/{zoo.old.version}").status_code == 404
        assert single.metric("palisade_model_info") == single.metric("palisade_model_info", version=zoo.new.version) == 1
        status = door.get("/status").json()
        assert status["model"]["version"] == zoo.new.version
        assert status["model"]["weights_sha256"].startswith(zoo.new.version)
        assert status["model"]["path"] == status["last_reload"]["checkpoint"] == str(zoo.new.path)
        back = door.post("/reload")
        assert back.json()["checkpoint"] == str(zoo.old.path), "the one of the settings"
        assert says(client) == all_say(zoo.old.version)
        load(door, zoo.old.path)
        assert single.metric("palisade_model_info") == single.metric("palisade_model_info", version=zoo.old.version) == 1


REFUSALS = {
    "missing": (422, "no such checkpoint file"),
    "damaged": (422, "the tensors hash to"),
    "nan": (422, "tensor 'gate.head.bias' holds NaN"),
    "small": (409, "its input size is 16 x 24 pixels, that of the model in use is 32 x 32"),
    "renamed": (409, "its class 9 is called 'lorry', in the model in use 'truck'"),
    "few": (409, "it has 9 classes, the model in use 10"),
    "voting": (409, "its experts vote, 9 of them, those of the model in use are weighed by a gate"),
}


def refuse_all(server: RunningServer, door: httpx.Client, zoo: Zoo) -> None:
    in_use = zoo.old
    load(door, in_use.path)
    with server.client() as client:
        for name, (status, words) in REFUSALS.items():
            reply = door.post("/reload", json={"checkpoint": str(zoo.bad[name])})
            assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json"), reply.text
            detail = reply.json()["detail"]
            assert words in detail
            assert str(zoo.bad[name]) in detail, "it names the file"
            last = door.get("/status").json()["last_reload"]
            assert (last["outcome"], last["detail"], last["version"]) == ("refused", detail, in_use.version)
            version, scores = classify(client, [1, 2])
            assert version == in_use.version
            np.testing.assert_allclose(scores, in_use.answers[[1, 2]], atol=ROUNDED)


def test_a_checkpoint_that_cannot_be_used_changes_nothing_and_the_answer_says_why(
    single: RunningServer, zoo: Zoo, doors: Path
) -> None:
    with admin(doors, "single") as door:
        refuse_all(single, door, zoo)


def test_the_same_in_an_engine_process(family: Family, zoo: Zoo, doors: Path) -> None:
    with admin(doors, "family") as door:
        refuse_all(family, door, zoo)
        assert family.engine() == door.get("/status").json()["processes"]["engine"], "no other one is left running"


def test_processes_that_die_come_back_with_the_model_that_was_in_use_whatever_became_of_its_file(
    family: Family, zoo: Zoo, doors: Path
) -> None:
    path = shutil.copy(zoo.new.path, zoo.folder / "passing.safetensors")
    with admin(doors, "family") as door:
        load(door, path)
        path.write_bytes(zoo.bad["damaged"].read_bytes())
        assert door.post("/reload", json={"checkpoint": str(path)}).status_code == 422
        engine, front_ends = family.engine(), family.pids("frontend")
        for pid in (engine, front_ends[0]):
            os.kill(pid, signal.SIGKILL)

        def is_whole() -> bool:
            status = door.get("/status").json()
            return status["ready"] and engine != status["processes"]["engine"] and len(family.pids("frontend")) == 2

        eventually(is_whole, "all processes are back")
        for pid in family.pids("frontend"):
            with closing(family.client_of(pid)) as client:
                eventually(lambda client=client: client.get("/readyz").status_code == 200, "the front end knows")  # type: ignore[misc]
                assert says(client) == all_say(zoo.new.version)
                version, scores = classify(client, [3, 4, 5])
                assert version == zoo.new.version
                np.testing.assert_allclose(scores, zoo.new.answers[[3, 4, 5]], atol=ROUNDED)


@pytest.mark.parametrize("body", [b"[]", b'{"checkpoint": 1}', b'{"checkpoint": ""}', b'{"other": "x"}', b"\xff"])
def test_a_body_that_is_no_request_is_400(single: RunningServer, doors: Path, body: bytes) -> None:
    with admin(doors, "single") as door:
        before = door.get("/status").json()["last_reload"]
        reply = door.post("/reload", content=body)
        assert (reply.status_code, reply.json()["type"]) == (400, "urn:palisade:problem:bad-input")
        assert door.get("/status").json()["last_reload"] == before


def test_unknown_paths_and_methods_are_problems_too(single: RunningServer, doors: Path) -> None:
    with admin(doors, "single") as door:
        for reply, status in ((door.get("/metrics"), 404), (door.get("/reload"), 405)):
            assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
            assert reply.json()["status"] == status


ROUTES = (("GET", "/status"), ("POST", "/reload"), ("GET", "/suspects"), ("POST", "/suspects/forgive"))


def admin_port(single: RunningServer) -> str:
    (line,) = [line["message"] for line in single.log_lines() if line["message"].startswith("admin on http")]
    return str(line.removeprefix("admin on "))


def test_the_port_needs_the_key(single: RunningServer) -> None:
    url = admin_port(single)
    assert url.startswith("http://127.0.0.1:")
    wrong = [
        {},
        {"Authorization": f"Bearer {KEY}0"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Basic {KEY}"},
    ]
    wrong += [{"Authorization": KEY}, {"Authorization": "Bearer"}, {"X-API-Key": KEY}]
    for headers in wrong:
        for method, path in ROUTES:
            reply = httpx.request(method, url + path, headers=headers, timeout=PATIENCE_S)
            assert (reply.status_code, reply.headers["content-type"]) == (401, "application/problem+json"), headers
            assert KEY not in reply.text
    assert httpx.get(f"{url}/status", headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S).json()["ready"] is True
    assert KEY not in single.log_text()


def test_nothing_of_it_is_reachable_on_the_other_ports(single: RunningServer, doors: Path) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    metrics = f"http://127.0.0.1:{single._metrics_port}"
    with admin(doors, "single") as door:
        before = door.get("/status").json()["last_reload"]
        for method, path in ROUTES:
            for prefix in ("", "/admin", "/v1", "/v2"):
                reply = httpx.request(method, single.url + prefix + path, headers=headers, json={}, timeout=PATIENCE_S)
                assert reply.status_code in (404, 405), f"{prefix}{path}"
            assert "uptime_s" not in httpx.request(method, metrics + path, headers=headers, timeout=PATIENCE_S).text
        assert door.get("/status").json()["last_reload"] == before


@pytest.fixture
def at_single(single: RunningServer, doors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are for the server in one process."""
    monkeypatch.setenv("PALISADE_ADMIN_SOCKET", str(doors / "single"))


@pytest.mark.usefixtures("at_single")
def test_the_command_reloads_a_file_of_the_folder_that_it_is_called_in(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(zoo.folder)
    assert main(["admin", "reload", "new.safetensors"]) == 0
    assert f"version {zoo.new.version} answers" in capsys.readouterr().out
    assert main(["admin", "status"]) == 0
    shown = capsys.readouterr().out
    assert zoo.new.version in shown
    assert str(zoo.new.path) in shown
    assert main(["admin", "reload", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == zoo.old.version


@pytest.mark.usefixtures("at_single")
def test_the_command_says_why_a_reload_is_refused(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["admin", "reload", str(zoo.bad["nan"])]) == 1
    said = capsys.readouterr()
    assert "holds NaN" in said.err
    assert said.out == ""
    assert main(["admin", "reload", str(zoo.bad["nan"]), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == 422


@pytest.mark.usefixtures("at_single")
def test_the_command_lists_and_forgives_suspects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["admin", "suspects"]) == 0
    assert capsys.readouterr().out == "nobody is suspected\n"
    assert main(["admin", "suspects", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"suspects": []}
    assert main(["admin", "forgive", "192.0.2.7"]) == 1
    assert "192.0.2.7 is not suspected" in capsys.readouterr().err


def test_the_command_asks_the_port_with_the_key(
    single: RunningServer, doors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--url", admin_port(single), "--json"]
    assert main(["admin", "status", *where, "--key-file", str(doors / "key")]) == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True
    (tmp_path / "wrong").write_text("f" * 32)
    assert main(["admin", "status", *where, "--key-file", str(tmp_path / "wrong")]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == 401


def test_a_port_that_is_none_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PALISADE_ADMIN_PORT", "abc")
    monkeypatch.setenv("PALISADE_ADMIN_KEY_FILE", "key")
    assert main(["admin", "status"]) == 2
    assert "127.0.0.1:abc" in capsys.readouterr().err


def test_a_key_that_cannot_be_sent_is_not_shown(
    single: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n{KEY[::-1]}\n")
    where = ["--url", admin_port(single), "--key-file", str(tmp_path / "key")]
    for more in ([], ["--json"]):
        assert main(["admin", "status", *where, *more]) == 1
        said = capsys.readouterr()
        assert str(tmp_path / "key") in said.err
        for secret in (KEY, KEY[::-1]):
            assert secret not in said.out + said.err


@pytest.mark.usefixtures("at_single")
def test_a_name_that_json_cannot_hold_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["reload", "/models/\udcff.safetensors"], ["forgive", "\udcff"]):
        assert main(["admin", *arguments]) == 2
        assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "PALISADE_ADMIN_SOCKET"),
        (["--url", "http://127.0.0.1:9"], 2, "--key-file"),
        (["--url", "http://192.0.2.1:8003", "--key-file", "key"], 2, "own machine only"),
        (["--url", "http://127.0.0.1:9", "--key-file", "missing"], 1, "missing: the admin key cannot be read"),
        (["--socket", "missing.sock"], 1, "missing.sock: there is no such socket"),
        (["--url", "http://127.0.0.1:abc", "--key-file", "key"], 2, "127.0.0.1:abc: the admin port"),
        (["--url", "http://127.0.0.1:65536", "--key-file", "key"], 2, "127.0.0.1:65536: the admin port"),
        (["--url", "http://127.0.0.1:80/\x7f", "--key-file", "key"], 2, "the admin port"),
    ],
)
def test_the_command_says_what_it_needs(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["admin", "status", *arguments]) == status
    assert words in capsys.readouterr().err


def search(client: httpx.Client, seed: int, steps: int) -> list[int]:
    """The statuses of pictures that differ by one grain each, as a search for an adversarial one sends them."""
    image = np.array(noise(seed))
    statuses = []
    for step in range(steps):
        image[step % 32, step // 32] ^= 8
        statuses.append(client.post("/v1/classify", files={"file": encode(Image.fromarray(image))}).status_code)
    return statuses


def test_suspects_are_listed_and_forgiven_and_outlast_a_reload_and_the_socket_goes_with_the_service(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "admin.sock"
    monkeypatch.setenv("PALISADE_ADMIN_SOCKET", str(path))
    with RunningServer(
        tmp_path, checkpoint=str(zoo.old.path), precision="float32", admin_socket=str(path), tier_anonymous_limits="",
        watch_sequence_images="5", watch_distances="off",
    ) as server:  # fmt: skip
        with server.client("127.0.2.1") as client:
            assert 429 in search(client, 1, 12)
            assert main(["admin", "reload", str(zoo.new.path)]) == 0
            assert classify(client, [20])[0] == zoo.new.version, "other pictures are answered"
            capsys.readouterr()
            assert main(["admin", "suspects"]) == 0
            shown = capsys.readouterr().out
            assert "127.0.2.1" in shown
            assert "near-duplicates" in shown
            assert main(["admin", "suspects", "--json"]) == 0
            (suspect,) = json.loads(capsys.readouterr().out)["suspects"]
            assert (suspect["caller"], suspect["detector"]) == ("127.0.2.1", "near-duplicates")
            assert suspect["images"] >= 1
            assert main(["admin", "forgive", "127.0.2.1"]) == 0
            assert capsys.readouterr().out == "127.0.2.1 is forgiven\n"
            assert main(["admin", "suspects"]) == 0
            assert capsys.readouterr().out == "nobody is suspected\n"
            assert search(client, 1, 3) == [200] * 3
        assert path.is_socket()
        assert server.stop() == 0
    assert not path.exists()


@contextmanager
def reloading(family: Family, door: httpx.Client, checkpoint: Path) -> Iterator[tuple[int, Future[httpx.Response]]]:
    """A reload whose engine has been started and held: its number, and what the reload will be answered."""
    before = family.pids("engine_process")
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(door.post, "/reload", json={"checkpoint": str(checkpoint)})
        eventually(lambda: len(family.pids("engine_process")) == len(before) + 1, "another engine is being loaded")
        (engine,) = set(family.pids("engine_process")) - set(before)
        with stopped(engine):
            yield engine, answer


def test_an_engine_that_is_killed_while_it_loads_does_not_take_the_place_of_the_other(
    family: Family, zoo: Zoo, doors: Path
) -> None:
    with admin(doors, "family") as door, family.client() as client:
        load(door, zoo.old.path)
        with reloading(family, door, zoo.new.path) as (engine, answer):
            os.kill(engine, signal.SIGKILL)
            reply = answer.result(PATIENCE_S)
        assert (reply.status_code, reply.json()["type"]) == (503, "urn:palisade:problem:reload-failed"), reply.text
        status = door.get("/status").json()
        assert (status["ready"], status["reloading"], status["last_reload"]["outcome"]) == (True, False, "refused")
        assert classify(client, [1])[0] == zoo.old.version


def test_an_engine_that_is_killed_while_another_loads_is_replaced_by_that(family: Family, zoo: Zoo, doors: Path) -> None:
    with admin(doors, "family") as door, family.client() as client:
        load(door, zoo.old.path)
        old = family.engine()
        with reloading(family, door, zoo.new.path) as (_, answer):
            os.kill(old, signal.SIGKILL)
            eventually(lambda: not door.get("/status").json()["ready"], "it is noticed")
        assert answer.result(PATIENCE_S).json()["outcome"] == "done"
        eventually(lambda: door.get("/status").json()["ready"], "the new one answers")
        version, scores = classify(client, [1, 2])
        assert version == zoo.new.version
        np.testing.assert_allclose(scores, zoo.new.answers[[1, 2]], atol=ROUNDED)
        eventually(lambda: len(family.pids("engine_process")) == 1, "nothing is left of the old one")


def test_processes_that_cannot_be_started_again_are_tried_again(family: Family, zoo: Zoo, doors: Path) -> None:
    front_ends, engine, parent = family.pids("frontend"), family.engine(), family.process.pid
    begin = len(family.log_text())
    usual = resource.prlimit(parent, resource.RLIMIT_NOFILE)
    resource.prlimit(parent, resource.RLIMIT_NOFILE, (3, usual[1]))  # as if others had used up all open files
    try:
        for pid in (engine, front_ends[0]):
            os.kill(pid, signal.SIGKILL)
        for words in ("the engine cannot be started again", "a front end cannot be started"):
            eventually(lambda words=words: words in family.log_text()[begin:], words)  # type: ignore[misc]
    finally:
        resource.prlimit(parent, resource.RLIMIT_NOFILE, usual)
    with admin(doors, "family") as door, family.client() as client:
        eventually(lambda: bool(door.get("/status").json()["ready"]), "the engine is back")
        eventually(lambda: len(family.pids("frontend")) == 2, "the front end is back")
        assert classify(client, [1])[0] == door.get("/status").json()["model"]["version"]


def test_sigterm_does_not_wait_for_a_reload(family: Family, zoo: Zoo, doors: Path) -> None:
    """The last test of this server."""
    with admin(doors, "family") as door, reloading(family, door, zoo.new.path) as (engine, answer):
        assert family.stop() == 0, "though the engine that is being loaded says nothing"
        assert is_over(engine)
        assert isinstance(answer.exception(PATIENCE_S), httpx.TransportError) or answer.result().status_code >= 500
