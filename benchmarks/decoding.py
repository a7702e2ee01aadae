"""Which decoder is faster, Pillow or torchvision: encoded images to the model's 32x32 input, on one thread.

    python -m benchmarks.decoding [--rounds 5] [--seconds 1] [--images 16]

Pillow: the service's own :class:`service.decode.Decoder`, its checks included. torchvision: ``decode_image`` to RGB with EXIF
orientation, then an antialiased bicubic resize, without any check; torchvision has deprecated its decoders (0.29), which weighs
against them whatever they reach. 32x32 PNG, 224x224 JPEG and 1000x1000 JPEG (quality 90, 4:2:0) of smooth noise; the two take
turns, and the ratio is of each round's own figures. The mean difference of a pixel, of 255, shows that they do the same.
Memory: resident size of a process that imports the service's decoder, and of one that imports torchvision's too.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from benchmarks.hardware import describe, spread
from benchmarks.running_service import versions
from benchmarks.serving_overhead import show
from service.decode import Decoder

SIDE = 32
CASES = (("png 32x32", "PNG", 32), ("jpeg 224x224", "JPEG", 224), ("jpeg 1000x1000", "JPEG", 1000))
IMPORTS = ("import service.decode", "import service.decode, torchvision.io")


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each decoder in each round")
    parser.add_argument("--images", type=int, default=16, help="different images of each kind")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        rows = compare(options.rounds, options.seconds, options.images)
    memory = [resident_mib(statement) for statement in IMPORTS]
    print(f"resident size, MiB: {memory[0]:.0f} with the service's decoder, {memory[1]:.0f} with torchvision's too")
    how = {"rounds": options.rounds, "seconds": options.seconds, "images": options.images}
    result = {"rows": rows, "resident_mib": {"pillow": memory[0], "torchvision": memory[1]}}
    print(json.dumps({"benchmark": "decoding", **how, "hardware": describe(), "versions": versions(), **result}))


def compare(rounds: int, seconds: float, images: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure both decoders on one thread, print a line for each kind of image and return the spreads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pillow = Decoder(SIDE, SIDE, max_bytes=8 * 2**20, max_pixels=16_000_000).decode
    rows = {}
    for name, kind, side in CASES:
        files = encoded(kind, side, images)
        rates: dict[str, list[float]] = {"pillow": [], "torchvision": []}
        for _ in range(rounds):
            rates["pillow"].append(rate(pillow, files, seconds))
            rates["torchvision"].append(rate(decode_torchvision, files, seconds))
        ratio = [p / t for p, t in zip(rates["pillow"], rates["torchvision"], strict=True)]
        difference = float(np.mean([np.abs(pillow(file).astype(int) - decode_torchvision(file)).mean() for file in files]))
        rows[name] = {**{key: spread(value) for key, value in rates.items()}, "pillow_over_torchvision": spread(ratio)}
        rows[name]["mean_pixel_difference"] = {"mean": difference}
        shown = f"pillow {show(rows[name]['pillow'])} images/s, torchvision {show(rows[name]['torchvision'])}"
        print(f"{name:15s} {shown}, ratio {show(rows[name]['pillow_over_torchvision'])}, differ by {difference:.2f} of 255")
    torch.set_num_threads(threads)
    return rows


def encoded(kind: str, side: int, count: int) -> list[bytes]:
    """Return files of smooth noise, ``side`` by ``side`` pixels."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (max(8, side // 16), max(8, side // 16), 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = generator.integers(-4, 5, smooth.shape, dtype=np.int16)  # as a sensor adds; without it files are too small
        body = io.BytesIO()
        options = {"quality": 90} if kind == "JPEG" else {}
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(body, kind, **options)
        files.append(body.getvalue())
    return files


def decode_torchvision(data: bytes) -> np.ndarray:
    """Return one image as ``(3, SIDE, SIDE)`` uint8 RGB, decoded and resized by torchvision."""
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch takes no read-only memory
    image = decode_image(file, ImageReadMode.RGB, apply_exif_orientation=True)  # (3, H, W)
    if image.shape[1:] != (SIDE, SIDE):
        image = resize(image, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True)
    pixels: np.ndarray = image.numpy()
    return pixels


def rate(decode: Callable[[bytes], np.ndarray], files: Sequence[bytes], seconds: float) -> float:
    """Return images/s of going through the files over and over."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for file in files:
            decode(file)
        count += len(files)
    return count / (time.perf_counter() - started)


def resident_mib(statement: str) -> float:
    """Return the resident size of a new process after a statement."""
    script = f"import re\n{statement}\nprint(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    return int(run.stdout) / 1024


if __name__ == "__main__":
    main()
