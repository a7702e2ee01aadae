"""Makes the pictures of the demo page: samples, and adversarial examples with what they did to two networks.

    python -m benchmarks.demo_images --data data/cifar10.npz [--out service/page/images] [--epochs 4]

An undefended ResNet-18 (the embedded checkpoint's expert, trained on clean images only) and the embedded mixture are attacked
with the same PGD in float32. What an attack finds is rounded to whole pixel values, as a PNG holds them, before it is judged.
The samples were chosen by eye, before any network saw them; the examples are the first of them, then of the other test images,
whose attacks all succeed. Shares are in percent with 95 % Wilson intervals: ``clean`` is over the first 1,000 test images,
``shares`` over the first test images, without the samples, that both networks get right as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.hardware import describe
from model.architecture import PRESETS
from model.checkpoint import load_checkpoint, read_header
from model.mixture import Mixture
from training.attack import Attack
from training.data import Split
from training.evaluation.levels import EPSILON, STEP
from training.evaluation.significance import interval
from training.loading import load_dataset
from training.measure import Bench
from training.pretrain import Alone, ExpertTask
from training.recipe import ExpertRecipe, Schedule
from training.stage import Stage, Trainer
from training.worker import Worker

CPU = torch.device("cpu")
ATTACK = Attack.pgd(EPSILON, 50, STEP)
SAMPLES = (44, 82, 75, 103, 130, 16, 7, 60, 92, 38)
"""Positions in CIFAR-10's test set, one a class."""
LEAD = 0.15
"""A wrong class must lead the true one by this much in probability, so that a served network's lower precision agrees."""


@dataclass(frozen=True)
class Judged:
    """What a network says of images.

    Attributes:
        labels: ``(N,)``, the predicted classes.
        probabilities: ``(N, C)``.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor

    def fooled(self, truth: torch.Tensor) -> torch.Tensor:
        """Return ``(N,)`` booleans: which images a wrong class leads by more than ``LEAD``."""
        own = self.probabilities.gather(1, truth.unsqueeze(1)).squeeze(1)  # (N,)
        return (self.probabilities.max(dim=1).values - own) > LEAD


def main() -> None:
    """Train, attack, write the pictures and ``examples.json``, and print the latter's provenance as one JSON line."""
    options = _options()
    dataset = load_dataset(options.data)
    with np.load(options.data, allow_pickle=False) as file:
        inexact = file["test_inexact"] if "test_inexact" in file else np.array([], int)
        positions = np.delete(np.arange(len(file["test_labels"])), inexact)  # of each test image that was loaded
    # A training image costs as much as any other, so --images only serves trying this out.
    train, holdout = dataset.split_holdout(1000)
    undefended = train_undefended(train.take(slice(options.images)), holdout, options.epochs)
    palisade = load_checkpoint("compact")
    order = np.concatenate([np.flatnonzero(np.isin(positions, SAMPLES)), np.flatnonzero(~np.isin(positions, SAMPLES))])
    order = order[: options.candidates]
    bench = Bench(dataset.test.take(torch.from_numpy(order)), CPU)
    thousand = Bench(dataset.test.take(slice(1000)), CPU)
    content = {
        "made_by": "python -m benchmarks.demo_images",
        "source": "CIFAR-10 test images (Krizhevsky 2009)",
        "attack": {
            "name": "PGD",
            "epsilon": "8/255",
            "steps": ATTACK.steps,
            "step_size": "2/255",
            "start": "random",
            "seed": 0,
        },
        "undefended": {
            "architecture": "ResNet-18, width 16",
            "epochs": options.epochs,
            "train_images": min(options.images, len(train)),
            "clean": interval(thousand.judge(undefended)),
            "weights_sha256": _digest(undefended),
        },
        "palisade": {
            "clean": interval(thousand.judge(palisade)),
            "weights_sha256": read_header("compact").weights_sha256,
        },
    }
    content |= attack(undefended, palisade, bench, positions[order], dataset.label_names, options.out)
    (options.out / "examples.json").write_text(json.dumps(content, indent=1) + "\n")
    del content["samples"], content["examples"]
    print(json.dumps({"benchmark": "demo_images", "hardware": describe(), **content}))


def train_undefended(train: Split, holdout: Split, epochs: float) -> nn.Module:
    """Return a network trained on clean images only: images ``(B, 3, 32, 32)`` in ``[0, 1]`` to log-probabilities."""
    architecture = replace(PRESETS["compact"], height=train.images.shape[2], input_width=train.images.shape[3])
    torch.manual_seed(0)
    network = Alone(Mixture(architecture).experts[0], architecture).to(memory_format=torch.channels_last)
    task = ExpertTask(network, ExpertRecipe("benign"), Schedule(epochs=epochs), holdout, CPU)
    trainer = Trainer(Stage("undefended", task, architecture.num_classes, 0, {}), train, Worker(CPU))
    for step in range(trainer.steps):
        loss, _ = trainer.step(step)
        if step % 100 == 0:
            print(f"step {step} of {trainer.steps}: loss {loss.item():.3f}", flush=True)
    return trainer.progress.averaged.eval().requires_grad_(False)


def attack(
    undefended: nn.Module, palisade: nn.Module, bench: Bench, positions: np.ndarray, names: tuple[str, ...], out: Path
) -> dict[str, Any]:
    """Attack both networks, write the pictures into ``out`` and return what ``examples.json`` says of them.

    Args:
        undefended: The network of the transfer attack.
        palisade: The network of the white-box attack.
        bench: The images, the samples first.
        positions: ``(N,)``, where each image stands in the test set.
        names: The classes' names.
        out: A folder.
    """
    truth = bench.split.labels
    versions = {
        "clean": bench.split.images,
        "transfer": _rounded(bench.attacked(undefended, ATTACK)),
        "white-box": _rounded(bench.attacked(palisade, ATTACK)),
    }
    for pixels in versions.values():
        assert (pixels.int() - bench.split.images.int()).abs().max() <= round(EPSILON * 255)
    theirs = {kind: _judge(undefended, pixels) for kind, pixels in versions.items()}
    ours = {kind: _judge(palisade, pixels) for kind, pixels in versions.items()}
    right = (theirs["clean"].labels == truth) & (ours["clean"].labels == truth)
    counted = right & torch.from_numpy(~np.isin(positions, SAMPLES))
    shares = {
        "n": int(counted.sum()),
        "transfer_fools_undefended": interval((theirs["transfer"].labels != truth)[counted]),
        "transfer_fools_palisade": interval((ours["transfer"].labels != truth)[counted]),
        "white_box_fools_palisade": interval((ours["white-box"].labels != truth)[counted]),
    }
    fit = right & theirs["transfer"].fooled(truth) & ours["white-box"].fooled(truth)
    chosen: dict[str, int] = {}
    for row in fit.nonzero().squeeze(1).tolist():
        chosen.setdefault(names[truth[row]], row)
    out.mkdir(parents=True, exist_ok=True)
    samples = [row for row in range(len(positions)) if positions[row] in SAMPLES]
    for row in samples:
        _write(out / f"{names[truth[row]]}.png", versions["clean"][row])
    examples = []
    for name, row in list(chosen.items())[:4]:
        files = {kind: f"{name}-{kind}.png" for kind in versions}
        for kind, file in files.items():
            _write(out / file, versions[kind][row])
        said = {
            kind: {
                "label": names[judged.labels[row]],
                "confidence": round(judged.probabilities[row].max().item(), 3),
            }
            for kind, judged in theirs.items()
        }
        examples.append({"label": name, "position": int(positions[row]), "files": files, "undefended": said})
    of_samples = [{"label": names[truth[row]], "position": int(positions[row])} for row in samples]
    return {"shares": shares, "samples": sorted(of_samples, key=lambda sample: sample["label"]), "examples": examples}


@torch.no_grad()
def _judge(network: nn.Module, pixels: torch.Tensor) -> Judged:
    """Judge ``(N, 3, H, W)`` uint8 images."""
    probabilities = torch.cat([network(part.float() / 255).exp() for part in pixels.split(128)])
    return Judged(probabilities.argmax(dim=1), probabilities)


def _rounded(images: torch.Tensor) -> torch.Tensor:
    """Return float images in ``[0, 1]`` as the uint8 pixels that a PNG holds."""
    return (images * 255).round().to(torch.uint8)


def _write(path: Path, pixels: torch.Tensor) -> None:
    """Write ``(3, H, W)`` uint8 pixels and make sure that they come back as they were."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(path, optimize=True)
    assert (np.asarray(Image.open(path)) == array).all(), path


def _digest(network: nn.Module) -> str:
    """Return SHA-256 over a network's tensors, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + b"\0" + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as an .npz file (docs/training.md)")
    parser.add_argument("--out", type=Path, default=Path("service/page/images"))
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--images", type=int, default=10**9, help="training images at most")
    parser.add_argument("--candidates", type=int, default=138, help="test images attacked")
    return parser.parse_args()


if __name__ == "__main__":
    main()
