"""Classifying image files in this process, exactly: what a service would round or hide is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from model.certificate import read_votes, tolerated_partitions
from service.client.files import UnreadableError, read
from service.client.outcome import Outcome
from service.decode import Decoder
from service.fast_path import fast_path_of
from service.problems import Problem
from service.settings import Settings

Decoded = np.ndarray | str
"""An image ``(3, H, W)`` uint8, or why it cannot be had."""


class Offline:
    """Decodes as the service does and runs the model on the calling thread.

    Args:
        settings: Checkpoint, device, precision, batch size and the limits on images.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: A setting does not fit this machine or checkpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fast_path = fast_path_of(settings)
        shape = self._fast_path.header.architecture
        self._labels = self._fast_path.header.class_names
        self._decoder = Decoder(shape.height, shape.input_width, settings.max_image_bytes, settings.max_image_pixels)

    def classify(self, files: Sequence[Path]) -> Iterator[Outcome]:
        """Yield what became of each file, in order."""
        at = 0
        for batch in self._decoded(files):
            images = [image for image in batch if not isinstance(image, str)]
            rows = iter(self._fast_path.predict(np.stack(images)).probabilities if images else ())  # each (C,)
            for image in batch:
                path, at = files[at], at + 1
                yield Outcome(path, error=image) if isinstance(image, str) else Outcome(path, self._prediction(next(rows)))

    def _prediction(self, row: np.ndarray) -> dict[str, Any]:
        order = np.argsort(-row, kind="stable").tolist()
        scores = {self._labels[index]: float(row[index]) for index in order}
        prediction = {"label": self._labels[order[0]], "confidence": float(row[order[0]]), "scores": scores}
        header = self._fast_path.header
        if header.is_certified:
            tolerated = tolerated_partitions(read_votes(row[None], header.architecture.num_experts))
            prediction["certificate"] = {"tolerated_partitions": int(tolerated[0])}
        return prediction

    def _decoded(self, files: Sequence[Path]) -> Iterator[list[Decoded]]:
        """Yield decoded batches; the next one is decoded while the last one is classified."""
        size = self._settings.max_batch_size
        coming: list[Future[Decoded]] = []
        with ThreadPoolExecutor(self._settings.decode_threads, thread_name_prefix="decode") as pool:
            for start in range(0, len(files), size):
                now, coming = coming, [pool.submit(self._decode, path) for path in files[start : start + size]]
                if now:
                    yield [future.result() for future in now]
            yield [future.result() for future in coming]

    def _decode(self, path: Path) -> Decoded:
        try:
            return self._decoder.decode(read(path, self._settings.max_image_bytes))
        except UnreadableError as error:
            return str(error)
        except Problem as problem:
            return problem.detail
