"""The checkpoint format: what survives a round trip, and what each kind of bad file is refused with."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.architecture import Architecture
from model.checkpoint import (
    CheckpointError,
    Header,
    load_checkpoint,
    read_header,
    read_weights,
    replace_metrics,
    save_checkpoint,
    weights_digest,
)
from model.mixture import Mixture

if TYPE_CHECKING:
    from tests.conftest import Bomb

Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Tensors, dict[str, Any]], object]

TINY = Architecture(width=2, num_classes=3, num_experts=2, gate_width=2, height=8, input_width=8)
HEADER = Header(
    architecture=TINY,
    class_names=("cat", "café", "猫"),
    weights_sha256="",
    recipe={"name": "test", "joint": {"epochs": 1.5}, "experts": [1, 2]},
    data={"name": "none", "sha256": "0" * 64},
    metrics={"accuracy": {"mixture": {"percent": 12.5}}},
    top_k=2,
)


@pytest.fixture(scope="module")
def tiny() -> Mixture:
    torch.manual_seed(0)
    return Mixture(TINY)


@pytest.fixture(scope="module")
def good(tiny: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_checkpoint(path, tiny, HEADER)
    return path


def header_of(path: Path) -> dict[str, Any]:
    """Return the JSON header as it stands in the file, read without the code under test."""
    content = path.read_bytes()
    start = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    values: dict[str, Any] = json.loads(start["__metadata__"]["palisade"])
    return values


# --- round trips


def test_the_header_survives_a_round_trip(tiny: Mixture, tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path / "a.safetensors", tiny, HEADER)
    assert read_header(tmp_path / "a.safetensors") == written
    assert replace(written, weights_sha256="") == HEADER
    assert written.weights_sha256 == weights_digest(load_file(tmp_path / "a.safetensors"))


def test_float32_weights_survive_exactly(mixture: Mixture, images: torch.Tensor, tmp_path: Path) -> None:
    header = Header(mixture.architecture, tuple("abcde"), "")
    save_checkpoint(tmp_path / "a.safetensors", mixture, header, torch.float32)
    assert torch.equal(load_checkpoint(tmp_path / "a.safetensors")(images), mixture(images))


def test_bfloat16_rounds_matrices_and_keeps_vectors(mixture: Mixture, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", mixture, Header(mixture.architecture, tuple("abcde"), ""))
    loaded = load_checkpoint(tmp_path / "a.safetensors").state_dict()
    for name, value in mixture.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            expected = value.bfloat16().float() if value.ndim > 1 else value
            assert torch.equal(loaded[name], expected), name
            assert loaded[name].dtype == torch.float32


def test_the_weights_without_torch_are_those_of_the_module() -> None:
    header, weights = read_weights("compact")
    mixture = load_checkpoint("compact")
    assert header == read_header("compact")
    assert mixture.architecture == header.architecture
    for name, value in mixture.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(torch.from_numpy(weights.pop(name)), value), name
    assert not weights


def test_replacing_the_metrics_leaves_every_tensor_as_it_is(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(good.read_bytes())
    written = replace_metrics(path, {"accuracy": 7})
    assert written == read_header(path) == replace(read_header(good), metrics={"accuracy": 7})
    before, after = load_file(good), load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_a_loaded_mixture_only_infers_and_lets_gradients_reach_the_image(good: Path) -> None:
    loaded = load_checkpoint(str(good))
    assert loaded.top_k == 2
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loaded(images)[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_saving_again_gives_the_same_identity_and_leaves_no_scratch_file(good: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, load_checkpoint(good), read_header(good))
    save_checkpoint(again, load_checkpoint(again), read_header(again))
    assert read_header(again) == read_header(good)
    assert list(tmp_path.iterdir()) == [again]


def test_the_digest_changes_with_every_tensor_its_name_shape_and_type(good: Path) -> None:
    tensors = load_file(good)
    digests = {weights_digest(tensors)}
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        digests.add(weights_digest({**tensors, name: changed}))
    bias = "gate.head.bias"
    digests.add(weights_digest({**tensors, bias: tensors[bias].view(1, -1)}))
    digests.add(weights_digest({**tensors, bias: tensors[bias].view(torch.int32)}))
    digests.add(weights_digest({**{k: v for k, v in tensors.items() if k != bias}, "other": tensors[bias]}))
    assert len(digests) == len(tensors) + 4


@pytest.mark.parametrize("start", [b"\x80", b"PK"], ids=["0x80", "PK"])
def test_a_header_length_that_looks_like_a_pickle_is_still_a_checkpoint(tiny: Mixture, tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: value for name, value in tiny.state_dict().items() if not name.endswith("num_batches_tracked")}
    values = {
        "format_version": 2,
        "architecture": TINY.to_json(),
        "class_names": ["a", "b", "c"],
        "top_k": None,
        "weights_sha256": weights_digest(tensors),
        "recipe": {"note": ""},
        "data": {},
        "metrics": {},
    }
    save_file(tensors, path, {"palisade": json.dumps(values)})
    length, wanted = int.from_bytes(path.read_bytes()[:8], "little"), int.from_bytes(start, "little")
    values["recipe"] = {"note": "x" * ((wanted - length) % 256 ** len(start))}
    save_file(tensors, path, {"palisade": json.dumps(values)})
    assert path.read_bytes().startswith(start)
    assert load_checkpoint(path).architecture == TINY


def test_a_checkpoint_of_format_version_1_is_read_with_its_only_activation(good: Path, tmp_path: Path) -> None:
    tensors, path = load_file(good), tmp_path / "old.safetensors"
    with safe_open(good, framework="pt") as file:
        header = json.loads(file.metadata()["palisade"])
    header["format_version"] = 1
    save_file(tensors, path, {"palisade": json.dumps(header)})
    with pytest.raises(CheckpointError, match="format_version 1 has no activation"):
        read_header(path)
    del header["architecture"]["activation"]
    save_file(tensors, path, {"palisade": json.dumps(header)})
    assert read_header(path).architecture == read_header(good).architecture
    assert read_header(path).architecture.activation == "relu"
    assert load_checkpoint(path).architecture == load_checkpoint(good).architecture


@pytest.fixture
def ballot(tmp_path: Path) -> Path:
    """A checkpoint whose experts vote."""
    torch.manual_seed(0)
    path = tmp_path / "ballot.safetensors"
    architecture = replace(TINY, aggregation="vote")
    save_checkpoint(path, Mixture(architecture), replace(HEADER, architecture=architecture, top_k=None))
    return path


def test_a_mixture_with_a_gate_is_written_as_older_versions_read_it(good: Path) -> None:
    header = header_of(good)
    assert header["format_version"] == 2
    assert "aggregation" not in header["architecture"]


def test_a_vote_survives_a_round_trip_without_a_gate(ballot: Path) -> None:
    assert read_header(ballot).architecture == replace(TINY, aggregation="vote")
    assert not [name for name in load_file(ballot) if name.startswith("gate")]
    loaded = load_checkpoint(ballot)
    stored = load_file(ballot)
    assert torch.equal(loaded.state_dict()["experts.1.head.bias"], stored["experts.1.head.bias"])
    assert replace_metrics(ballot, {"n": 1}).architecture.votes


def test_a_vote_is_refused_by_name_by_versions_that_know_only_gates(ballot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.FORMAT_VERSION", 2)
    with pytest.raises(CheckpointError, match=r"ballot.safetensors: format_version is 3, this Palisade reads up to 2: upgrade"):
        load_checkpoint(ballot)


@pytest.mark.parametrize(
    ("changes", "in_architecture", "named"),
    [
        ({"format_version": 2}, {}, "format_version 2 has no aggregation"),
        ({"top_k": 1}, {}, "top_k must be null where the experts vote"),
        ({}, {"aggregation": "mean"}, "aggregation must be one of gate, vote"),
        ({}, {"aggregation": "gate"}, "missing tensors gate"),
        ({}, {"aggregation": None}, "format_version 3 needs aggregation"),
        *(
            ({"data": {"partitions": value}}, {}, r"ballot.safetensors: data\.partitions must be 2, one for each expert")
            for value in (3, 0, -2, 2.0, True, "2", [2], None)
        ),
    ],
)
def test_a_spoilt_vote_is_refused(ballot: Path, changes: dict[str, Any], in_architecture: dict[str, Any], named: str) -> None:
    header, tensors = header_of(ballot), load_file(ballot)
    header.update(changes)
    header["architecture"].update(in_architecture)
    if header["architecture"]["aggregation"] is None:
        del header["architecture"]["aggregation"]
    save_file(tensors, ballot, {"palisade": json.dumps(header)})
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(ballot)


# --- abuse: tensors and header fields

BIAS, MATRIX, VARIANCE = "gate.head.bias", "experts.1.head.weight", "experts.0.stem.1.running_var"


def architecture_with(**changes: Any) -> Spoil:
    return lambda _, header: header["architecture"].update(changes)


def header_with(**changes: Any) -> Spoil:
    return lambda _, header: header.update(changes)


def element(name: str, value: float) -> Spoil:
    return lambda tensors, _: tensors[name].view(-1)[0].fill_(value)


SPOILT: dict[str, tuple[Spoil, str]] = {
    "a missing tensor": (lambda tensors, _: tensors.pop(BIAS), BIAS),
    "an extra tensor": (lambda tensors, _: tensors.update(surplus=torch.zeros(1)), "surplus"),
    "a wrong shape": (lambda tensors, _: tensors.update({BIAS: torch.zeros(7)}), BIAS),
    "a transposed matrix": (lambda tensors, _: tensors.update({MATRIX: tensors[MATRIX].T.contiguous()}), MATRIX),
    "NaN in a matrix": (element(MATRIX, float("nan")), MATRIX),
    "infinity in a vector": (element(BIAS, float("inf")), BIAS),
    "minus infinity in a vector": (element(BIAS, float("-inf")), BIAS),
    "a negative variance": (element(VARIANCE, -1.0), VARIANCE),
    "an integer type": (lambda tensors, _: tensors.update({BIAS: tensors[BIAS].int()}), BIAS),
    "a double type": (lambda tensors, _: tensors.update({BIAS: tensors[BIAS].double()}), BIAS),
    "no format version": (lambda _, header: header.pop("format_version"), "format_version"),
    **{
        f"format version {version!r}": (header_with(format_version=version), "format_version")
        for version in (3, 10**30, 0, -1, "1", 1.0, None, [1], True)
    },
    "too few class names": (header_with(class_names=["a", "b"]), "class_names"),
    "too many class names": (header_with(class_names=["a", "b", "c", "d"]), "class_names"),
    "the same class twice": (header_with(class_names=["a", "b", "a"]), "class_names"),
    "half a character as a class name": (header_with(class_names=["a", "b", "\ud800"]), "class_names"),
    "numbers as class names": (header_with(class_names=[0, 1, 2]), "class_names"),
    "class names as text": (header_with(class_names="abc"), "class_names"),
    "an unknown header field": (header_with(pickle="x"), "pickle"),
    "no recipe": (lambda _, header: header.pop("recipe"), "recipe"),
    "metrics as a list": (header_with(metrics=[]), "metrics"),
    "no digest": (lambda _, header: header.update(weights_sha256=None), "weights_sha256"),
    "another digest": (header_with(weights_sha256="0" * 64), "weights_sha256"),
    "architecture as a list": (header_with(architecture=[8]), "architecture"),
    "an unknown architecture field": (architecture_with(depth=18), "depth"),
    "a missing architecture field": (lambda _, header: header["architecture"].pop("std"), "std"),
    "width as text": (architecture_with(width="2"), "width"),
    "width of zero": (architecture_with(width=0), "width"),
    "an absurd width": (architecture_with(width=10**9), "width"),
    "the largest width allowed": (architecture_with(width=1024), "architecture"),  # would be 100 GB if it were allocated
    "more experts than the file holds": (architecture_with(num_experts=3), "experts.2"),
    "a number of experts that is a fraction": (architecture_with(num_experts=2.0), "num_experts"),
    "a standard deviation of zero": (architecture_with(std=[1, 0, 1]), "std"),
    "a mean of NaN": (architecture_with(mean=[0.5, float("nan"), 0.5]), "mean"),
    "a standard deviation of infinity": (architecture_with(std=[1, float("inf"), 1]), "std"),
    "a mean too large for a float": (architecture_with(mean=[0.5, 10**400, 0.5]), "mean"),
    **{f"top_k {k!r}": (header_with(top_k=k), "top_k") for k in (0, 3, -1, "1", 1.5, True)},
}


def spoilt_copy(good: Path, path: Path, spoil: Spoil) -> Path:
    """Write a changed checkpoint whose digest fits its tensors, so that only the change itself can be found wrong."""
    tensors, values = load_file(good), header_of(good)
    values["top_k"] = None
    keep = copy.deepcopy(values)
    spoil(tensors, values)
    if values.get("weights_sha256") == keep["weights_sha256"]:
        values["weights_sha256"] = weights_digest(tensors)
    save_file(tensors, path, {"palisade": json.dumps(values)})
    return path


def test_an_unspoilt_copy_loads(good: Path, tmp_path: Path) -> None:
    path = spoilt_copy(good, tmp_path / "a.safetensors", lambda tensors, header: None)
    assert read_header(path).class_names == HEADER.class_names
    assert load_checkpoint(path).architecture == TINY


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_checkpoint_is_refused_by_file_and_field(good: Path, tmp_path: Path, case: str) -> None:
    spoil, named = SPOILT[case]
    path = spoilt_copy(good, tmp_path / "spoilt.safetensors", spoil)
    for read in (load_checkpoint, read_weights):
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
        assert named in str(refusal.value).replace(str(path), "")


# --- abuse: the file as a whole


def cut(good: bytes, length: int) -> bytes:
    return good[:length]


def flipped(good: bytes) -> bytes:
    return good[:-2] + bytes([good[-2] ^ 1]) + good[-1:]  # the low byte of the last bfloat16


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "an empty file": (lambda good: b"", "safetensors"),
    "half a file": (lambda good: cut(good, len(good) // 2), "safetensors"),
    "a file cut within the header": (lambda good: cut(good, 100), "safetensors"),
    "a file without its last byte": (lambda good: cut(good, len(good) - 1), "safetensors"),
    "trailing bytes": (lambda good: good + b"\0" * 8, "safetensors"),
    "random bytes": (lambda good: bytes((i * 73 + 41) % 251 for i in range(5000)), "safetensors"),
    "text": (lambda good: b"version https://git-lfs.github.com/spec/v1\n", "safetensors"),
    "a header length of 2**63": (lambda good: (1 << 63).to_bytes(8, "little") + good[8:], "safetensors"),
    "a flipped bit in the weights": (flipped, "weights_sha256"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_refused_by_name(good: Path, tmp_path: Path, case: str) -> None:
    damage, named = FILES[case]
    path = tmp_path / "damaged.file"
    path.write_bytes(damage(good.read_bytes()))
    for read in (load_checkpoint, read_weights):
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
        assert named in str(refusal.value).replace(str(path), "")


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (None, "palisade"),
        ({"format": "pt"}, "palisade"),
        ({"palisade": ""}, "palisade"),
        ({"palisade": "{"}, "palisade"),
        ({"palisade": "[1, 2]"}, "palisade"),
        ({"palisade": "null"}, "palisade"),
        ({"palisade": "[" * 100_000}, "palisade"),
        ({"palisade": '{"format_version": ' + "1" * 5000 + "}"}, ""),
    ],
    ids=["absent", "foreign", "empty", "cut", "list", "null", "deeply nested", "number of 5000 digits"],
)
def test_metadata_that_are_no_header_are_refused(tmp_path: Path, metadata: dict[str, str] | None, named: str) -> None:
    path = tmp_path / "foreign.file"
    save_file({"a": torch.zeros(2)}, path, metadata)
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert named in str(refusal.value).replace(str(path), "")


def test_a_missing_file_is_refused_with_the_names_that_would_do(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="compact") as refusal:
            load_checkpoint(path)
        assert str(path) in str(refusal.value)


PICKLES: dict[str, Callable[[object, Path], object]] = {
    "torch.save": lambda thing, path: torch.save(thing, path),
    "old torch.save": lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
    "pickle": lambda thing, path: path.write_bytes(pickle.dumps(thing)),
    "text pickle": lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=0)),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_refused_and_never_run(bomb: Bomb, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "evil.pt"
    PICKLES[kind](bomb, path)
    for read in (load_checkpoint, read_weights, read_header):
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
        assert kind == "text pickle" or "pickle" in str(refusal.value)
    assert not bomb.witness.exists()
    torch.load(path, weights_only=False) if "torch" in kind else pickle.loads(path.read_bytes())
    assert bomb.witness.exists(), "the payload is a dud, so this test proves nothing"
