"""Simulated callers for benchmarks.detection: honest ones of several kinds, and thieves. Each is a list of queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Query = tuple[np.ndarray, np.ndarray]
"""An image ``(3, H, W)`` uint8 and its answer ``(C,)``. A frame of a scene has the scene's answer."""


@dataclass(frozen=True)
class Photos:
    """Images and the model's answers to them: ``known`` are of the kind it was trained for, ``strange`` are not."""

    known: np.ndarray  # (N, 3, H, W) uint8
    known_rows: np.ndarray  # (N, C)
    strange: np.ndarray
    strange_rows: np.ndarray

    def draw(self, chance: np.random.Generator, strange_share: float) -> Query:
        """Return one photo."""
        is_strange = chance.random() < strange_share
        images, rows = (self.strange, self.strange_rows) if is_strange else (self.known, self.known_rows)
        index = chance.integers(len(images))
        return images[index], rows[index]


Kind = Callable[[Photos, np.random.Generator], Iterator[Query]]


def log_uniform(chance: np.random.Generator, low: int, high: int) -> int:
    """Return a whole number whose logarithm is even between those of the bounds."""
    return int(np.exp(chance.uniform(np.log(low), np.log(high + 1))))


def known_photos(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """20 to 1,000 photos of the kind that the model knows."""
    for _ in range(log_uniform(chance, 20, 1000)):
        yield photos.draw(chance, 0.0)


def mixed_photos(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """20 to 1,000 photos, 5 to 30 % of them of things that the model does not know."""
    share = chance.uniform(0.05, 0.3)
    for _ in range(log_uniform(chance, 20, 1000)):
        yield photos.draw(chance, share)


def retries(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """1 to 20 photos, each sent 1 to 500 times without a change."""
    for _ in range(log_uniform(chance, 1, 20)):
        query = photos.draw(chance, 0.1)
        for _ in range(log_uniform(chance, 1, 500)):
            yield query


def frames(scene: Query, chance: np.random.Generator, count: int, moves: float, noise: float) -> Iterator[Query]:
    """Frames of one scene: the camera wanders by ``moves`` pixels a frame, light drifts, the sensor is noisy."""
    image, row = scene
    place, light = np.zeros(2), 1.0
    for _ in range(count):
        place = np.clip(place + chance.normal(0, moves, 2), -4, 4)
        light = float(np.clip(light + chance.normal(0, 0.01), 0.8, 1.2)) if moves else 1.0
        yield finish(shift(image, place) * light, chance, noise), row


def video(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """1 to 5 hand-held sequences of 20 to 300 frames, each of one scene."""
    for _ in range(log_uniform(chance, 1, 5)):
        count = log_uniform(chance, 20, 300)
        yield from frames(photos.draw(chance, 0.1), chance, count, chance.uniform(0.2, 1), chance.uniform(0.5, 3))


def mobile_app(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """10 to 300 visits: a photo, retaken up to five times by an unsteady hand, one in five retried; 15 % strange."""
    for _ in range(log_uniform(chance, 10, 300)):
        scene = photos.draw(chance, 0.15)
        for query in frames(scene, chance, log_uniform(chance, 1, 6), chance.uniform(0.5, 2), chance.uniform(0.5, 3)):
            yield query
            if chance.random() < 0.2:
                yield query


def tripod(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """A camera that stands still, 300 frames that differ by half a level of noise: an attack's steps look like this."""
    yield from frames(photos.draw(chance, 0.0), chance, 300, 0.0, 0.5)


def long_video(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """A hand-held sequence of 1,500 frames of one scene."""
    yield from frames(photos.draw(chance, 0.0), chance, 1500, 0.5, 1.0)


def strange_only(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """An honest caller who sends 300 photos of everything but what the model knows."""
    for _ in range(300):
        yield photos.draw(chance, 1.0)


def knockoff(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """KnockoffNets' random strategy: 2,000 images of a public set, each once."""
    for index in chance.permutation(len(photos.strange))[:2000]:
        yield photos.strange[index], photos.strange_rows[index]


def hidden_knockoff(strange: int) -> Kind:
    """Return the same thief, hidden: after every ``strange`` of those images comes a photo of the kind that the model knows."""

    def kind(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
        for number, query in enumerate(knockoff(photos, chance), 1):
            yield query
            if number % strange == 0:
                yield photos.draw(chance, 0.0)

    return kind


def known_thief(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
    """A thief who has 1,000 photos of the kind that the model knows and sends nothing else."""
    for index in chance.permutation(len(photos.known))[:1000]:
        yield photos.known[index], photos.known_rows[index]


Predict = Callable[[np.ndarray], np.ndarray]
AUGMENTATION = 25.5
"""Levels by which Jacobian-based augmentation moves every value: 0.1."""


def augmenting(predict: Predict, gradient: Predict) -> Kind:
    """Return a thief who makes queries from 150 photos by Jacobian-based augmentation (Papernot et al., 2017), one round of it.

    Args:
        predict: Returns probabilities ``(N, C)`` of images ``(N, 3, H, W)`` uint8.
        gradient: Returns the gradient ``(N, 3, H, W)`` of the answered class's logarithm: the model's own, which is more than a
            thief has.
    """

    def kind(photos: Photos, chance: np.random.Generator) -> Iterator[Query]:
        chosen = chance.permutation(len(photos.known))[:150]
        images = photos.known[chosen]
        yield from zip(images, photos.known_rows[chosen], strict=True)
        made = np.clip(np.rint(images + AUGMENTATION * np.sign(gradient(images))), 0, 255).astype(np.uint8)
        yield from zip(made, predict(made), strict=True)

    return kind


HONEST: dict[str, Kind] = {
    "test images": known_photos,
    "off-distribution photos": mixed_photos,
    "retries": retries,
    "video-like": video,
    "mobile app": mobile_app,
}
LIMITS: dict[str, Kind] = {"tripod": tripod, "long video": long_video, "strange things only": strange_only}
THIEVES: dict[str, Kind] = {
    "KnockoffNets, CIFAR-100": knockoff,
    **{f"KnockoffNets, hidden {strange}:1": hidden_knockoff(strange) for strange in (10, 5, 3, 1)},
    "in-distribution thief": known_thief,
}


def shift(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return an image ``(3, H, W)`` as float64, moved by ``place`` pixels (down, right); edges repeat."""
    moved = image.astype(np.float64)
    for axis, distance in zip((1, 2), place, strict=True):
        whole = int(np.floor(distance))
        part = distance - whole
        moved = (1 - part) * _roll(moved, whole, axis) + part * _roll(moved, whole + 1, axis)
    return moved


def finish(image: np.ndarray, chance: np.random.Generator, noise: float) -> np.ndarray:
    """Return levels with a sensor's noise, as uint8."""
    return np.clip(np.rint(image + chance.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)


def _roll(image: np.ndarray, by: int, axis: int) -> np.ndarray:
    indices = np.clip(np.arange(image.shape[axis]) - by, 0, image.shape[axis] - 1)
    return np.take(image, indices, axis=axis)
