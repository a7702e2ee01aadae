"""The client snippets of docs/http-api.md, run as they stand against a running server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import PATIENCE_S, ROOT, RunningServer

PAGE = ROOT / "docs" / "http-api.md"
CLIENTS = PAGE.read_text().partition("\n## Clients\n")[2].partition("\n## ")[0]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", CLIENTS, re.MULTILINE | re.DOTALL)
KSERVE_PYTHON = ROOT / "build" / "clients" / "bin" / "python"


def run(snippet: str, server: RunningServer) -> list[str]:
    """Run a snippet as a user would and return the words that it prints."""
    python = Path(sys.executable)
    if "import kserve" in snippet or "from kserve" in snippet:
        python = KSERVE_PYTHON
        if not python.exists():
            pytest.skip(f"{python.relative_to(ROOT)} is missing; run 'make clients'")
    elif "tritonclient" in snippet:
        pytest.importorskip("tritonclient.http")
    assert "127.0.0.1:8000" in snippet
    program = snippet.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    done = subprocess.run([python, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return re.sub(r"[\[\]]", " ", done.stdout).split()


@pytest.fixture(scope="module")
def cat(server: RunningServer) -> dict[str, object]:
    """What the server says of the picture that all snippets ask about."""
    image = (ROOT / "docs" / "samples" / "cat.png").read_bytes()
    reply = httpx.post(f"{server.url}/v1/classify", content=image, headers={"Content-Type": "image/png"}, timeout=PATIENCE_S)
    prediction: dict[str, object] = reply.json()["predictions"][0]
    return prediction


def test_every_client_has_its_snippet() -> None:
    clients = [re.findall(r"\b(httpx|tritonclient|kserve)\b", snippet)[0] for snippet in SNIPPETS]
    assert clients == ["httpx", "tritonclient", "tritonclient", "tritonclient", "kserve"]
    assert "curl -s" in CLIENTS  # run by tests/test_docs.py


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_prints_what_v1_answers(server: RunningServer, cat: dict[str, object], number: int) -> None:
    words = run(SNIPPETS[number], server)
    assert {str(cat["label"]), str(cat["index"])} & set(words), "neither the class's name nor its number"
    assert any(float(word) == pytest.approx(cat["confidence"]) for word in words if re.fullmatch(r"[0-9.]+", word))
