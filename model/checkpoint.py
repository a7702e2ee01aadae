"""The checkpoint: one safetensors file whose header says what the weights are and how good they were measured to be.

The format is specified in docs/checkpoint-format.md. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.architecture import Architecture
from model.mixture import Mixture

FORMAT_VERSION = 2
METADATA_KEY = "palisade"
EMBEDDED = {"compact": Path(__file__).parent / "checkpoints" / "compact.safetensors"}
STORED_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


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
    path = resolve(name_or_path)
    header = read_header(path)
    tensors = _read_tensors(path)
    with torch.device("meta"):  # shapes only: a forged header must not make us allocate
        expected = _stored_state(Mixture(header.architecture))
    _check_tensors(path, tensors, expected)
    mixture = Mixture(header.architecture, header.top_k)
    digest = weights_digest(tensors)
    if digest != header.weights_sha256:
        raise CheckpointError(
            f"{path}: weights_sha256 is {header.weights_sha256} but the tensors hash to {digest}: copy it again"
        )
    mixture.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    return mixture.eval().requires_grad_(False).to(device)


def read_header(name_or_path: str | Path) -> Header:
    """Return a checkpoint's header without reading its tensors; raises :class:`CheckpointError`."""
    path = resolve(name_or_path)
    try:
        with safe_open(path, framework="pt") as file:
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


def save_checkpoint(path: Path, mixture: Mixture, header: Header, dtype: torch.dtype = torch.bfloat16) -> Header:
    """Write a mixture, its matrices in ``dtype`` and its vectors in float32, and return the header as written.

    The header's ``weights_sha256`` is replaced by the digest of what is written.
    """
    state = _stored_state(mixture)
    tensors = {k: v.detach().cpu().to(dtype if v.ndim > 1 else torch.float32).contiguous() for k, v in state.items()}
    return _write(path, tensors, header)


def replace_metrics(path: Path, metrics: dict[str, Any]) -> Header:
    """Write other ``metrics`` into a checkpoint's header, leave its tensors as they are, and return the new header."""
    return _write(path, _read_tensors(path), replace(read_header(path), metrics=metrics))


def _write(path: Path, tensors: dict[str, torch.Tensor], header: Header) -> Header:
    digest = weights_digest(tensors)
    values = {
        "format_version": FORMAT_VERSION,
        "architecture": header.architecture.to_json(),
        "class_names": list(header.class_names),
        "top_k": header.top_k,
        "weights_sha256": digest,
        "recipe": header.recipe,
        "data": header.data,
        "metrics": header.metrics,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file(tensors, scratch, {METADATA_KEY: json.dumps(values)})
    scratch.chmod(0o644)  # save_file leaves it to its owner alone; the service may run as somebody else
    os.replace(scratch, path)
    return read_header(path)


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 over name, dtype, shape and little-endian bytes of every tensor, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resolve(name_or_path: str | Path) -> Path:
    """Return the file that a name or a path means; raises :class:`CheckpointError` when there is none."""
    path = EMBEDDED.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        known = ", ".join(EMBEDDED)
        raise CheckpointError(f"{path}: no such checkpoint file; give a path or one of the embedded names ({known})")
    return path


def _stored_state(mixture: Mixture) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores: everything but batch norm's step counters, which inference never reads."""
    return {name: value for name, value in mixture.state_dict().items() if not name.endswith("num_batches_tracked")}


def _name_pickles(path: Path) -> None:
    """Say so if a file that is no safetensors looks like a pickle; nobody opens it as one either way."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        return
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise CheckpointError(f"{path}: this is a pickle (torch.save), which is never loaded: export it as safetensors")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: tensors cannot be read ({error}): copy it again") from error


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(f"{path}: {_some('missing', missing)}{_some('unknown', unknown)}".rstrip("; "))
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            wanted = list(expected[name].shape)
            raise CheckpointError(f"{path}: tensor '{name}' has shape {list(tensor.shape)}, but architecture needs {wanted}")
        if tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{path}: tensor '{name}' has type {tensor.dtype}; only float32, bfloat16 and float16 are read"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor '{name}' holds NaN or infinity")
        if name.endswith("running_var") and (tensor < 0).any():
            raise CheckpointError(f"{path}: tensor '{name}' holds a negative variance")


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
    return Header(architecture=architecture, class_names=tuple(names), top_k=top_k, **values)


def _parse_architecture(path: Path, version: int, values: dict[str, Any]) -> Architecture:
    if version == 1 and "activation" not in values:  # it knew one only
        values = {**values, "activation": "relu"}
    elif version == 1:
        raise CheckpointError(f"{path}: architecture: format_version 1 has no activation; write 2")
    try:
        return Architecture.from_json(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: architecture: {error}") from error
