"""A real service in processes of its own, and what it uses, for the benchmarks."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.ports import held_port
from service.settings import Settings

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_DEADLINE_S = 120.0
POLL_S = 0.005

UNLIMITED = {"limits": "off", "answer_cache_images": "0"}
"""Settings under which every request reaches the model."""


@dataclass(frozen=True)
class Work:
    """What a service has done since it started; the difference of two says what it did in between.

    Attributes:
        cpu_s: Processor seconds of all its processes.
        kernel_s: The part of them spent in the kernel.
        loops_s: The part of them spent on event loops: on the main threads of all processes but the engine's own.
        batches: Engine calls.
        images: Images that the engine classified.
        inference_s: Wall seconds of the engine calls.
        decode_s: Wall seconds of decoding, waiting for a thread included.
    """

    cpu_s: float
    kernel_s: float
    loops_s: float
    batches: float
    images: float
    inference_s: float
    decode_s: float

    def __sub__(self, earlier: Work) -> Work:
        """Return what was done since ``earlier``."""
        before = asdict(earlier)
        return Work(**{name: value - before[name] for name, value in asdict(self).items()})

    def per_image(self) -> dict[str, float]:
        """Return milliseconds per image, and the mean batch."""
        images, batches = max(1.0, self.images), max(1.0, self.batches)
        return {
            "cpu_ms": 1000 * self.cpu_s / images,
            "cpu_ms_event_loops": 1000 * self.loops_s / images,
            "cpu_ms_kernel": 1000 * self.kernel_s / images,
            "engine_wall_ms": 1000 * self.inference_s / images,
            "decode_wall_ms": 1000 * self.decode_s / images,
            "mean_batch": self.images / batches,
        }


@dataclass(frozen=True)
class RunningService:
    """Where a service listens, and its process.

    Attributes:
        url: Of the HTTP port, without a slash at the end.
        metrics_url: Of its metrics.
        process: The one that was started; front ends and engines may be its children.
        start_s: From exec to the first 200 of ``/readyz``.
    """

    url: str
    metrics_url: str
    process: subprocess.Popen[str]
    start_s: float

    def peak_memory_mib(self) -> float:
        """Return the sum of the largest resident sizes that its processes have had; memory that they share counts in each."""
        peaks = [re.search(r"VmHWM:\s+(\d+) kB", _read(f"/proc/{pid}/status")) for pid in family(self.process.pid)]
        return sum(int(peak[1]) for peak in peaks if peak) / 1024

    def work(self) -> Work:
        """Return what it has done so far."""
        pids = family(self.process.pid)
        whole = [_cpu_ticks(f"/proc/{pid}/stat") for pid in pids]
        loops = [_cpu_ticks(f"/proc/{pid}/task/{pid}/stat") for pid in pids if not _is_engine(pid)]
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
        series = ("batch_size_images_count", "batch_size_images_sum", "inference_seconds_sum", "decode_seconds_sum")
        return Work(
            TICK_S * sum(user + kernel for user, kernel in whole),
            TICK_S * sum(kernel for _, kernel in whole),
            TICK_S * sum(user + kernel for user, kernel in loops),
            *(_metric(text, f"palisade_{name}") for name in series),
        )


@contextmanager
def running_service(**settings: object) -> Iterator[RunningService]:
    """Run ``palisade-serve run`` on free ports, with ``PALISADE_<NAME>`` set from the keywords; stop it with SIGTERM.

    Raises:
        ValueError: A keyword is no setting; the service itself would only warn of it.
        RuntimeError: It stopped, or was not ready in time; the message has the end of its log.
    """
    unknown = sorted(settings.keys() - Settings.model_fields.keys())
    if unknown:
        raise ValueError(f"no such settings: {', '.join(unknown)}; docs/operations.md lists them")
    with held_port() as port, held_port() as metrics_port:
        chosen = {"port": port, "metrics_port": metrics_port, **settings}
        environment = {**os.environ, **{f"PALISADE_{name.upper()}": str(value) for name, value in chosen.items()}}
        with _started(environment, port, metrics_port) as service:
            yield service


@contextmanager
def _started(environment: dict[str, str], port: int, metrics_port: int) -> Iterator[RunningService]:
    command = [sys.executable, "-m", "service.cli", "run"]
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stderr=log, text=True, cwd=Path(__file__).parents[1]) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            if not _becomes_ready(url, process, started + START_DEADLINE_S):
                log.seek(0)
                raise RuntimeError("the service did not become ready:\n" + "".join(log.readlines()[-20:]))
            start_s = time.perf_counter() - started
            yield RunningService(url, f"http://127.0.0.1:{metrics_port}/metrics", process, start_s)
        finally:
            process.terminate()
            process.wait(30)


def add_settings_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--set name=value``, which may be given several times."""
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="a setting of the service: --set threads=1 sets PALISADE_THREADS=1",
    )


def numbers(text: str) -> list[int]:
    """Parse a comma-separated list of whole numbers; an empty text is an empty list."""
    return [int(part) for part in text.split(",") if part.strip()]


def family(pid: int) -> list[int]:
    """Return a process and everything that descends from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat_fields(str(path))
        if fields:
            parents[int(path.parent.name)] = int(fields[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def versions() -> dict[str, str | None]:
    """Return the versions of what the service is made of; ``None`` for what is not installed."""
    found: dict[str, str | None] = {}
    for name in ("numpy", "openvino", "pillow", "uvicorn", "uvloop", "httptools", "fastapi"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _setting(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or name not in Settings.model_fields:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE with a setting's name; docs/operations.md lists them")
    return name, value


def _becomes_ready(url: str, process: subprocess.Popen[str], deadline: float) -> bool:
    while process.poll() is None and time.perf_counter() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    return False


def _metric(text: str, name: str) -> float:
    """Return a series' value, summed over its labels."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def _is_engine(pid: int) -> bool:
    return "service.engine_process" in _read(f"/proc/{pid}/cmdline")


def _cpu_ticks(path: str) -> tuple[int, int]:
    """Return user and kernel ticks of a process or thread; zeros when it has ended."""
    fields = _stat_fields(path)
    return (int(fields[11]), int(fields[12])) if fields else (0, 0)


def _stat_fields(path: str) -> list[str]:
    """Return the fields of a ``stat`` file after the command's name, which may hold anything."""
    return _read(path).rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # it ended meanwhile
        return ""
