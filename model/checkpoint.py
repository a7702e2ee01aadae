"""The checkpoint: one safetensors file whose header says what the weights are and how good they were measured to be.

The format is specified in docs/checkpoint-format.md. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from model.architecture import Architecture
from model.tensors import READABLE, StoredTensor, digest_of, read_tensors, stored_shapes, write_tensors

if TYPE_CHECKING:  # only what takes or gives a module imports torch: the service runs without it
    import torch

    from model.mixture import Mixture

FORMAT_VERSION = 3
"""The newest version that is read. Mixtures with a gate are written as version 2, which older Palisades read too."""

METADATA_KEY = "palisade"
EMBEDDED = {"compact": Path(__file__).parent / "checkpoints" / "compact.safetensors"}


class CheckpointError(ValueError):
    """A file is not a usable checkpoint; the message names the file, the field and what to do."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself.

    Attributes:
        architecture: The mixture's shapes and normalisation.
        class_names: One name per class, in the order of the outputs.
        weights_sha256: Digest of all tensors, see :func:`weights_digest`; the checkpoint's identity.
        recipe: How the weights were trained: settings, seed, git revision.
        data: Which data they were trained on: name, digest, held-out split.
        metrics: What was measured, and how: attack, n, seed, precision, confidence interval.
        top_k: How many experts to run by default; ``None`` runs all.
    """

    architecture: Architecture
    class_names: tuple[str, ...]
    weights_sha256: str
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    top_k: int | None = None

    @property
    def is_certified(self) -> bool:
        """Whether the experts vote and, as the header says, each was trained on its own partition of the data.

        Then :mod:`model.certificate` says something about poisoned data; of experts that share data it says nothing.
        """
        return self.architecture.votes and self.data.get("partitions") == self.architecture.num_experts


def load_checkpoint(name_or_path: str | Path = "compact", device: str | torch.device = "cpu") -> Mixture:
    """Return a checkpoint's mixture in eval mode, in float32.

    Args:
        name_or_path: ``compact``, the checkpoint inside the package, or a path.
        device: Where to put the weights.

    Returns:
        A module that maps images ``(B, 3, H, W)``, float32 in ``[0, 1]``, to log-probabilities ``(B, C)``; differentiable.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or not what its header says.
    """
    import torch

    from model.mixture import Mixture

    header, weights = read_weights(name_or_path)
    mixture = Mixture(header.architecture, header.top_k)
    mixture.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()}, strict=False)
    return mixture.eval().requires_grad_(False).to(device)


def read_weights(name_or_path: str | Path = "compact") -> tuple[Header, dict[str, npt.NDArray[np.float32]]]:
    """Return a checkpoint's header and every tensor as float32, checked as :func:`load_checkpoint` does, without torch.

    Args:
        name_or_path: ``compact``, the checkpoint inside the package, or a path.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or not what its header says.
    """
    path = resolve(name_or_path)
    header = read_header(path)
    tensors = _read_tensors(path)
    weights = _checked_weights(path, tensors, stored_shapes(header.architecture))
    digest = digest_of(tensors)
    if digest != header.weights_sha256:
        raise CheckpointError(
            f"{path}: weights_sha256 is {header.weights_sha256} but the tensors hash to {digest}: copy it again"
        )
    return header, weights


def read_header(name_or_path: str | Path) -> Header:
    """Return a checkpoint's header without reading its tensors; raises :class:`CheckpointError`."""
    path = resolve(name_or_path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        _name_pickles(path)
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}): copy it again or export a new one"
        ) from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path}: metadata has no field '{METADATA_KEY}', so it is not a Palisade checkpoint")
    try:
        values = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: field '{METADATA_KEY}' is not JSON ({error})") from error
    return _parse_header(path, values)


def save_checkpoint(path: Path, mixture: Mixture, header: Header, dtype: torch.dtype | None = None) -> Header:
    """Write a mixture, its matrices in ``dtype`` (bfloat16 by default) and its vectors in float32; return the written header.

    The header's ``weights_sha256`` is replaced by the digest of what is written.
    """
    import torch

    # Inference never reads batch norm's step counters.
    state = {name: value for name, value in mixture.state_dict().items() if not name.endswith("num_batches_tracked")}
    matrix = dtype or torch.bfloat16
    return _write(path, {k: _stored(v.to(matrix if v.ndim > 1 else torch.float32)) for k, v in state.items()}, header)


def replace_metrics(path: Path, metrics: dict[str, Any]) -> Header:
    """Write other ``metrics`` into a checkpoint's header, leave its tensors as they are, and return the new header."""
    return _write(path, _read_tensors(path), replace(read_header(path), metrics=metrics))


def _write(path: Path, tensors: Mapping[str, StoredTensor], header: Header) -> Header:
    values = {
        "format_version": FORMAT_VERSION if header.architecture.votes else 2,
        "architecture": header.architecture.to_json(),
        "class_names": list(header.class_names),
        "top_k": header.top_k,
        "weights_sha256": digest_of(tensors),
        "recipe": header.recipe,
        "data": header.data,
        "metrics": header.metrics,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    write_tensors(scratch, tensors, {METADATA_KEY: json.dumps(values)})
    scratch.chmod(0o644)  # safetensors leaves it to its owner alone; the service may run as somebody else
    os.replace(scratch, path)
    return read_header(path)


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and little-endian bytes of every tensor, in order of name."""
    return digest_of({name: _stored(tensor) for name, tensor in tensors.items()})


def _stored(tensor: torch.Tensor) -> StoredTensor:
    """Return a tensor as a checkpoint stores it; it shares the memory of one that is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return StoredTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)


def resolve(name_or_path: str | Path) -> Path:
    """Return the file that a name or a path means; raises :class:`CheckpointError` when there is none."""
    path = EMBEDDED.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        known = ", ".join(EMBEDDED)
        raise CheckpointError(f"{path}: no such checkpoint file; give a path or one of the embedded names ({known})")
    return path


def _name_pickles(path: Path) -> None:
    """Say so if a file that is no safetensors looks like a pickle; nobody opens it as one either way."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        return
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise CheckpointError(f"{path}: this is a pickle (torch.save), which is never loaded: export it as safetensors")


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        return read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: tensors cannot be read ({error}): copy it again") from error


def _checked_weights(
    path: Path, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[np.float32]]:
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise CheckpointError(f"{path}: {_some('missing', missing)}{_some('unknown', unknown)}".rstrip("; "))
    weights = {}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            has, wanted = list(tensor.shape), list(shapes[name])
            raise CheckpointError(f"{path}: tensor '{name}' has shape {has}, but architecture needs {wanted}")
        if tensor.dtype not in READABLE:
            raise CheckpointError(
                f"{path}: tensor '{name}' has type {tensor.dtype}; only float32, bfloat16 and float16 are read"
            )
        weights[name] = values = tensor.float32()
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: tensor '{name}' holds NaN or infinity")
        if name.endswith("running_var") and (values < 0).any():
            raise CheckpointError(f"{path}: tensor '{name}' holds a negative variance")
    return weights


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} tensors {', '.join(names[:3])}{more}; " if names else ""


def _parse_header(path: Path, values: object) -> Header:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: field '{METADATA_KEY}' must be a JSON object")
    version = values.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version must be a whole number from 1, not {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version}, this Palisade reads up to {FORMAT_VERSION}: upgrade Palisade"
        )
    kinds = {"architecture": dict, "class_names": list, "weights_sha256": str, "recipe": dict, "data": dict, "metrics": dict}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise CheckpointError(f"{path}: {name} must be a JSON {kind.__name__}, not {type(values.get(name)).__name__}")
    unknown = sorted(values.keys() - kinds.keys() - {"top_k"})
    if unknown:
        raise CheckpointError(f"{path}: unknown header fields {', '.join(unknown)}")
    architecture = _parse_architecture(path, version, values.pop("architecture"))
    names = values.pop("class_names")
    if len(names) != architecture.num_classes or len(set(map(str, names))) != len(names):
        raise CheckpointError(f"{path}: class_names must be {architecture.num_classes} different names")
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names must be strings")
    if any("\ud800" <= character <= "\udfff" for name in names for character in name):
        raise CheckpointError(f"{path}: class_names must be Unicode text")
    top_k = values.pop("top_k", None)
    if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= architecture.num_experts):
        raise CheckpointError(f"{path}: top_k must be null or from 1 to {architecture.num_experts}, not {top_k!r}")
    if architecture.votes:
        _check_vote(path, architecture.num_experts, top_k, values["data"])
    return Header(architecture=architecture, class_names=tuple(names), top_k=top_k, **values)


def _check_vote(path: Path, experts: int, top_k: int | None, data: dict[str, Any]) -> None:
    if top_k not in (None, experts):
        raise CheckpointError(f"{path}: top_k must be null where the experts vote, not {top_k}: every one has its say")
    partitions = data.get("partitions", experts)
    if type(partitions) is not int or partitions != experts:
        raise CheckpointError(
            f"{path}: data.partitions must be {experts}, one for each expert that votes, or absent if they shared their data, "
            f"not {partitions!r}"
        )


def _parse_architecture(path: Path, version: int, values: dict[str, Any]) -> Architecture:
    if version == 1 and "activation" not in values:  # it knew one only
        values = {**values, "activation": "relu"}
    elif version == 1:
        raise CheckpointError(f"{path}: architecture: format_version 1 has no activation; write 2")
    if (version >= 3) != ("aggregation" in values):
        has = "has no aggregation; write 3" if version < 3 else "needs aggregation"
        raise CheckpointError(f"{path}: architecture: format_version {version} {has}")
    try:
        return Architecture.from_json(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: architecture: {error}") from error
