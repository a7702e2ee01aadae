"""The documentation says what the code does, and its commands work."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.running_service import running_service
from service.gpu import READINGS
from service.metrics import Metrics
from service.settings import Settings
from training.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_every_curl_in_the_documentation_is_answered() -> None:
    commands = [
        line.strip()
        for page in PAGES
        for block in code_blocks(page)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().startswith("curl ")
    ]
    assert len(commands) >= 3
    with running_service() as running:
        for command in commands:
            script = command.replace("http://127.0.0.1:8000", running.url)
            answer = json.loads(subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, capture_output=True).stdout)
            assert answer.get("predictions") or answer.get("outputs"), command


def test_operations_lists_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(PALISADE_\w+)` \| `([^`]*)` \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE))
    assert rows.keys() == {f"PALISADE_{name}".upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if not name.endswith("_limits"):
            documented = rows[f"PALISADE_{name}".upper()].replace('""', "")
            assert Settings(**{name: documented}) == Settings(**{name: field.default})


def test_operations_lists_every_metric() -> None:
    documented = set(re.findall(r"^\| `((?:palisade|process)_\w+)", (ROOT / "docs/operations.md").read_text(), re.MULTILINE))
    kinds = {"counter": "_total", "histogram": "", "gauge": ""}
    exposed = {metric.name + kinds[metric.type] for metric in Metrics().registry.collect()}
    assert documented == exposed | READINGS.keys()  # the latter only where there is a GPU


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_python_example_in_the_readme_runs() -> None:
    (example,) = [block for block in code_blocks(ROOT / "README.md") if "import" in block]
    names: dict[str, object] = {}
    exec(example, names)
    assert tuple(names["log_probs"].shape) == (1, 10)  # type: ignore[attr-defined]


RECORDER = """#!/bin/sh
echo "$@" >> log
test "$(wc -l < log)" -ne "$STOP_AT" || exit 75
test "$1" = evaluate && test -d "$(dirname "$(echo "$@" | sed 's/.*--out //; s/ .*//')")"
test "$1" = evaluate || echo > "$(echo "$@" | sed 's/.*--out //; s/ .*//')"
"""


def made(target: str, folder: Path, stop_at: int) -> tuple[bool, list[dict[str, Any]]]:
    """Return whether a target of the Makefile was made, and the options that ``palisade-train`` was given, run by run."""
    (folder / "log").write_text("")
    (folder / "palisade-train").write_text(RECORDER)
    (folder / "palisade-train").chmod(0o755)
    (folder / "runs").mkdir(exist_ok=True)
    command = ["make", "-f", str(ROOT / "Makefile"), "DATA=photos.npz", "DEVICE=cpu", "MINUTES=8", target]
    command.insert(3, f"TRAIN={folder}/palisade-train")  # so nothing is installed, and there is no .venv
    done = subprocess.run(command, cwd=folder, env={**os.environ, "STOP_AT": str(stop_at)}, capture_output=True, text=True)
    typed = [line.split() for line in (folder / "log").read_text().splitlines()]
    return done.returncode == 0, [vars(_parser().parse_args(words)) for words in typed]


def test_make_train_full_is_given_again_until_all_is_trained(tmp_path: Path) -> None:
    ran = []
    for stop_at in (1, 3, 0):  # in the first, third of what is left, never; what is trained is left alone
        finished, slices = made("train-full", tmp_path, stop_at)
        assert finished == (stop_at == 0)
        assert len(slices) == stop_at or finished
        ran += slices if finished else slices[:-1]
    assert [each["recipe"] for each in ran] == ["full", "wide", "single", "compact", "compact"]
    assert all(7.8 < each["minutes"] <= 8 for each in ran)
    assert [each["teacher"] for each in ran] == [None] * 4 + [str(ran[0]["out"])]
    for name in ("run", "parts", "out"):
        assert len({each[name] for each in ran}) == 5
    assert made("train-full", tmp_path, 0) == (True, [])


def test_the_minutes_of_make_train_full_are_those_of_all_it_does(tmp_path: Path) -> None:
    (tmp_path / "date").write_text(
        "#!/bin/sh\necho 180 >> clock\necho $(($(wc -l < clock) * 180))\n"
    )  # 3 minutes later each time
    (tmp_path / "date").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        finished, ran = made("train-full", tmp_path, 0)
    assert not finished
    assert [each["minutes"] for each in ran] == [5, 2]


def test_make_judge_full_judges_each_even_where_one_fails(tmp_path: Path) -> None:
    trained = {str(each["out"]) for each in made("train-full", tmp_path, 0)[1]}
    for stop_at in (0, 1, 5):
        finished, ran = made("judge-full", tmp_path, stop_at)
        assert finished == (stop_at == 0)
        assert {each["checkpoint"] for each in ran} == trained
        assert len({each["out"] for each in ran}) == 5
        assert {rival for each in ran for rival in each["compare"]} < trained
        assert {each["level"] for each in ran} == {"full"}


def test_no_committed_file_is_larger_than_16_mib() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    large = [name for name in files.split("\0") if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 16 * 2**20]
    assert large == []
