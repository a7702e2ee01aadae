"""Several workers: they train as one would. Stopping: at a signal, after a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.service.conftest import PATIENCE_S, ROOT
from tests.training import gradients
from training.worker import Stop, Worker


def momenta(folder: Path, workers: int, accumulate: int) -> Path:
    """Return the folder with what so many processes wrote: one momentum for each case of :mod:`tests.training.gradients`."""
    folder.mkdir()
    if workers == 1:
        gradients.main(folder, accumulate)
        return folder
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    command = [sys.executable, *launch, "-m", "tests.training.gradients", str(folder), str(accumulate)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return momenta(tmp_path_factory.mktemp("workers") / "two", 2, 1)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return momenta(tmp_path_factory.mktemp("workers") / "one", 1, 1)


@pytest.mark.parametrize("case", ["frozen-1", "frozen-3", "taught"])
def test_two_workers_have_the_gradients_of_one_on_the_joined_batch(one_worker: Path, two_workers: Path, case: str) -> None:
    one, two = load_file(one_worker / case), load_file(two_workers / case)
    assert one.keys() == two.keys()
    assert len(one) > 100
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert max(gradient.abs().max() for gradient in one.values()) > 0.01


def test_every_worker_is_taught(two_workers: Path) -> None:
    taught, alone = load_file(two_workers / "taught"), load_file(two_workers / "frozen-1")
    assert any((taught[name] - gradient).abs().max() > 0.01 for name, gradient in alone.items())


def test_two_workers_have_the_gradients_of_one_that_accumulates_two_parts(tmp_path: Path, two_workers: Path) -> None:
    parts, two = load_file(momenta(tmp_path / "parts", 1, 2) / "training-1"), load_file(two_workers / "training-1")
    for name, gradient in parts.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


SIGNALLED = """
import signal

from training.worker import started

for number in (signal.SIGINT, signal.SIGTERM):
    before = signal.getsignal(number)
    with started("cpu") as worker, worker.stop.listening():
        assert worker.stop.reason is None
        signal.raise_signal(number)
        assert worker.stop.reason == number.name
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before
print("the second would act")
"""


def test_the_first_signal_is_noted_and_the_second_acts() -> None:
    # In a process of its own: a signal that comes late would end the one that runs the tests.
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "the second would act\n"), done.stderr


def test_time_is_up_after_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("training.worker.time.monotonic", lambda: now)
    stop = Stop(minutes=9)
    now += 9 * 60 - 1
    assert stop.reason is None
    now += 1
    assert stop.reason == "time"
    assert Stop().reason is None


def test_a_worker_alone_agrees_with_itself() -> None:
    worker = Worker(torch.device("cpu"))
    assert worker.first
    assert worker.agreed(3) == 3
