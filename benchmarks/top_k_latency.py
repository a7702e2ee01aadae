"""Whether top-k routing makes the chosen expert visible in latency: how often an observer of the clock guesses it.

    python -m benchmarks.top_k_latency --data data/cifar10.npz [--images 300] [--repeats 5] [--seed 0]

The engine's own time for one image is taken, without a network: what a caller could at best see. For k = 1, 2, 3 and all
experts, each image is run `repeats` times, images in random order, and its time is the median. Half of the images teach, the
other half is guessed:

- `threshold`: for the two most frequent top experts, the best single threshold on the time, and how often it tells them apart
- `bins`: the top expert that is most frequent in the time's decile, against always naming the most frequent expert
- `information_bits`: mutual information of the time's decile and the top expert, less its mean over 200 shufflings, which is
  what the finite sample alone gives; `p` is the share of shufflings that reach as much

With all experts running, nothing can depend on the choice: its row shows what chance looks like.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from benchmarks.hardware import describe
from model.checkpoint import read_header
from model.fast_path import FastPath, load_fast_path

SHUFFLINGS = 200
DECILES = np.arange(0.1, 1.0, 0.1)


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", default="compact")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = np.random.default_rng(options.seed)
    with np.load(options.data, allow_pickle=False) as file:
        chosen = chance.permutation(len(file["test_images"]))[: options.images]
        images = np.ascontiguousarray(file["test_images"][chosen].transpose(0, 3, 1, 2))  # (N, 3, H, W)
    experts = read_header(options.checkpoint).architecture.num_experts
    rows = {}
    for k in (1, 2, 3, experts):
        fast_path = load_fast_path(options.checkpoint, "cpu", top_k=None if k == experts else k)
        seconds, top = times(fast_path, images, options.repeats, chance)
        rows[k] = {"ms_median": round(1000 * float(np.median(seconds)), 3), **judge(seconds, top, chance)}
        print(f"{k} experts  {rows[k]}", flush=True)
    how = {"images": options.images, "repeats": options.repeats, "seed": options.seed, "hardware": describe()}
    print(json.dumps({"benchmark": "top_k_latency", **how, "experts": rows}))


def times(fast_path: FastPath, images: np.ndarray, repeats: int, chance: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's median time in seconds ``(N,)`` and its top expert ``(N,)``."""
    fast_path.warm_up()
    taken = np.zeros((repeats, len(images)))
    top = np.zeros(len(images), np.int64)
    for repeat in range(repeats):
        for index in chance.permutation(len(images)):
            started = time.perf_counter()
            prediction = fast_path.predict(images[index : index + 1], True)
            taken[repeat, index] = time.perf_counter() - started
            top[index] = prediction.gate[0].argmax()
    return np.median(taken, axis=0), top


def judge(seconds: np.ndarray, top: np.ndarray, chance: np.random.Generator) -> dict[str, float]:
    """Return how well the top expert is guessed from the time."""
    half = len(top) // 2
    edges = np.quantile(seconds[:half], DECILES)
    bins = np.searchsorted(edges, seconds)
    counts = np.bincount(top[:half])
    favourite = [int(np.bincount(top[:half][bins[:half] == each], minlength=len(counts)).argmax()) for each in range(10)]
    guesses = np.array([favourite[each] if (bins[:half] == each).any() else counts.argmax() for each in bins[half:]])
    information = mutual_information(bins, top)
    shuffled = np.array([mutual_information(bins, chance.permutation(top)) for _ in range(SHUFFLINGS)])
    return {
        **threshold(seconds, top, counts),
        "bins": round(float((guesses == top[half:]).mean()), 3),
        "always_the_same": round(float((top[half:] == counts.argmax()).mean()), 3),
        "information_bits": round(information - float(shuffled.mean()), 4),
        "p": round(float((shuffled >= information).mean()), 3),
    }


def threshold(seconds: np.ndarray, top: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Return the accuracy of the best threshold between the two most frequent experts, learnt on one half, on the other."""
    first, second = np.argsort(-counts, kind="stable")[:2]
    half = len(top) // 2
    is_taught = np.isin(top, (first, second)) & (np.arange(len(top)) < half)
    is_asked = np.isin(top, (first, second)) & (np.arange(len(top)) >= half)
    truth, clock = top[is_taught] == first, seconds[is_taught]
    scores = [((clock < edge) == truth).mean() for edge in clock]
    upside_down = [((clock >= edge) == truth).mean() for edge in clock]
    is_less = max(scores) >= max(upside_down)
    edge = clock[int(np.argmax(scores if is_less else upside_down))]
    guess = (seconds[is_asked] < edge) == is_less
    asked = top[is_asked] == first
    return {
        "threshold": round(float((guess == asked).mean()), 3),
        "threshold_by_share": round(float(max(asked.mean(), 1 - asked.mean())), 3),
    }


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Return bits that two labellings ``(N,)`` tell of each other."""
    joint = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(joint, (one, other), 1 / len(one))
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    known = joint > 0
    return float((joint[known] * np.log2(joint[known] / independent[known])).sum())


if __name__ == "__main__":
    main()
