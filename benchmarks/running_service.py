"""A real service in a process of its own, for the benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunningService:
    """Where a service listens, and its process."""

    url: str
    process: subprocess.Popen[str]

    def peak_memory_mib(self) -> float:
        """Return the largest resident size that the process has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match
        return int(match[1]) / 1024


@contextmanager
def running_service(**settings: object) -> Iterator[RunningService]:
    """Run ``palisade-serve run`` on a free port, with ``PALISADE_<NAME>`` set from the keywords; stop it with SIGTERM."""
    environment = {**os.environ, "PALISADE_PORT": "0", "PALISADE_METRICS_PORT": "0", "PALISADE_LOG_LEVEL": "info"}
    environment |= {f"PALISADE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "service.cli", "run"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = _address(process)
            reader = threading.Thread(target=_read_on, args=(process,))
            reader.start()
            yield RunningService(address, process)
        finally:
            process.terminate()
            process.wait(30)
        reader.join()


def _read_on(process: subprocess.Popen[str]) -> None:
    """Keep the log's pipe from filling up, which would stop the service."""
    for _ in process.stderr or ():
        pass


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        match = re.search(r"Uvicorn running on (http://[\d.:]+)", line)
        if match:
            return match[1]
    raise RuntimeError("the service stopped before it listened:\n" + "".join(seen))
