"""A replay: held-out training images and attacks on them, kept so that other executions of the mixture can be judged on both.

Attacks are crafted on the float32 reference once and replayed, since an execution in another precision has no exact gradients.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import Header, load_checkpoint, read_header
from model.fast import fold_batch_norms
from training import partition
from training.attack import Attack
from training.data import Dataset, Split
from training.evaluation.levels import EPSILON, STEP
from training.measure import Bench, exact_float32


def write_replay(
    checkpoint: str | Path, dataset: Dataset, out: Path, device: torch.device, n: int = 0, steps: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Attack images that training held out, through the whole mixture in float32, and write them to an ``.npz`` file.

    Its arrays: ``clean`` ``(N, 3, H, W)`` uint8; ``attacked`` ``(N, 3, H, W)`` float32 in ``[0, 1]``, not rounded to the uint8
    grid, after PGD with epsilon 8/255, steps of 2/255 and one random start; ``labels`` ``(N,)`` int64; ``provenance``, text
    that is JSON.

    Args:
        checkpoint: A path or the name of an embedded checkpoint.
        dataset: The data that it was trained on.
        out: The file to write.
        device: Where to attack.
        n: How many images; 0 means all that training held out.
        steps: Steps of the attack.
        seed: Decides the subset, if ``n`` asks for one, and the attack's starting noise.

    Returns:
        The provenance: checkpoint, data, attack, seed, and how many images the reference gets right.

    Raises:
        ValueError: The checkpoint was trained on other data, or held out fewer images than asked for.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: give a file in a folder that exists")
    header = read_header(checkpoint)
    images = _subset(held_out(header, dataset, checkpoint), n, seed)
    attack = Attack.pgd(EPSILON, steps, STEP)
    # The same function but for rounding, with fewer passes over memory in every step.
    mixture = fold_batch_norms(load_checkpoint(checkpoint, device)).to(memory_format=torch.channels_last)
    mixture.top_k = None
    exact_float32()
    bench = Bench(images, device, seed)
    with tqdm(total=len(bench) * steps, desc="attack", unit="image step", dynamic_ncols=True) as bar:

        def watched(inputs: torch.Tensor) -> torch.Tensor:
            bar.update(len(inputs))
            answers: torch.Tensor = mixture(inputs)
            return answers

        attacked = bench.attacked(watched, attack)
    provenance = {
        "checkpoint_sha256": header.weights_sha256,
        "data": {"name": dataset.name, "training_sha256": dataset.digest, "split": "held-out training images"},
        "n": len(bench),
        "seed": seed,
        "precision": "float32",
        "attack": asdict(attack),
        "right": {"clean": int(bench.judge(mixture).sum()), "attacked": int(bench.judge(mixture, attacked).sum())},
    }
    _write(
        out,
        clean=images.images.contiguous().numpy(),
        attacked=attacked.contiguous().numpy(),
        labels=images.labels.numpy(),
        provenance=np.array(json.dumps(provenance)),
    )
    return provenance


def held_out(header: Header, dataset: Dataset, checkpoint: str | Path) -> Split:
    """Return the training images that a checkpoint's training held out; raise ``ValueError`` if the data do not have them."""
    size = header.data.get("held_out_training_images")
    if not dataset.trained(header.data) or not isinstance(size, int):
        quarantine = header.data.get("quarantine_sha256")
        also = f" and its quarantine file (SHA-256 {str(quarantine)[:12]}) with --quarantine" if quarantine else ""
        raise ValueError(
            f"{dataset.name}: these are not the training data that the header of checkpoint {checkpoint} names "
            f"({header.data.get('name')}, SHA-256 {str(header.data.get('training_sha256'))[:12]}), "
            f"so no image is known to be held out: give its data with --data{also}"
        )
    return partition.held_out(dataset, size, header.architecture.num_experts if header.is_certified else 1)


def _subset(split: Split, n: int, seed: int) -> Split:
    if not 0 <= n <= len(split):
        raise ValueError(f"--n {n}: training held out {len(split)} images; give from 1 to {len(split)}, or 0 for all")
    if n in (0, len(split)):
        return split
    return split.take(torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:n])


def _write(path: Path, **arrays: np.ndarray) -> None:
    scratch = path.with_name(f"{path.name}.partial")
    with scratch.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(scratch, path)
