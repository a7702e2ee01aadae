"""``palisade-serve run`` as an operator meets it: a process, its exit status and its standard error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import PATIENCE_S, ROOT, RunningServer, eventually
from tests.service.pictures import encode, noise

BAD_CHECKPOINTS = ("damaged", "truncated", "foreign", "pickled")
BAD_SETTINGS = {"port": "abc", "tier_anonymous_limits": "oops"}


# Importing takes seconds, so one process imports and then forks for every command; each child is a process as an operator's.
RUN_ALL = """
import json, os, sys
import service.app, service.engine, service.http_server
from service.cli import main
for name, command in json.load(sys.stdin).items():
    child = os.fork()
    if child == 0:
        for number, path in ((1, command["out"]), (2, command["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(command["environment"])
        sys.exit(main(["run"]))
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


def bad_checkpoints(directory: Path, good: Path) -> dict[str, Path]:
    """Files that are not usable checkpoints, by what is wrong with them."""
    import torch
    from safetensors.torch import save_file

    whole = good.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    paths = {name: directory / f"{name}.safetensors" for name in BAD_CHECKPOINTS}
    paths["damaged"].write_bytes(damaged)
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    save_file({"weight": torch.zeros(2)}, paths["foreign"])
    torch.save({"weight": torch.zeros(2)}, paths["pickled"])
    return paths


class Failures:
    """What commands left behind that were bound to fail; each is its settings."""

    def __init__(self, directory: Path, commands: dict[str, dict[str, str]]) -> None:
        self._directory = directory
        given = {
            name: {
                "out": str(directory / f"{name}.out"),
                "err": str(directory / f"{name}.err"),
                "environment": {f"PALISADE_{key.upper()}": value for key, value in settings.items()},
            }
            for name, settings in commands.items()
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PALISADE_")}
        environment["PALISADE_THREADS"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL],
            cwd=ROOT, env=environment, input=json.dumps(given), capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        self._statuses: dict[str, int] = dict(json.loads(line) for line in done.stdout.splitlines())
        assert self._statuses.keys() == commands.keys(), done.stderr

    def status(self, name: str) -> int:
        return self._statuses[name]

    def errors(self, name: str) -> str:
        return (self._directory / f"{name}.err").read_text()

    def the_line(self, name: str) -> str:
        """The one line on standard error, apart from log lines, of which none may be an error or hold a trace."""
        assert (self._directory / f"{name}.out").read_text() == ""
        lines = self.errors(name).splitlines()
        logged = [json.loads(line) for line in lines if line.startswith("{")]
        assert [line for line in logged if line["level"] in ("error", "critical") or "exception" in line] == []
        (line,) = [line for line in lines if not line.startswith("{")]
        assert line.startswith("palisade-serve: ")
        return line


@pytest.fixture(scope="module")
def failures(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    directory = tmp_path_factory.mktemp("failures")
    good, free = str(checkpoint), {"port": "0", "metrics_port": "0"}
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        commands = {name: {"checkpoint": str(path), **free} for name, path in bad_checkpoints(directory, checkpoint).items()}
        commands |= {name: {"checkpoint": good, **free, name: value} for name, value in BAD_SETTINGS.items()}
        commands["busy port"] = {"checkpoint": good, **free, "port": port}
        commands["busy metrics port"] = {"checkpoint": good, **free, "metrics_port": port}
        return Failures(directory, commands)


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_one_line_that_names_the_file(failures: Failures, name: str) -> None:
    assert failures.status(name) == 1
    assert f"{name}.safetensors" in failures.the_line(name)


def test_a_pickled_checkpoint_is_called_one(failures: Failures) -> None:
    assert "pickle" in failures.the_line("pickled")


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_that_names_the_variable_and_its_value(failures: Failures, name: str) -> None:
    assert failures.status(name) == 2
    line = failures.the_line(name)
    assert f"PALISADE_{name.upper()}" in line
    assert BAD_SETTINGS[name] in line


def test_a_busy_port_stops_the_start_with_an_error(failures: Failures) -> None:
    assert failures.status("busy port") > 0
    assert "address already in use" in failures.errors("busy port")
    assert "Traceback" not in failures.errors("busy port")


def test_a_busy_metrics_port_is_one_line(failures: Failures) -> None:
    assert failures.status("busy metrics port") == 1
    assert "metrics port" in failures.the_line("busy metrics port")


class SlowRequest:
    """A request whose headers the server has taken and whose body is still to come."""

    def __init__(self, port: int, image: bytes) -> None:
        self._image = image
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n"
        self._connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        self._replies = self._connection.makefile("rb")
        assert self._replies.readline().startswith(b"HTTP/1.1 100"), "the server waits for the body: the request is accepted"
        assert self._replies.readline() == b"\r\n"

    def finish(self) -> tuple[bytes, bytes]:
        """Send the body and return the status line and the rest of the reply."""
        with self._connection, self._replies:
            self._connection.sendall(self._image)
            return self._replies.readline(), self._replies.read()


def refuses_connections(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
            return False
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it stopped listening just now
        return True


def answers_and_sends_callers_elsewhere(server: RunningServer, open_before: httpx.Client) -> None:
    """What a service with a long delay does once it was told to stop, however a caller's connection came about."""
    eventually(lambda: httpx.get(f"{server.url}/readyz", timeout=PATIENCE_S).status_code == 503, "it is not ready any more")
    for client in (open_before, open_before, httpx):  # the second time its connection is a new one
        reply = client.post(
            f"{server.url}/v1/classify", content=encode(noise(0)), headers={"Content-Type": "image/png"}, timeout=PATIENCE_S
        )
        assert reply.status_code == 200, reply.text
        assert reply.headers["Connection"] == "close"
    assert httpx.get(f"{server.url}/healthz", timeout=PATIENCE_S).status_code == 200
    assert server.metric("palisade_ready") == 0


def test_after_sigterm_callers_are_sent_elsewhere_until_the_delay_is_over_or_a_second_signal_comes(
    checkpoint: Path, tmp_path: Path
) -> None:
    with (
        RunningServer(tmp_path, checkpoint=str(checkpoint), drain_delay_ms=str(1000 * PATIENCE_S)) as server,
        server.client() as client,
    ):
        assert "Connection" not in client.get("/readyz").headers
        server.process.send_signal(signal.SIGTERM)
        answers_and_sends_callers_elsewhere(server, client)
        slow = SlowRequest(server.port, encode(noise(0)))
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses_connections(server.port), "no new connections are taken")
        status, _ = slow.finish()
        assert status.startswith(b"HTTP/1.1 200")
        assert server.process.wait(PATIENCE_S) == 0


def test_every_request_that_was_accepted_before_sigterm_is_answered(checkpoint: Path, tmp_path: Path) -> None:
    with RunningServer(tmp_path, checkpoint=str(checkpoint), drain_delay_ms="1") as server:
        slow = [SlowRequest(server.port, encode(noise(seed))) for seed in range(8)]
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses_connections(server.port), "no new connections are taken")
        assert server.process.poll() is None
        for request in slow:
            status, rest = request.finish()
            assert status.startswith(b"HTTP/1.1 200")
            assert b'"predictions":[{' in rest
        assert server.process.wait(PATIENCE_S) == 0
    assert [line for line in server.log_lines() if line["level"] in ("error", "critical")] == []


def test_sigterm_before_the_service_is_ready_ends_it_cleanly() -> None:
    """As process 1 of a container it would outlive a signal that it does not handle."""
    code = """
import os, signal, sys
import service.keys
from service.cli import main
service.keys.read_keys = lambda path: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(main(["run"]))
"""
    environment = {**os.environ, "PALISADE_KEYS_FILE": "keys.json", "PALISADE_PORT": "0", "PALISADE_METRICS_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, b"")
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["SIGTERM before the service was ready"]


NOT_FOR_SERVING = ("training", "matplotlib", "scipy", "pandas", "tqdm", "hypothesis", "pytest", "httpx", "rich")


def test_the_service_runs_without_anything_that_only_training_tests_or_clients_need() -> None:
    code = f"""
import sys
for name in {NOT_FOR_SERVING!r}:
    sys.modules[name] = None  # as if it were not installed: importing it fails
import service.app, service.cli, service.coordinator, service.engine, service.frontend, service.http_server, service.tuner
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_neither_a_front_end_nor_the_engine_on_a_processor_loads_torch() -> None:
    program = """
import sys, numpy as np
import service.coordinator, service.frontend
from service.engine import load, predict
from service.metrics import Metrics
from service.settings import Settings
fast_path = load(Settings(device="cpu", max_batch_size=1), Metrics())
assert predict(fast_path, np.zeros((1, 3, 32, 32), np.uint8), True, Metrics()).shape == (1, 10)
assert "torch" not in sys.modules, "torch costs seconds and hundreds of megabytes"
assert "pynvml" not in sys.modules, "there is no GPU to ask about"
"""
    pytest.importorskip("openvino")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
