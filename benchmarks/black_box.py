"""Black-box attacks through the running service, with the watch and without: Square and HopSkipJump as ART has them.

    python -m benchmarks.black_box --data data/cifar10.npz --out runs/black_box [--attacked 30] [--queries 1000]
        [--attacks Square;HopSkipJump] [--seed 0] [--set NAME=VALUE]

`benchmarks.detection` measures the watch alone, on exact probabilities and many callers. Here every query is a PNG file that is
posted to `palisade-serve run` under the default policy of tier anonymous, without quotas, once with
PALISADE_TIER_ANONYMOUS_WATCH=act and once with off, and the attacker has what the answers say. Each attacked test image has an
address of its own and is one that the service gets right. Square has succeeded when a query within epsilon 8/255 of the image
was answered with another class; HopSkipJump, when one within an L2 distance of 0.5 was. `least L2` is the distance of the
nearest query that was, also when the attack was refused later. Every attacked image is a line of `results.jsonl` in `--out`; a
run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.detection_searches import Enough, Refused, as_png, search
from benchmarks.hardware import describe
from benchmarks.record import Record
from benchmarks.running_service import add_settings_option, running_service
from model.checkpoint import read_header
from training.loading import load_dataset
from training.run_folder import git_revision

ATTACKS = ("Square", "HopSkipJump")
WATCH = ("off", "act")
LEVELS = 8
"""Square's epsilon in levels of 255."""
L2 = 0.5
OPEN = {"tier_anonymous_limits": "", "suspect_limits": "", "trusted_proxies": "127.0.0.1"}
"""No quotas; and this machine says for which address it asks."""


@dataclass
class Oracle:
    """The service as an attacker of one image asks it. An image that was asked before is not asked again.

    Attributes:
        http: A client of the service.
        labels: The service's classes in order.
        address: Whom the service takes the attacker for.
        image: The image under attack, ``(3, H, W)`` uint8.
        most: Queries until :class:`Enough` is raised.
        label: The image's class.
        asked: Queries.
        evaded_after: The query that was the first to be answered wrongly within :data:`LEVELS` of the image.
        least_l2: The least L2 distance, in units of 255 levels, of a query that was answered wrongly.
    """

    http: httpx.Client
    labels: list[str]
    address: str
    image: np.ndarray
    most: int
    label: int
    asked: int = 0
    evaded_after: int | None = None
    least_l2: float | None = None
    known: dict[bytes, np.ndarray] = field(default_factory=dict)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return what the answers to images ``(N, 3, H, W)`` float32 say, as probabilities ``(N, C)``."""
        return np.stack([self._ask(as_png(image)) for image in images])

    def _ask(self, image: np.ndarray) -> np.ndarray:
        key = image.tobytes()
        if key not in self.known:
            if self.asked >= self.most:
                raise Enough
            self.asked += 1
            self.known[key] = row = classify(self.http, self.labels, self.address, image)
            if self.label != row.argmax():
                self._note(image.astype(np.float64) - self.image)
        return self.known[key]

    def _note(self, moved: np.ndarray) -> None:
        if self.evaded_after is None and np.abs(moved).max() <= LEVELS:
            self.evaded_after = self.asked
        distance = float(np.linalg.norm(moved) / 255)
        self.least_l2 = distance if self.least_l2 is None else min(self.least_l2, distance)


def classify(http: httpx.Client, labels: list[str], address: str, image: np.ndarray) -> np.ndarray:
    """Post an image ``(3, H, W)`` uint8 and return what is shown of its probabilities ``(C,)``; a label alone is a 1.

    Raises:
        Refused: The watch has noticed.
        RuntimeError: The service answered something else.
    """
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "png")
    headers = {"Content-Type": "image/png", "X-Forwarded-For": address}
    reply = http.post("/v1/classify", content=file.getvalue(), headers=headers)
    if reply.status_code == httpx.codes.TOO_MANY_REQUESTS and "abnormal-usage-detected" in reply.text:
        raise Refused
    if reply.status_code != httpx.codes.OK:
        raise RuntimeError(f"POST /v1/classify was answered {reply.status_code}: {reply.text:.200}")
    (prediction,) = reply.json()["predictions"]
    scores = prediction.get("scores", {prediction["label"]: 1.0})
    row = np.array([scores.get(label, 0.0) for label in labels])
    row[prediction["index"]] += 1e-6  # the service's class is the first also among equal scores
    return row


def main() -> None:
    """Attack what is not recorded yet, print the table and end with one JSON line."""
    options = _options()
    record = Record(options.out / "results.jsonl")
    dataset = load_dataset(options.data)
    chosen = dict(options.settings)
    checkpoint = read_header(chosen.get("checkpoint", "compact")).weights_sha256[:12]
    settings = {"checkpoint": checkpoint, "test_sha256": dataset.test_digest, "queries": options.queries, "set": chosen}
    settings |= {"seed": options.seed}
    images, classes = dataset.test.images.contiguous().numpy(), dataset.test.labels.numpy()
    order = np.random.default_rng(options.seed).permutation(len(images)).tolist()
    for watch in WATCH:
        pairs = [{"attack": attack, "watch": watch, "settings": settings} for attack in options.attacks]
        if all(record.count(**pair) >= options.attacked for pair in pairs):
            continue
        with (
            running_service(**OPEN, **chosen, tier_anonymous_watch=watch) as running,
            httpx.Client(base_url=running.url, timeout=60) as http,
        ):
            labels = http.get("/v1/model").raise_for_status().json()["labels"]
            wanted = right(http, labels, images, classes, order, options.attacked)
            for pair, (number, index) in itertools.product(pairs, enumerate(wanted)):
                if not record.count(**pair, image=index):
                    address = f"10.{ATTACKS.index(pair['attack'])}.{number // 256}.{number % 256}"
                    oracle = Oracle(http, labels, address, images[index], options.queries, int(classes[index]))
                    record.add({**pair, "image": index, **attacked(pair["attack"], oracle, options.seed + number)})
    rows = [row for row in record.rows if row["settings"] == settings]
    text = table(rows)
    (options.out / "report.md").write_text(text + "\n")
    print(text)
    how = {"settings": settings, "git_revision": git_revision(), "hardware": describe()}
    print(json.dumps({"benchmark": "black_box", **how, "rows": rows}))


def right(
    http: httpx.Client, labels: list[str], images: np.ndarray, classes: np.ndarray, order: list[int], count: int
) -> list[int]:
    """Return the first ``count`` images in ``order`` that the service gets right; each is asked from a new address."""
    found: list[int] = []
    for number, index in enumerate(order):
        if len(found) == count:
            break
        address = f"10.255.{number // 256}.{number % 256}"
        if classify(http, labels, address, images[index]).argmax() == classes[index]:
            found.append(index)
    return found


def attacked(attack: str, oracle: Oracle, seed: int) -> dict[str, Any]:
    """Attack an image that the service gets right, and return what came of it."""
    outcome = search(attack, oracle, oracle.image.astype(np.float32) / 255, oracle.label, seed)
    near = oracle.least_l2 is not None and oracle.least_l2 <= L2
    return {
        "refused": outcome == "refused",
        "queries": oracle.asked,
        "succeeded": oracle.evaded_after is not None if attack == "Square" else near,
        "evaded_after": oracle.evaded_after,
        "least_l2": oracle.least_l2,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: every attack with and without the watch."""
    lines = [
        "| attack | watch | images | refused | queries until then, median | succeeded | queries, median | least L2, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for attack in ATTACKS:
        for watch in WATCH:
            own = [row for row in rows if (row["attack"], row["watch"]) == (attack, watch)]
            if own:
                refused = [row["queries"] for row in own if row["refused"]]
                lengths = [row["least_l2"] for row in own if row["least_l2"] is not None]
                cells = [
                    len(own),
                    len(refused),
                    f"{median(refused):.0f}" if refused else "-",
                    sum(row["succeeded"] for row in own),
                ]
                cells += [f"{median(row['queries'] for row in own):.0f}", f"{median(lengths):.2f}" if lengths else "-"]
                lines.append(f"| {attack} | {watch} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    def attacks(text: str) -> list[str]:
        for name in text.split(";"):
            if name not in ATTACKS:
                raise argparse.ArgumentTypeError(f"no {name!r}; there are: {'; '.join(ATTACKS)}")
        return text.split(";")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attacked", type=int, default=30, help="images, for each attack")
    parser.add_argument("--queries", type=int, default=1000, help="the most for one image")
    parser.add_argument("--attacks", type=attacks, default=";".join(ATTACKS), help="separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    add_settings_option(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
