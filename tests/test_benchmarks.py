"""The benchmarks run, at toy size, their tables say what was measured, and their clients count what happened."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, decoding, fast_path, growth, overload, serving_latency, training_throughput
from benchmarks.bare import measure, timed
from benchmarks.client_cost import ANSWER, Answering, serving
from benchmarks.load import OpenLoop, closed_loop, open_loop, probe, schedule, single_images, tensors, write_load
from benchmarks.peers import compare, environments
from benchmarks.running_service import add_settings_option, family, running_service
from model import load_checkpoint
from model.checkpoint import read_header
from model.tensors import stored_shapes
from service.settings import Settings
from tests.service.conftest import PATIENCE_S

ARMS = "baseline;baseline, twice the epochs;CutMix, alpha 1;joint: baseline;joint: logits mixed;joint: top-2 in training"


def run(module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    module.main()  # type: ignore[attr-defined]
    return capsys.readouterr().out.splitlines()


def test_the_ablation_compares_arms_and_goes_on_where_it_stopped(
    colour_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    sizes = ["--width", "4", "--images", "32", "--epochs", "1", "--joint-epochs", "1", "--batch-size", "16", "--holdout", "10"]
    arguments = ["--data", str(colour_file), "--out", str(tmp_path), "--seeds", "2", "--arms", ARMS, *sizes]
    lines = run(ablation, monkeypatch, capsys, arguments)
    rows = json.loads(lines[-1])["rows"]
    assert sorted({row["arm"] for row in rows}) == sorted(ARMS.split(";"))
    assert [row["seed"] for row in rows if row["arm"] == "baseline"] == [0, 1]
    (base,) = [line for line in lines if line.startswith("| baseline | ") and line.endswith(" +0.0 |")]
    assert "+0.0 (+0.0 to +0.0)" in base  # it adds nothing to itself
    assert any(line.startswith("| logits mixed | ") for line in lines)
    written = (tmp_path / "results.jsonl").read_text()
    again = run(ablation, monkeypatch, capsys, arguments)
    assert json.loads(again[-1])["rows"] == rows
    assert (tmp_path / "results.jsonl").read_text() == written


def test_an_arm_of_the_ablation_differs_from_the_baseline_in_one_thing() -> None:
    for arm in (*ablation.SINGLE, *ablation.JOINT):
        changes = [arm.schedule, arm.expert, arm.loss, arm.recipe, arm.activation != "relu", arm.task is not ablation.JointTask]
        assert sum(map(bool, changes)) == (0 if arm.name in (ablation.BASE, ablation.JOINT_BASE) else 1), arm.name


def test_throughput_counts_an_attacks_step_as_two_thirds_of_a_training_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    arguments = ["--device", "cpu", "--widths", "8", "--batch", "2", "--seconds", "0.01"]
    rows = json.loads(run(training_throughput, monkeypatch, capsys, arguments)[-1])["rows"]
    assert [(row["width"], row["dtype"], row["compiled"]) for row in rows] == [(8, "float32", False), (8, "bfloat16", False)]
    for row in rows:
        assert row["attack_flops"] == pytest.approx(row["training_flops"] * 2 / 3, rel=0.05)  # no gradients of parameters
        assert row["training_images_per_s"] > 0
        assert row["share"] > 0


REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nbusy"


def test_a_tensor_request_holds_what_its_header_says() -> None:
    requests = tensors(images=3, count=2, size=(8, 8))
    assert len({*requests.bodies}) == 2
    for rendered, body in zip(requests.rendered(), requests.bodies, strict=True):
        head, _, sent = rendered.partition(b"\r\n\r\n")
        assert sent == body
        assert head.startswith(b"POST /v2/models/palisade/infer HTTP/1.1\r\n")
        assert f"\r\nContent-Length: {len(body)}".encode() in head
        length = int(requests.headers["Inference-Header-Content-Length"])
        (tensor,) = json.loads(body[:length])["inputs"]
        assert (tensor["datatype"], tensor["shape"]) == ("UINT8", [3, 3, 8, 8])
        assert tensor["parameters"]["binary_data_size"] == len(body) - length == 3 * 3 * 8 * 8


def test_arrivals_are_fixed_by_the_seed_and_spread_as_asked() -> None:
    assert schedule(100, 2, "even") == pytest.approx(np.arange(200) / 100)
    due = schedule(1000, 20, "poisson", seed=3)
    assert (due == schedule(1000, 20, "poisson", seed=3)).all()
    assert (due != schedule(1000, 20, "poisson", seed=4)).any()
    assert len(due) == 20_000
    assert due.min() >= 0
    assert due.max() < 20
    gaps = np.diff(due)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)  # exponential gaps deviate by their mean


def test_a_stall_counts_from_when_each_request_was_due() -> None:
    held: list[Answering] = []

    class Stalling(Answering):
        def answer(self, body: bytes) -> None:
            held.append(self)
            if len(held) == 20:  # the last one is here: answer all
                for connection in held:
                    Answering.answer(connection, body)

    with serving(Stalling) as url:
        seen = open_loop(url, single_images(4), 400, 0.05, connections=20, arrivals="even")
    assert seen.statuses() == {200: 20}
    assert seen.connections == 20  # nobody waited for an answer before sending the next request
    assert (seen.latency_ms >= 1000 * (seen.scheduled_s[-1] - seen.scheduled_s)).all()
    assert seen.latency(0) == seen.latency_ms.min()


def test_the_open_loop_keeps_to_its_connections_and_drops_nobody() -> None:
    bodies: list[bytes] = []
    connections = []

    class Counting(Answering):
        def __init__(self) -> None:
            super().__init__()
            connections.append(self)

        def answer(self, body: bytes) -> None:
            bodies.append(body)
            super().answer(body)

    images = single_images(4)
    with serving(Counting) as url:
        seen = open_loop(url, images, 4000, 0.05, connections=2, arrivals="even")
    assert seen.statuses() == {200: 200}
    assert len(connections) == seen.connections == 2
    assert sorted(bodies) == sorted(list(images.bodies) * 50)
    assert seen.client_cpu_us > 0


def test_the_open_loop_tells_answers_refusals_and_losses_apart() -> None:
    answers = [
        ANSWER,
        REFUSAL,
        REFUSAL.replace(b"Retry-After: 1\r\n", b""),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 504 Gateway Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"",  # closes without a word
        ANSWER,
    ]
    left = list(answers)

    class Scripted(Answering):
        def answer(self, body: bytes) -> None:
            assert self.transport is not None
            words = left.pop(0)
            for cut in (words[:30], words[30:50], words[50:]):
                self.transport.write(cut)
            if not words or b"Connection: close" in words:
                self.transport.close()

    with serving(Scripted) as url:
        seen = open_loop(url, single_images(1), 100, len(answers) / 100, connections=1, arrivals="even")
    assert seen.status.tolist() == [200, 503, 503, 200, 504, 0, 200]
    assert seen.retry_after.tolist() == [False, True, False, False, False, False, False]
    assert np.isinf(seen.latency_ms).tolist() == [status == 0 for status in seen.status]
    assert seen.connections == 3


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_the_closed_loop_counts_refusals_apart(tmp_path: Path) -> None:
    sent = {ANSWER: 0, REFUSAL: 0}

    class Alternating(Answering):
        def answer(self, body: bytes) -> None:
            assert self.transport is not None
            words = min(sent, key=sent.__getitem__)
            sent[words] += 1
            self.transport.write(words)

    with serving(Alternating) as url:
        seen = closed_loop(url, write_load(tmp_path, single_images(2)), 1, 1)
    assert sent[REFUSAL] - 2 <= seen.refused <= sent[REFUSAL]  # the last answer may come too late
    assert 0.5 < seen.requests_per_s / seen.refused < 2  # it ran for about a second
    assert seen.broken == 0
    with pytest.raises(RuntimeError, match=f"{seen.refused} requests were refused"):
        seen.all_answered()


def test_a_probe_says_what_the_server_said() -> None:
    class Refusing(Answering):
        def answer(self, body: bytes) -> None:
            assert self.transport is not None
            self.transport.write(REFUSAL.replace(b"Retry-After: 1", b"Connection: close"))

    with serving(Refusing) as url, pytest.raises(RuntimeError, match="POST /v1/classify was answered 503: busy"):
        probe(url, single_images(1))


def test_overload_counts_what_was_answered_in_time_and_judges_it() -> None:
    seen = OpenLoop(
        seconds=2.0,
        scheduled_s=np.array([0.0, 0.5, 1.0, 1.5, 1.9]),
        latency_ms=np.array([100.0, 100.0, 20.0, 40.0, 200.0]),  # the last one is answered after the window
        late_ms=np.zeros(5),
        status=np.array([200, 200, 503, 503, 200]),
        retry_after=np.array([False, False, True, True, False]),
        connections=3,
        client_cpu_us=50.0,
        client_nice=0,
    )
    found = overload.figures(seen, capacity=1.25)
    assert (found["offered_per_s"], found["goodput_per_s"]) == (2.5, 1.0)
    assert found["goodput_over_capacity"] == pytest.approx(0.8)
    assert found["refused_share"] == pytest.approx(0.4)
    assert (found["refused_p50_ms"], found["refused_p99_ms"]) == (40, 40)
    assert all(overload.check([found], [seen.statuses()]).values())
    slow = {**found, "refused_p99_ms": 51.0}
    broken = {**found, "goodput_over_capacity": 0.79, "refused_without_retry_after": 1}
    assert list(overload.check([slow], [{200: 3, 503: 2}]).values()) == [True, False, True, True]
    assert list(overload.check([broken], [{200: 3, 500: 1}]).values()) == [False, True, False, False]
    nobody = {**found, "refused_p99_ms": float("nan")}
    assert not overload.check([nobody], [{200: 3}])["99 % of refusals within 50 ms"]  # nothing was shown


def test_the_tails_bound_is_three_bare_latencies_and_two_milliseconds() -> None:
    assert serving_latency.check_tail(8.0, 2.0) == {"p99_ms": 8.0, "bound_ms": 8.0, "met": True}
    assert not serving_latency.check_tail(8.1, 2.0)["met"]


def test_a_family_is_a_process_and_all_that_descend_from_it() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        try:
            assert {os.getpid(), child.pid, grandchild} <= set(family(os.getpid()))
            assert family(child.pid) == [child.pid, grandchild]
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_a_setting_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no such settings: frontend;"), running_service(frontend=2):
        pass
    parser = argparse.ArgumentParser()
    add_settings_option(parser)
    assert parser.parse_args(["--set", "threads=1", "--set", "top_k=3"]).settings == [("threads", "1"), ("top_k", "3")]
    with pytest.raises(SystemExit):
        parser.parse_args(["--set", "thread=1"])
    assert "'thread=1' is not NAME=VALUE" in capsys.readouterr().err


def test_a_service_tells_what_it_has_done(tmp_path: Path, one_thread: None) -> None:
    path = growth.write_checkpoint(tmp_path / "tiny.safetensors", experts=1)
    images = load_checkpoint(path)
    assert images.architecture.num_experts == 1
    with running_service(checkpoint=path, limits="off", answer_cache_images=0, threads=1) as running:
        before = running.work()
        for _ in range(3):
            probe(running.url, single_images(1))
        done = running.work() - before
        assert (done.images, done.batches) == (3, 3)
        assert done.inference_s > 0
        assert running.peak_memory_mib() > 10
        assert running.start_s > 0
    (row,) = measure(Settings(checkpoint=str(path), threads=1), [2], ["alone"], 0.01)
    assert (row.batch, row.way) == (2, "alone")
    assert row.images_per_s > 0


def test_the_bare_path_counts_the_calls_of_all_threads() -> None:
    together = threading.Barrier(3, timeout=PATIENCE_S)
    calls = itertools.count()

    def call() -> None:
        if next(calls) < 3:
            together.wait()  # passes only when three threads call at a time

    _, took = timed(call, threads=3, seconds=0.01)
    assert next(calls) == len(took) + 9  # three to warm each thread up


def test_growth_varies_one_thing_at_a_time(tmp_path: Path, one_thread: None) -> None:
    rows = growth.cases(["connections", "frontends", "replicas"], tmp_path)
    assert {row.dimension for row in rows} == {"connections", "frontends", "replicas"}
    for row in rows:
        changed = [row.connections != growth.CONNECTIONS, row.replicas != 1, row.settings not in ({}, {"frontends": 1})]
        assert sum(changed) <= 1


def test_both_decoders_make_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    monkeypatch.setattr(decoding, "IMPORTS", ("import json", "import json, numpy"))  # torch takes seconds
    result = json.loads(run(decoding, monkeypatch, capsys, ["--rounds", "1", "--seconds", "0.001", "--images", "1"])[-1])
    for row in result["rows"].values():
        assert row["mean_pixel_difference"]["mean"] < 1
        assert row["pillow"]["min"] > 0
    assert result["resident_mib"]["torchvision"] > result["resident_mib"]["pillow"]


@pytest.mark.parametrize("module", [compare, environments])
def test_the_comparison_says_which_peers_there_are(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(module, monkeypatch, capsys, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(peer in shown for peer in environments.PEERS)


def test_the_fast_path_is_compared_with_the_better_straightforward_loop_of_the_same_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--device",
        "cpu",
        "--batch-sizes",
        "1,2",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--only",
        "openvino-float32-x1",
    ]
    result = json.loads(run(fast_path, monkeypatch, capsys, arguments)[-1])
    for rows in result["images_per_s"].values():
        assert rows.keys() == {"reference-float32", "reference-bfloat16", "openvino-float32-x1"}
        base = max(rows["reference-float32"]["median"], rows["reference-bfloat16"]["median"])
        for name, row in rows.items():
            assert row["ratio"]["median"] == pytest.approx(row["median"] / base)
            yardstick = result["matrix_flop_per_s"][name.split("-")[1]]["median"]
            assert row["share"] == pytest.approx(result["flop_per_image"] * row["median"] / yardstick)
    flop = 0.0
    for name, shape in stored_shapes(read_header("compact").architecture).items():
        if len(shape) == 4:  # a convolution; its output's side follows from where it stands
            found = re.search(r"(features|blocks)\.(\d+)", name)
            side = 32
            if found:
                side = 16 >> int(found[2]) // 3 if found[1] == "features" else 32 >> int(found[2]) // 2
            flop += 2 * math.prod(shape) * side**2
    assert result["flop_per_image"] == pytest.approx(flop, rel=0.001)  # the last layers are next to nothing
