"""What the metrics say of the service's processes, against what the kernel tells a parent and its children."""

from __future__ import annotations

import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from service.processes import Processes

ROUNDING_S = 4 / os.sysconf("SC_CLK_TCK")
"""User and system time of the process and of its children are each cut to whole ticks."""


def sample(processes: Processes, name: str) -> float:
    (value,) = (each.value for family in processes.collect() for each in family.samples if each.name == name)
    return value


def used_s() -> float:
    """Processor time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return 1024 * int(found[1])


def burn() -> None:
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)


def test_one_process_is_itself() -> None:
    processes = Processes()
    before = used_s()
    cpu_s = sample(processes, "process_cpu_seconds_total")
    assert before - ROUNDING_S <= cpu_s <= used_s() + ROUNDING_S
    assert sample(processes, "palisade_processes") == 1
    assert sample(processes, "process_resident_memory_bytes") == pytest.approx(resident_bytes(os.getpid()), rel=0.1)
    assert sample(processes, "process_max_fds") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    gc.collect()  # nothing else closes a file between the two looks
    files = len(list(Path("/proc/self/fd").iterdir()))
    assert abs(sample(processes, "process_open_fds") - files) <= 1


def test_a_child_is_added_while_it_runs() -> None:
    processes = Processes()
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()  # it has loaded what it needs
    processes.started(child.pid)
    assert sample(processes, "palisade_processes") == 2
    both = resident_bytes(os.getpid()) + resident_bytes(child.pid)
    assert sample(processes, "process_resident_memory_bytes") == pytest.approx(both, rel=0.1)
    child.communicate(b"\n")
    assert sample(processes, "palisade_processes") == 1, "it has ended, even if nobody has said so yet"
    processes.gone(child.pid)
    processes.gone(child.pid)
    assert sample(processes, "palisade_processes") == 1


def test_the_time_of_a_child_that_has_ended_still_counts() -> None:
    processes = Processes()
    before, used = sample(processes, "process_cpu_seconds_total"), used_s()
    burn()
    used = used_s() - used
    after = sample(processes, "process_cpu_seconds_total")
    assert after - before >= used - 2 * ROUNDING_S > 0.05


def test_processor_time_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    burn()
    before = sample(processes, "process_cpu_seconds_total")
    nothing = os.times_result((0.0, 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "times", lambda: nothing)  # as if a child had ended while it was looked at
    assert sample(processes, "process_cpu_seconds_total") == before


def test_the_files_are_those_of_the_process_nearest_to_its_limit() -> None:
    processes = Processes()
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8)); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    processes.started(child.pid)
    assert sample(processes, "process_max_fds") == 8
    assert sample(processes, "process_open_fds") == len(list(Path(f"/proc/{child.pid}/fd").iterdir()))
    child.communicate(b"\n")
