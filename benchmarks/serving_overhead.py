"""What the service costs over the bare model: images/s and their ratio, in one run.

    python -m benchmarks.serving_overhead [--checkpoint compact] [--connections 32] [--rounds 5]

Bare: the fast path in this process at its best batch size. Service: ``palisade-serve run`` with quotas and answer cache off,
asked by ``wrk`` (Debian package ``wrk``) with 256 different 32x32 PNG images, one per request, from the same cores. They take
turns;
figures are the minimum, median and maximum over the rounds, the ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.fast_path import rate
from benchmarks.hardware import describe, spread
from benchmarks.running_service import RunningService, running_service
from model.checkpoint import load_checkpoint
from model.fast import FastMixture

IMAGES = 256
SECONDS = 10
SCRIPT = """
local bodies = {}
for i = 0, %d do
  local file = assert(io.open("%s/" .. i .. ".png", "rb"))
  bodies[i] = wrk.format("POST", "/v1/classify", {["Content-Type"] = "image/png"}, file:read("*all"))
  file:close()
end
local next = 0
function request()
  next = (next + 1) %% (%d + 1)
  return bodies[next]
end
"""


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs wrk: apt-get install wrk")
    fast = FastMixture(load_checkpoint(options.checkpoint))
    size = (3, fast.architecture.height, fast.architecture.input_width)
    batches = {b: rate(fast.predict, torch.randint(256, (b, *size), dtype=torch.uint8)) for b in (16, 32, 64, 128)}
    best = max(batches, key=batches.__getitem__)
    images = torch.randint(256, (best, *size), dtype=torch.uint8)
    bare, service, p50, p99 = [], [], [], []
    settings = {"checkpoint": options.checkpoint, "limits": "off", "answer_cache_images": 0}
    with tempfile.TemporaryDirectory() as folder, running_service(**settings) as running:
        at_start = running.peak_memory_mib()
        script = write_load(Path(folder))
        load(running, script, options.connections, 3)
        for _ in range(options.rounds):
            time.sleep(1)  # worker threads of the other side go to sleep
            bare.append(max(rate(fast.predict, images) for _ in range(3)))
            time.sleep(1)
            answered, median, tail = load(running, script, options.connections, SECONDS)
            service.append(answered)
            p50.append(median)
            p99.append(tail)
        under_load = running.peak_memory_mib()
    result = {
        "bare_images_per_s": spread(bare),
        "bare_best_batch": best,
        "service_images_per_s": spread(service),
        "ratio": spread([s / b for s, b in zip(service, bare, strict=True)]),
        "latency_p50_ms": spread(p50),
        "latency_p99_ms": spread(p99),
        "peak_memory_mib": {"at_start": at_start, "under_load": under_load},
    }
    for name, value in result.items():
        print(f"{name:22s} {value}")
    how = {"connections": options.connections, "rounds": options.rounds, "seconds_per_round": SECONDS}
    print(json.dumps({"benchmark": "serving_overhead", **how, "hardware": describe(), **result}))


def write_load(folder: Path) -> Path:
    """Write the images and the script that wrk sends them with."""
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        body = io.BytesIO()
        # Smooth noise: about as large as a photo of this size once compressed.
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(body, "PNG")
        (folder / f"{index}.png").write_bytes(body.getvalue())
    script = folder / "load.lua"
    script.write_text(SCRIPT % (IMAGES - 1, folder, IMAGES - 1))
    return script


def load(running: RunningService, script: Path, connections: int, seconds: int) -> tuple[float, float, float]:
    """Return images/s and the median and 99th-percentile latency in milliseconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), running.url]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in report or "Socket errors" in report:
        raise RuntimeError(f"requests failed:\n{report}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", report)
    assert found
    return float(found[1]), _milliseconds(report, 50), _milliseconds(report, 99)


def _milliseconds(report: str, percentile: int) -> float:
    found = re.search(rf"{percentile}%\s+([\d.]+)(us|ms|s)\b", report)
    assert found
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


if __name__ == "__main__":
    main()
