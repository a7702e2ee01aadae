"""A snapshot of a checkpoint: its bytes in memory, which stay what they are whatever becomes of the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from model.checkpoint import CheckpointError, read_header, resolve


class Snapshot:
    """A checkpoint's bytes in anonymous memory, as large as the file.

    What is checked is then what is loaded, even if somebody writes the file at that moment, and an engine that dies is started
    again with the weights that it had.

    Args:
        checkpoint: ``compact``, the checkpoint inside the package, or a path.

    Raises:
        CheckpointError: The file is missing or cannot be read, or its header is not a checkpoint's.

    Attributes:
        checkpoint: As given.
        origin: The file that the bytes came from.
        file: Descriptor of the memory.
        path: Where this process finds it, and a child that has inherited the descriptor.
        header: The checkpoint's.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.origin = resolve(checkpoint).absolute()
        read_header(self.origin)  # before anything is copied that is no checkpoint
        self.file = os.memfd_create("palisade-checkpoint")
        self.path = Path(f"/proc/self/fd/{self.file}")
        try:
            with self.origin.open("rb") as source, open(self.file, "wb", closefd=False) as copy:
                shutil.copyfileobj(source, copy, 2**20)
            self.header = read_header(self.path)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{self.origin}: cannot be read ({error})") from error
        except CheckpointError as error:
            self.close()
            raise CheckpointError(self.explain(str(error))) from error

    def explain(self, error: str) -> str:
        """Return what an error says, with the file's name for the memory's."""
        return error.replace(str(self.path), str(self.origin))

    def close(self) -> None:
        """Let go of the memory; a second time does nothing."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
