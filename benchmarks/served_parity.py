"""Do served predictions match the reference model's? Over real test images, through HTTP.

    PALISADE_DATA=data/cifar10.npz python -m benchmarks.served_parity [--checkpoint compact] [--n 1000]

The service runs as a user starts it, with quotas off and 6 decimals. Printed: the largest difference of a probability from
the float32 reference's, how many labels agree, and how many disagree although the reference's two top probabilities are further
apart than twice the stated tolerance (there must be none).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import urllib.request

import numpy as np
import torch
from PIL import Image

from benchmarks.hardware import describe
from benchmarks.running_service import running_service
from model.checkpoint import load_checkpoint, read_header
from model.fast import TOLERANCE, fastest_dtype

REQUEST_IMAGES = 50


def main() -> None:
    """Measure, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--n", type=int, default=1000)
    options = parser.parse_args()
    path = os.environ.get("PALISADE_DATA")
    if path is None:
        raise SystemExit("set PALISADE_DATA to a CIFAR-10 .npz file (docs/training.md)")
    with np.load(path, allow_pickle=False) as data:
        images = data["test_images"][: options.n]
    result = compare(options.checkpoint, images)
    print(json.dumps({"benchmark": "served_parity", "hardware": describe(), **result}))


def compare(checkpoint: str, images: np.ndarray) -> dict[str, object]:
    """Serve images ``(N, H, W, 3)`` uint8 and return how the answers differ from the reference's."""
    reference = load_checkpoint(checkpoint)
    labels = read_header(checkpoint).class_names
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = torch.cat([reference(part).exp() for part in pixels.split(100)]).numpy()  # (N, C)
    with running_service(checkpoint=checkpoint, device="cpu", limits="off", tier_anonymous_decimals=6) as running:
        parts = [images[i : i + REQUEST_IMAGES] for i in range(0, len(images), REQUEST_IMAGES)]
        predictions = [row for part in parts for row in ask(running.url, part)]
    served = np.array([[row["scores"][label] for label in labels] for row in predictions])
    tolerance = TOLERANCE[fastest_dtype(torch.device("cpu"))]
    top = np.sort(expected, axis=1)
    clear = top[:, -1] - top[:, -2] > 2 * tolerance
    agree = np.array([row["index"] for row in predictions]) == expected.argmax(axis=1)
    return {
        "n": len(images),
        "tolerance": tolerance,
        "largest_difference": float(np.abs(served - expected).max()),
        "labels_agree": int(agree.sum()),
        "clear_labels_disagree": int((clear & ~agree).sum()),
    }


def ask(url: str, images: np.ndarray) -> list[dict]:
    """Classify images in one JSON request."""
    encoded = []
    for image in images:
        body = io.BytesIO()
        Image.fromarray(image).save(body, "PNG")
        encoded.append(base64.b64encode(body.getvalue()).decode())
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/classify", json.dumps({"images": encoded}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


if __name__ == "__main__":
    main()
