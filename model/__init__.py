"""The network: experts, gate, mixture, fast execution and the checkpoint format."""

from model.checkpoint import CheckpointError, Header, load_checkpoint, read_header

__all__ = ["CheckpointError", "Header", "load_checkpoint", "read_header"]
