"""The fast path: what it loads, which execution runs a batch, and whether the answers are the reference's."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import tuned
from model.checkpoint import Header, load_checkpoint, read_header, save_checkpoint
from model.device import native_bfloat16, processor
from model.execution import TOLERANCE, Prediction, make_executions
from model.fast_path import FastPath, check_top_k, load_fast_path
from model.mixture import Mixture
from model.plan import Plan
from model.tuned import Identity, Tuning
from tests.model.votes import Predict, check_votes

BATCHES = (1, 2, 4, 5, 33)
MIXED = Plan(((2, "openvino-float32-x3"), (4, "openvino-float32-x1"), (8, "loop-float32")))


@pytest.fixture(scope="module")
def checkpoint(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    names = tuple("abcde")
    save_checkpoint(path, mixture, Header(mixture.architecture, names, weights_sha256=""), torch.float32)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder of tuned choices."""
    tuned.make_folder(tmp_path / "tuned")
    return tmp_path / "tuned"


def keep(folder: Path, checkpoint: Path, plan: Plan, top_k: int | None = None) -> None:
    """Keep a plan as if tuning had chosen it."""
    identity = Identity.here(read_header(checkpoint).weights_sha256, "cpu", top_k=top_k)
    tuned.write(folder, identity, Tuning({plan.precision: plan}, plan.precision, "2026-11-22", processor("cpu")[0]))


def check(path: FastPath, checkpoint: Path, pixels: torch.Tensor, images: torch.Tensor, top_k: int | None = None) -> None:
    """Compare answers with the reference's, for both types of input and ragged batches."""
    reference = load_checkpoint(checkpoint)
    reference.top_k = top_k
    with torch.no_grad():
        expected = reference(images).exp().numpy()
        gate = reference.components(images)[0].exp().numpy()  # (B, E)
    tolerance = TOLERANCE[path.precision]
    if top_k:
        gate = np.where(gate >= np.sort(gate, axis=1)[:, -top_k, None], gate, 0)
        gate /= gate.sum(axis=1, keepdims=True)
    for batch in BATCHES:
        for inputs in (pixels[:batch].numpy(), images[:batch].numpy()):
            got = path.predict(inputs)
            assert got.probabilities.dtype == got.gate.dtype == np.float32
            assert np.abs(got.probabilities - expected[:batch]).max() <= tolerance
            assert np.abs(got.gate - gate[:batch]).max() <= tolerance


def test_a_batch_goes_to_the_execution_that_the_plan_names() -> None:
    class Named:
        def __init__(self, number: float) -> None:
            self.number, self.batches = number, list[int]()

        def predict(self, images: np.ndarray) -> Prediction:
            self.batches.append(len(images))
            return Prediction(np.full((len(images), 10), self.number, np.float32), np.zeros((len(images), 9), np.float32))

    executions = {name: Named(number) for number, name in enumerate(MIXED.executions)}
    path = FastPath(read_header("compact"), MIXED, executions, "cpu", "chosen here", max_batch_size=20)
    answers = [path.predict(np.zeros((batch, 3, 32, 32), np.uint8)).probabilities for batch in (1, 2, 3, 4, 5, 500)]
    assert [answer[0, 0] for answer in answers] == [0, 0, 1, 1, 2, 2]
    assert path.description == f"{MIXED}; chosen here"
    for execution in executions.values():
        execution.batches.clear()
    path.warm_up()
    assert [execution.batches for execution in executions.values()] == [[1, 2], [4], [8, 16, 20]]


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_the_default_agrees_with_the_reference(
    checkpoint: Path, folder: Path, pixels: torch.Tensor, images: torch.Tensor, precision: str
) -> None:
    path = load_fast_path(checkpoint, "cpu", precision, threads=1, tuned=folder)
    assert path.precision == ("bfloat16" if native_bfloat16("cpu") else "float32") if precision == "auto" else precision
    assert path.version == read_header(checkpoint).weights_sha256[:12]
    assert path.device == "cpu"
    assert path.description.endswith("; chosen by default")
    check(path, checkpoint, pixels, images)


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_agrees_with_the_reference_that_runs_as_many(
    checkpoint: Path, folder: Path, pixels: torch.Tensor, images: torch.Tensor, top_k: int
) -> None:
    path = load_fast_path(checkpoint, "cpu", "float32", top_k, threads=1, tuned=folder)
    check(path, checkpoint, pixels, images, top_k)
    assert ((path.predict(images.numpy()).gate > 0).sum(axis=1) == top_k).all()


def test_a_tuned_plan_is_used_and_agrees(checkpoint: Path, folder: Path, pixels: torch.Tensor, images: torch.Tensor) -> None:
    keep(folder, checkpoint, MIXED)
    path = load_fast_path(checkpoint, "cpu", tuned=folder)
    assert path.plan == MIXED
    assert path.precision == "float32"
    assert path.description == f"{MIXED}; tuned on 2026-11-22 for {processor('cpu')[0]}"
    check(path, checkpoint, pixels, images)


def test_a_tuned_folder_without_the_precision_that_is_asked_for_leaves_the_default(checkpoint: Path, folder: Path) -> None:
    keep(folder, checkpoint, MIXED)
    assert load_fast_path(checkpoint, "cpu", "bfloat16", tuned=folder).description.endswith("chosen by default")


def test_a_tuned_plan_for_another_number_of_experts_is_not_used(checkpoint: Path, folder: Path) -> None:
    keep(folder, checkpoint, Plan(((1, "loop-float32"),)), top_k=2)
    assert load_fast_path(checkpoint, "cpu", tuned=folder).description.endswith("chosen by default")
    assert "tuned" in load_fast_path(checkpoint, "cpu", top_k=2, tuned=folder).description


@pytest.mark.parametrize("name", ["openvino-int8-x3", "aotinductor-float32"])
def test_a_tuned_plan_whose_file_is_gone_leaves_the_default_and_a_warning(
    checkpoint: Path, folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    keep(folder, checkpoint, Plan(((1, name),)))
    assert load_fast_path(checkpoint, "cpu", tuned=folder).description.endswith("chosen by default")
    assert f"the tuned plan ({name}) fails" in caplog.text


def test_int8_needs_tuning(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"precision=int8: there are no choices for this machine in {folder}.*tune --replay"):
        load_fast_path(checkpoint, "cpu", "int8", tuned=folder)
    keep(folder, checkpoint, MIXED)
    with pytest.raises(ValueError, match=r"precision=int8: the choices in .* hold no accepted int8 model"):
        load_fast_path(checkpoint, "cpu", "int8", tuned=folder)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"precision": "float16"}, "precision=float16: use auto, float32, bfloat16, int8"),
        ({"top_k": 4}, "top_k=4: the checkpoint has 3 experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"device": "tpu"}, "device=tpu"),
        ({"device": "cuda:99"}, "device=cuda:99"),
        ({"checkpoint": "nowhere.safetensors"}, "nowhere.safetensors: no such checkpoint"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_with_its_value(
    checkpoint: Path, folder: Path, settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_fast_path(**{"checkpoint": checkpoint, "device": "cpu", "tuned": folder, **settings})  # type: ignore[arg-type]


def test_the_checkpoints_own_top_k_is_the_default_and_all_experts_are_none() -> None:
    header = read_header("compact")
    assert check_top_k(header, None) is None
    assert check_top_k(header, 9) is None
    assert check_top_k(replace(header, top_k=2), None) == 2
    assert check_top_k(replace(header, top_k=2), 9) is None
    assert check_top_k(replace(header, top_k=2), 1) == 1


@pytest.mark.parametrize("name", ["openvino-int8-x3", "aotinductor-float32"])
def test_an_execution_that_is_loaded_from_a_file_needs_it(checkpoint: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is loaded from a file that palisade-serve tune makes"):
        make_executions([name], checkpoint, "cpu")


def test_read_only_images_are_taken_and_left_alone(checkpoint: Path, folder: Path, pixels: torch.Tensor) -> None:
    keep(folder, checkpoint, MIXED)
    path = load_fast_path(checkpoint, "cpu", tuned=folder)
    for batch in BATCHES:
        inputs = pixels[:batch].numpy().copy()
        inputs.setflags(write=False)
        first = path.predict(inputs).probabilities.copy()
        assert np.array_equal(first, path.predict(inputs).probabilities)
        assert np.array_equal(inputs, pixels[:batch].numpy())


def test_the_service_runs_a_checkpoint_on_a_processor_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import numpy as np
from model.fast_path import load_fast_path
path = load_fast_path("compact", "cpu", tuned=Path({str(tmp_path)!r}))
assert path.predict(np.zeros((5, 3, 32, 32), np.uint8)).probabilities.shape == (5, 10)
assert "openvino" in path.description
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_where_openvino_is_missing_torch_runs_the_checkpoint(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("model.plan.has_openvino", lambda: False)
    assert load_fast_path(checkpoint, "cpu", "float32", tuned=folder).description == "loop-float32; chosen by default"
    assert caplog.records == []


@pytest.fixture(scope="module")
def ballot(voters: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ballot") / "ballot.safetensors"
    save_checkpoint(path, voters, Header(voters.architecture, tuple("abcde"), weights_sha256=""), torch.float32)
    return path


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_vote_is_served_as_the_reference_counts_it(
    ballot: Path, folder: Path, images: torch.Tensor, pixels: torch.Tensor, precision: str
) -> None:
    path = load_fast_path(ballot, "cpu", precision, max_batch_size=8, tuned=folder)
    for alone in (True, False):
        check_votes(load_checkpoint(ballot), on(path, alone), TOLERANCE[precision], images, pixels)


def on(path: FastPath, alone: bool) -> Predict:
    return lambda inputs: path.predict(inputs.numpy(), alone)


def test_int8_is_refused_where_the_experts_vote(ballot: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"precision=int8: int8's ranges .* would influence the others' votes"):
        load_fast_path(ballot, "cpu", "int8", tuned=folder)


def test_top_k_is_refused_where_the_experts_vote(ballot: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="top_k=2: the checkpoint's 3 experts vote, and every one has its say"):
        load_fast_path(ballot, "cpu", top_k=2, tuned=folder)
    assert check_top_k(read_header(ballot), 3) is None


def test_where_torch_is_missing_what_needs_it_says_so_and_the_rest_runs(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.execution.has_torch", lambda: False)
    with pytest.raises(ValueError, match=r"loop-float32: torch is not installed.* take precision=auto or float32"):
        make_executions(["loop-float32"], checkpoint, "cpu")
    for precision in ("auto", "float32"):
        assert "openvino" in load_fast_path(checkpoint, "cpu", precision, tuned=folder).description
