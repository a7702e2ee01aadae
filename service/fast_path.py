"""The fast path that the settings ask for."""

from __future__ import annotations

from pathlib import Path

from model.fast_path import FastPath, load_fast_path
from service.settings import Settings


def fast_path_of(settings: Settings) -> FastPath:
    """Load a checkpoint as the settings say; it is not warm yet.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: A setting does not fit this machine or checkpoint.
    """
    return load_fast_path(
        settings.checkpoint,
        settings.device,
        settings.precision,
        settings.top_k or None,
        settings.threads,
        settings.max_batch_size,
        Path(settings.tuning_dir) if settings.tuning_dir else None,
    )
