"""A server with all its processes: started on a free port of the loopback address, measured, and ended to the last one."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import Requests
from benchmarks.peers.contenders import Contender
from benchmarks.running_service import family

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 15.0
POLL_S = 0.05
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: Without a slash at the end.
        start_s: From exec to the first answer.
        others: Processes of this one's family that are no part of the server.
    """

    url: str
    start_s: float
    others: frozenset[int]

    def memory_mib(self) -> float:
        """Return the resident memory of all its processes; what they share counts once."""
        return sum(_proportional_kib(pid) for pid in _members(self.others)) / 1024


@contextmanager
def started(contender: Contender, model: Path, requests: Requests) -> Iterator[Server]:
    """Start a server, wait until it answers the first request, and end all its processes afterwards.

    Orphans of the server become children of this process, so that none escapes.

    Raises:
        RuntimeError: It stopped, or did not answer 200 in time; the message has the end of its log.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    others = frozenset(family(os.getpid()))
    with (
        tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+", errors="replace") as log,
    ):
        values = {"port": _free_port(), "folder": folder}
        program, *arguments = (part.format(**values) for part in contender.command)
        environment = {name: value.format(**values) for name, value in contender.environment.items()}
        common = {"PEER_MODEL": str(model), "PEER_PORT": str(values["port"]), "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1"}
        command = [str(contender.programs() / program), *arguments]
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **common, **environment}, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{values['port']}"
            problem = _wait(url, requests, process, begun + START_DEADLINE_S)
            if problem:
                log.seek(0)
                end = "".join(log.readlines()[-30:])
                raise RuntimeError(f"{contender.name} did not start ({problem}); the end of its log:\n{end}")
            yield Server(url, time.perf_counter() - begun, others)
        finally:
            _end(process, others)


def ask(url: str, requests: Requests, number: int) -> Any:
    """Send one request and return the answer, parsed from JSON."""
    request = urllib.request.Request(url + requests.path, requests.bodies[number], requests.headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def _wait(url: str, requests: Requests, process: subprocess.Popen[bytes], deadline: float) -> str | None:
    """Return ``None`` as soon as the server answers, or what was wrong."""
    problem = "it did not answer"
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            return f"it ended with status {process.returncode}"
        try:
            ask(url, requests, 0)
        except urllib.error.HTTPError as error:  # not ready yet, or not at all
            with error:
                problem = f"status {error.code}: {error.read(500).decode(errors='replace')}"
            time.sleep(POLL_S)
        except OSError as error:
            problem = str(error)
            time.sleep(POLL_S)
        else:
            return None
    return problem


def _end(process: subprocess.Popen[bytes], others: frozenset[int]) -> None:
    """Ask the server to end, give its processes some time, and kill what is left."""
    process.terminate()
    deadline = time.perf_counter() + STOP_DEADLINE_S
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_DEADLINE_S)
    while left := _members(others):
        if time.perf_counter() > deadline + STOP_DEADLINE_S:
            raise RuntimeError(f"processes {left} of the server can't be killed")
        for pid in left:
            if time.perf_counter() > deadline or process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if pid == process.pid:
                process.poll()
            else:
                with contextlib.suppress(ChildProcessError):  # the child of another one, which will reap it
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(POLL_S)


def _members(others: frozenset[int]) -> list[int]:
    """Return the processes of this one's family but for others."""
    return [pid for pid in family(os.getpid()) if pid not in others]


def _proportional_kib(pid: int) -> int:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:  # it ended meanwhile
        return 0
    return int(found[1]) if found else 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
