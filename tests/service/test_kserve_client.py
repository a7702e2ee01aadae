"""KServe's client against a running server.

It needs older versions of packages that Palisade's tools need newer, so it has an environment of its own: ``make clients``.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.service.conftest import LABELS, PATIENCE_S, ROOT, RunningServer
from tests.service.pictures import base64_text, encode, noise, pixels

PYTHON = ROOT / "build" / "clients" / "bin" / "python"
CALLS = Path(__file__).with_name("kserve_calls.py")
SEEDS = (3, 4)


def test_the_kserve_client_gets_the_answers_that_v1_gives(server: RunningServer, tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON.relative_to(ROOT)} is missing; run 'make clients'")
    reply = httpx.post(
        f"{server.url}/v1/classify", json={"images": [base64_text(encode(noise(seed))) for seed in SEEDS]}, timeout=PATIENCE_S
    )
    plain = reply.json()["predictions"]
    scores = np.array([[prediction["scores"][label] for label in LABELS] for prediction in plain], np.float32)
    file = tmp_path / "pixels.npz"
    np.savez(file, pixels=np.stack([pixels(noise(seed)) for seed in SEEDS]))

    ended = subprocess.run([PYTHON, CALLS, server.url, file], capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])

    assert (found["live"], found["ready"], found["model_ready"], found["other_ready"]) == (True, True, True, False)
    assert len(found["answers"]) == 6
    for answer in found["answers"]:
        assert (answer["id"], answer["model"]) == ("r1", "palisade")
        assert answer["class_id"] == [prediction["index"] for prediction in plain]
        np.testing.assert_array_equal(np.array(answer["probabilities"], np.float32), scores)
    assert "422" in found["error"]
    assert "[2,3,31,32]" in found["error"], "the client dropped the service's own words"
