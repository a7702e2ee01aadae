"""The network: experts, gate, mixture, fast execution and the checkpoint format."""

import sys

from model.checkpoint import CheckpointError, Header, load_checkpoint, read_header

__all__ = ["CheckpointError", "Header", "load_checkpoint", "read_header"]

# OpenVINO and NNCF report every import and call to their maker unless this package of theirs is absent, and they say that they
# do so nowhere but in their documentation. A defence sends nothing home, so for this process it is absent.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
