"""Black-box attacks for benchmarks.detection: ART's Square and HopSkipJump, which ask a watched model until refused."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.detection_callers import Predict
from service.identity import Caller
from service.problems import Problem
from service.watch import Watch

EPSILON = 8 / 255


class Refused(Exception):
    """The watch has refused a query."""


class Enough(Exception):
    """The attack has asked as often as it may."""


@dataclass
class Oracle:
    """What an attacker asks: the model behind the watch, one image at a time.

    An image that was asked before is not asked again: a careful attacker would not, and repeats do not count.
    """

    watch: Watch
    predict: Predict
    caller: str
    most: int
    disguise: Callable[[np.ndarray], np.ndarray]
    clock: list[float]
    asked: int = 0
    known: dict[bytes, np.ndarray] = field(default_factory=dict)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities ``(N, C)`` for images ``(N, 3, H, W)`` float32 in ``[0, 1]``."""
        return np.stack([self._ask(image) for image in images])

    def _ask(self, image: np.ndarray) -> np.ndarray:
        key = image.tobytes()
        if key not in self.known:
            if self.asked >= self.most:
                raise Enough
            self.asked += 1
            self.clock[0] += 0.1
            self.known[key] = asyncio.run(self._query(self.disguise(image)[None]))[0]
        return self.known[key]

    async def _query(self, image: np.ndarray) -> np.ndarray:
        caller = Caller(self.caller, "anonymous")
        try:
            is_new = await self.watch.before(caller, image)
        except Problem as problem:
            raise Refused from problem
        rows = self.predict(image)
        await self.watch.after(caller, image, rows, is_new)
        return rows


def as_png(image: np.ndarray) -> np.ndarray:
    """Return an image as it arrives when it is uploaded as PNG: uint8."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def as_tensor(image: np.ndarray) -> np.ndarray:
    """Return an image as it arrives as an FP32 tensor."""
    return np.clip(image, 0, 1).astype(np.float32)


def noisy(chance: np.random.Generator, levels: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a disguise: every query gets fresh noise, as a camera's."""
    return lambda image: as_png(image + chance.normal(0, levels / 255, image.shape))


def search(name: str, oracle: Callable[[np.ndarray], np.ndarray], image: np.ndarray, label: int, seed: int) -> str:
    """Attack one image ``(3, H, W)`` float32; returns ``refused``, ``succeeded`` or ``gave up``."""
    from art.attacks.evasion import HopSkipJump, SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    np.random.seed(seed)  # ART draws from it
    target = np.eye(10, dtype=np.float32)[label][None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            classifier = BlackBoxClassifierNeuralNetwork(oracle, image.shape, 10, clip_values=(0.0, 1.0))
            if name == "Square":
                attack = SquareAttack(classifier, norm=np.inf, eps=EPSILON, max_iter=5000, verbose=False)
            else:
                attack = HopSkipJump(classifier, norm=2, max_iter=50, max_eval=2000, init_eval=100, verbose=False)
            attack.generate(image[None].copy(), y=target)
    except Refused:
        return "refused"
    except Enough:
        return "gave up"
    return "succeeded" if name == "Square" else "gave up"
