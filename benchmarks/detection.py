"""Who is refused and who is suspected: simulated callers, thieves and black-box attacks against the real model.

    python -m benchmarks.detection --data data/cifar10.npz --pool data/cifar100-pool.npz [--half report] [--honest 600]
        [--thieves 100] [--attacked 40] [--seed 0]

`--half tune` has the images on which thresholds were chosen: training images that training held out, and the first half of the
pool. `--half report` has the test images and the pool's second half. Callers ask ten images a second; quotas are off. Answers
are the exact ones of the checkpoint's fast path, computed once (kept in `build/`); the attacks ask the model itself.

Printed for each kind of honest caller: how many were refused by `near-duplicates`, how many came under suspicion by the others.
For thieves: images until suspicion. For attacks: distinct queries until they were refused, and how many succeeded before
(Square: a wrong class within epsilon 8/255; HopSkipJump, an attack that only shrinks its distance, ends by refusal or after
1,000 queries).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.detection_callers import HONEST, LIMITS, THIEVES, Kind, Photos, Predict, Query, augmenting
from benchmarks.detection_searches import Oracle, as_png, as_tensor, noisy, search
from benchmarks.hardware import describe
from model.checkpoint import load_checkpoint, read_header
from model.fast_path import load_fast_path
from service.identity import Caller
from service.metrics import Metrics
from service.problems import Problem
from service.settings import Settings
from service.watch import Watch
from training.loading import load_dataset
from training.replay import held_out

RECORDED = Path("build")
CHECKPOINT = "compact"
ATTACKS = {
    "Square, PNG": ("Square", "png"),
    "Square, FP32": ("Square", "tensor"),
    "HopSkipJump, PNG": ("HopSkipJump", "png"),
    "HopSkipJump, FP32": ("HopSkipJump", "tensor"),
    "Square, PNG, noise of 2 levels": ("Square", "noisy"),
}
MOST_QUERIES = 1000


def main() -> None:
    """Simulate, print tables and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--half", choices=("tune", "report"), default="report")
    parser.add_argument("--honest", type=int, default=600, help="callers of each of the five kinds")
    parser.add_argument("--thieves", type=int, default=100, help="of each kind")
    parser.add_argument("--attacked", type=int, default=40, help="images, for each attack")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("service.watch.watch").setLevel(logging.ERROR)  # every suspicion is a warning
    fast_path = load_fast_path(CHECKPOINT, "cpu")

    def predict(images: np.ndarray) -> np.ndarray:
        batches = [fast_path.predict(images[i : i + 64], True).probabilities for i in range(0, len(images), 64)]
        return np.concatenate(batches)

    photos = load_photos(options.data, options.pool, options.half, predict)
    result: dict[str, object] = {}
    for title, kinds, count in (
        ("honest", HONEST, options.honest),
        ("limits", LIMITS, max(1, options.honest // 10)),
        ("thieves", THIEVES, options.thieves),
        ("augmenting thieves", {"JBDA": augmenting(predict, gradient_of(CHECKPOINT))}, max(1, options.thieves // 10)),
    ):
        result[title] = {name: watch_kind(kind, photos, count, options.seed) for name, kind in kinds.items()}
        for name, row in result[title].items():  # type: ignore[attr-defined]
            print(f"{name:32} {row}", flush=True)
    result["attacks"] = attacks = {}
    for name, (attack, form) in ATTACKS.items():
        attacks[name] = attack_images(attack, form, photos, predict, options.attacked, options.seed)
        print(f"{name:32} {attacks[name]}", flush=True)
    how = {"half": options.half, "seed": options.seed, "checkpoint": fast_path.version, "hardware": describe()}
    print(json.dumps({"benchmark": "detection", **how, **result}))


def load_photos(data: str, pool: str, half: str, predict: Predict) -> Photos:
    """Return one half's images and answers, computed unless ``build/`` has them."""
    header = read_header(CHECKPOINT)
    if half == "report":
        with np.load(data, allow_pickle=False) as file:
            known = np.ascontiguousarray(file["test_images"].transpose(0, 3, 1, 2))
    else:
        known = np.ascontiguousarray(np.asarray(held_out(header, load_dataset(data), CHECKPOINT).images))
    with np.load(pool, allow_pickle=False) as file:
        images = file["images"]
    middle = len(images) // 2
    strange = np.ascontiguousarray((images[middle:] if half == "report" else images[:middle]).transpose(0, 3, 1, 2))
    path = RECORDED / f"detection-{half}-{header.weights_sha256[:12]}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        np.savez(path, known=predict(known), strange=predict(strange))
    with np.load(path, allow_pickle=False) as file:
        return Photos(known, file["known"], strange, file["strange"])


def gradient_of(checkpoint: str) -> Predict:
    """Return what gives the gradient of the answered class's log-probability, ``(N, 3, H, W)``, for uint8 images."""

    def gradient(images: np.ndarray) -> np.ndarray:
        mixture = load_checkpoint(checkpoint).requires_grad_(False)
        found = []
        for start in range(0, len(images), 25):
            leaf = (torch.from_numpy(images[start : start + 25]).float() / 255).requires_grad_()  # (B, 3, H, W)
            mixture(leaf).max(dim=1).values.sum().backward()
            assert leaf.grad is not None
            found.append(leaf.grad.numpy())
        return np.concatenate(found)

    return gradient


def quotas_off() -> Settings:
    """Return the default settings without any quota."""
    return Settings.model_validate(
        {f"tier_{tier}_limits": "" for tier in ("anonymous", "standard", "trusted")} | {"suspect_limits": ""}
    )


def watch_kind(kind: Kind, photos: Photos, count: int, seed: int) -> dict[str, object]:
    """Let ``count`` callers of a kind ask, each of them a new one, and return what became of them."""
    clock = [0.0]
    watch = Watch(quotas_off(), Metrics(), lambda: clock[0], secret=str(seed).encode())
    first: dict[str, list[int]] = {"near-duplicates": [], "off-distribution": [], "distances": []}
    suspected, spent_s, images = [], 0.0, 0
    for number in range(count):
        chance = np.random.default_rng([seed, number])
        found, asked, seconds = asyncio.run(_follow(watch, f"{number}", kind(photos, chance), clock))
        images, spent_s = images + asked, spent_s + seconds
        for detector, after in found.items():
            first[detector].append(after)
        if by_others := [after for detector, after in found.items() if detector != "near-duplicates"]:
            suspected.append(min(by_others))
    return {
        "callers": count,
        "images": images,
        "refused": len(first["near-duplicates"]),
        "suspected": len(suspected),
        "by": {detector: len(when) for detector, when in first.items() if when},
        "images_until_suspected": _quantiles(suspected, count),
        "images_until_refused": _quantiles(first["near-duplicates"], count),
        "us_per_image": round(1e6 * spent_s / max(1, images)),
    }


async def _follow(watch: Watch, name: str, queries: Iterator[Query], clock: list[float]) -> tuple[dict[str, int], int, float]:
    """Return the image at which each detector first spoke, images asked, and the seconds that the watch took."""
    caller, found, asked, spent_s = Caller(name, "anonymous"), dict[str, int](), 0, 0.0
    for image, row in queries:
        clock[0] += 0.1
        asked += 1
        started = time.perf_counter()
        try:
            is_new = await watch.before(caller, image[None])
        except Problem:
            pass
        else:
            await watch.after(caller, image[None], row[None], is_new)
        spent_s += time.perf_counter() - started
        if len(found) < len(await watch.suspects()):
            for suspect in await watch.suspects():
                if suspect.caller == name:
                    found.setdefault(suspect.detector, asked)
    await watch.forgive(name)  # the next caller starts with an empty list
    return found, asked, spent_s


def attack_images(attack: str, form: str, photos: Photos, predict: Predict, count: int, seed: int) -> dict[str, object]:
    """Attack images that the model gets right in its own eyes, each by a new caller."""
    clock = [0.0]
    watch = Watch(quotas_off(), Metrics(), lambda: clock[0], secret=str(seed).encode())
    outcomes: dict[str, list[int]] = {"refused": [], "succeeded": [], "gave up": []}
    for number, index in enumerate(np.random.default_rng(seed).permutation(len(photos.known))[:count]):
        chance = np.random.default_rng([seed, number])
        disguise = {"png": as_png, "tensor": as_tensor, "noisy": noisy(chance, 2.0)}[form]
        oracle = Oracle(watch, predict, f"{number}", MOST_QUERIES, disguise, clock)
        image = photos.known[index].astype(np.float32) / 255
        outcome = search(attack, oracle, image, int(photos.known_rows[index].argmax()), seed + number)
        outcomes[outcome].append(oracle.asked)
    return {
        "images": count,
        **{outcome: len(queries) for outcome, queries in outcomes.items()},
        "queries_until_refused": _quantiles(outcomes["refused"], len(outcomes["refused"])),
        "queries_until_success": _quantiles(outcomes["succeeded"], len(outcomes["succeeded"])),
    }


def _quantiles(values: list[int], count: int) -> dict[str, float] | None:
    """Return what 10, 50 and 90 % of ``count`` reach; those who never did count as infinite, which is left out."""
    if not values:
        return None
    reached = sorted(values)
    return {f"{q}%": float(reached[i]) for q in (10, 50, 90) if (i := int(q / 100 * (count - 1))) < len(reached)}


if __name__ == "__main__":
    main()
