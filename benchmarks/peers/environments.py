"""The peers' virtual environments: one for each under ``build/peers``, with what ``requirements/PEER.txt`` pins.

    python -m benchmarks.peers.environments [PEER ...]

Makes those that are missing or out of date; all together take 2.5 GB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

PEERS = ("fastapi", "litserve", "bentoml", "ray_serve", "mlserver", "triton")

REQUIREMENTS = Path(__file__).parent / "requirements"
FOLDER = Path(__file__).parents[2] / "build" / "peers"
SYSTEM_PYTHON = Path("/usr/bin/python3")


def main() -> None:
    """Make the environments named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(PEERS))
    options = parser.parse_args()
    unknown = set(options.peers) - set(PEERS)
    if unknown:
        parser.error(f"no such peers: {', '.join(sorted(unknown))}")
    for peer in options.peers or PEERS:
        print(f"{peer}: {prepare(peer)}")


def prepare(peer: str) -> Path:
    """Make a peer's environment unless it is there already, and return its ``bin`` folder.

    Raises:
        subprocess.CalledProcessError: uv failed; it has printed why.
    """
    pinned = (REQUIREMENTS / f"{peer}.txt").read_text()
    folder = FOLDER / peer
    ready = folder / ".ready"  # says what was installed
    if not ready.exists() or ready.read_text() != pinned:
        uv = Path(sys.executable).with_name("uv")
        python = folder / "bin" / "python"
        print(f"{peer}: making its environment", file=sys.stderr)
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", _python(peer), folder], check=True)
        subprocess.run([uv, "pip", "sync", "--quiet", "--python", python, REQUIREMENTS / f"{peer}.txt"], check=True)
        ready.write_text(pinned)
    return folder / "bin"


def version(peer: str) -> str:
    """Return the pinned version of the server itself."""
    distribution = {"ray_serve": "ray", "triton": "nvidia-pytriton"}.get(peer, peer)
    found = re.search(rf"^{distribution}==(\S+)$", (REQUIREMENTS / f"{peer}.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _python(peer: str) -> Path:
    """Return the interpreter for an environment.

    Triton's Python backend loads the system's libpython, and fails with the standard library of another patch release.
    """
    return SYSTEM_PYTHON if peer == "triton" and SYSTEM_PYTHON.exists() else Path(sys.executable)


if __name__ == "__main__":
    main()
