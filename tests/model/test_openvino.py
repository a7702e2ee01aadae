"""The execution by OpenVINO against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from model.execution import TOLERANCE
from model.mixture import Mixture

pytest.importorskip("openvino", reason="the extra cpu is not installed")

from model.openvino import OpenVinoMixture, Precision, quantise, save_model
from tests.model.votes import check_votes

Weights = dict[str, npt.NDArray[np.float32]]
PRECISIONS: list[Precision] = ["float32", "bfloat16"]
WAYS = [(1, None), (2, None), (3, None), (2, 3), (1, 1), (3, 2)]  # stack and k; three experts, so a stack of 2 leaves one over


def weights_of(mixture: Mixture) -> Weights:
    return {name: value.numpy().copy() for name, value in mixture.state_dict().items()}


@pytest.fixture(scope="module")
def weights(mixture: Mixture) -> Weights:
    return weights_of(mixture)


@pytest.fixture
def make(mixture: Mixture, weights: Weights) -> Callable[..., OpenVinoMixture]:
    def make(precision: Precision = "float32", stack: int = 3, k: int | None = None, threads: int = 2) -> OpenVinoMixture:
        return OpenVinoMixture(mixture.architecture, weights, precision, stack, k, threads)

    return make


def expected_probabilities(mixture: Mixture, images: torch.Tensor, k: int | None = None) -> torch.Tensor:
    reference = Mixture(mixture.architecture, k).eval()
    reference.load_state_dict(mixture.state_dict())
    with torch.no_grad():
        return reference(images).exp()


def assert_agree(got: npt.NDArray[np.float32], expected: torch.Tensor, tolerance: float) -> None:
    largest, second = expected.topk(2, dim=1).values.unbind(dim=1)
    clear = (largest - second > 2 * tolerance).numpy()
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    assert np.abs(got - expected.numpy()).max() <= tolerance
    assert np.array_equal(got.argmax(axis=1)[clear], expected.numpy().argmax(axis=1)[clear])


@pytest.mark.parametrize(("stack", "k"), WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_agrees_with_the_reference_on_ragged_batches_of_either_input_type(
    make: Callable[..., OpenVinoMixture],
    mixture: Mixture,
    images: torch.Tensor,
    pixels: torch.Tensor,
    precision: Precision,
    stack: int,
    k: int | None,
) -> None:
    runs, expected = make(precision, stack, k), expected_probabilities(mixture, images, k)
    for count in (1, 33, 2, 7):
        for inputs in (images, pixels):
            assert_agree(runs.predict(inputs[:count].numpy()).probabilities, expected[:count], TOLERANCE[precision])


@pytest.mark.parametrize(("stack", "k"), WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_reported_gate_is_the_reference_gate_renormalised_over_the_experts_that_ran(
    make: Callable[..., OpenVinoMixture],
    mixture: Mixture,
    images: torch.Tensor,
    precision: Precision,
    stack: int,
    k: int | None,
) -> None:
    got = make(precision, stack, k).predict(images.numpy()).gate
    with torch.no_grad():
        gate = mixture.components(images)[0].exp()
    kept = torch.zeros_like(gate).scatter(1, gate.topk(k or 3, dim=1).indices, 1.0) * gate
    assert ((got > 0).sum(axis=1) == (k or 3)).all()
    rounding = 1e-5 if precision == "float32" or k in (1, 2) else 0.02  # what chooses experts is never rounded
    np.testing.assert_allclose(got, (kept / kept.sum(dim=1, keepdim=True)).numpy(), rtol=0, atol=rounding)


@pytest.mark.parametrize("k", [1, 2])
def test_experts_that_are_not_chosen_do_not_run(mixture: Mixture, weights: Weights, images: torch.Tensor, k: int) -> None:
    with torch.no_grad():
        chosen = mixture.components(images[:1])[0].topk(k, dim=1).indices[0].tolist()
    poisoned = dict(weights)
    for index in {0, 1, 2} - set(chosen):
        poisoned[f"experts.{index}.head.bias"] = np.full(5, np.nan, np.float32)
    got = OpenVinoMixture(mixture.architecture, poisoned, "float32", 1, k, threads=1).predict(images[:1].numpy())
    assert_agree(got.probabilities, expected_probabilities(mixture, images[:1], k), TOLERANCE["float32"])


@pytest.mark.parametrize("k", [None, 2])
def test_a_prediction_is_not_changed_by_the_next_one(
    make: Callable[..., OpenVinoMixture], images: torch.Tensor, k: int | None
) -> None:
    runs = make(k=k)
    first = runs.predict(images[:4].numpy())
    kept = [part.copy() for part in first]
    second = runs.predict(images[4:8].numpy())
    assert not np.array_equal(second.probabilities, first.probabilities)
    assert all(np.array_equal(part, before) for part, before in zip(first, kept, strict=True))


def test_the_images_are_left_as_they_were_however_they_lie_in_memory(
    make: Callable[..., OpenVinoMixture], mixture: Mixture, images: torch.Tensor, pixels: torch.Tensor
) -> None:
    runs, expected = make(), expected_probabilities(mixture, images)
    for inputs in (images, pixels):
        kept = inputs.numpy().copy()
        turned = np.ascontiguousarray(kept.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # channels last in memory
        turned.flags.writeable = False
        assert_agree(runs.predict(turned).probabilities, expected, TOLERANCE["float32"])
        assert np.array_equal(turned, kept)


@pytest.mark.parametrize("k", [None, 2])
def test_callers_on_several_threads_each_get_the_answer_to_their_own_images(
    make: Callable[..., OpenVinoMixture], mixture: Mixture, images: torch.Tensor, k: int | None
) -> None:
    whole, expected = make(k=k, threads=3), expected_probabilities(mixture, images, k)
    lane = whole.lane(2)
    parts = [slice(start, start + 1 + start % 5) for start in range(28)] * 3
    with ThreadPoolExecutor(3) as threads:
        answers = threads.map(
            lambda part: (whole if part.start % 3 else lane).predict(images[part].numpy()).probabilities, parts
        )
    for part, got in zip(parts, answers, strict=True):
        assert_agree(got, expected[part], TOLERANCE["float32"])


@pytest.mark.parametrize("k", [None, 1])
def test_a_smooth_activation_and_other_shapes_are_built_too(mixture: Mixture, images: torch.Tensor, k: int | None) -> None:
    torch.manual_seed(2)
    smooth = Mixture(replace(mixture.architecture, activation="silu", height=24, input_width=17), k).eval()
    smooth.load_state_dict(mixture.state_dict())
    larger = torch.nn.functional.interpolate(images[:9], (24, 17))
    expected = expected_probabilities(smooth, larger, k)
    assert (expected - expected_probabilities(mixture, larger, k)).abs().max() > 0.1  # the same weights, another network
    runs = OpenVinoMixture(smooth.architecture, weights_of(smooth), "float32", 2, k, threads=1)
    assert_agree(runs.predict(larger.numpy()).probabilities, expected, TOLERANCE["float32"])


def test_a_number_of_experts_that_there_is_not_is_refused(make: Callable[..., OpenVinoMixture]) -> None:
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"stack must be from 1 to 3 .* not {wrong}"):
            make(stack=wrong)
        with pytest.raises(ValueError, match=f"top_k must be from 1 to 3 .* not {wrong}"):
            make(k=wrong)


def test_an_execution_says_what_it_is(make: Callable[..., OpenVinoMixture]) -> None:
    assert make("bfloat16", 2).name == "openvino-bfloat16-x2"
    assert make("float32", 3, 1).name == "openvino-float32-x1"  # chosen experts run one by one


# --- int8


def test_a_quantised_mixture_is_written_and_runs_without_what_quantised_it(
    mixture: Mixture,
    weights: Weights,
    images: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("nncf", reason="the extra tune is not installed")
    capfd.readouterr()
    path = tmp_path / "mixture.xml"
    save_model(quantise(mixture.architecture, weights, 2, images.numpy()), path)
    assert capfd.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "nncf", None)
    runs = OpenVinoMixture.from_file(path, 2, threads=1)
    assert runs.name == "openvino-int8-x2"
    expected = expected_probabilities(mixture, images)
    for count in (1, 33, 7):
        assert_agree(runs.predict(images[:count].numpy()).probabilities, expected[:count], TOLERANCE["int8"])
    assert np.abs(runs.predict(images.numpy()).probabilities - expected.numpy()).mean() < 0.04  # shuffled images: 0.12
    with torch.no_grad():
        gate = mixture.components(images)[0].exp()
    np.testing.assert_allclose(runs.predict(images.numpy()).gate, gate.numpy(), rtol=0, atol=0.02)  # it is not quantised
    assert path.with_suffix(".bin").stat().st_size < 0.5 * sum(values.nbytes for values in weights.values())
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"mixture\.bin"):
        OpenVinoMixture.from_file(path, 2)


def test_quantising_without_nncf_names_the_extra_to_install(
    mixture: Mixture, weights: Weights, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ImportError, match=r"palisade\[tune\]"):
        quantise(mixture.architecture, weights, 1, images.numpy())


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (4, 16, 16, 3), (3, 16, 16)])
def test_calibration_images_of_another_shape_are_refused(mixture: Mixture, weights: Weights, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="calibration images"):
        quantise(mixture.architecture, weights, 1, np.zeros(shape, np.float32))


# --- what a process that only serves has in it

SERVES = """
import sys, threading
import numpy as np
import model.execution
from model.checkpoint import read_weights
from model.openvino import OpenVinoMixture

header, weights = read_weights("compact")
images = np.zeros((2, 3, 32, 32), np.uint8)
for k in (None, 1):
    runs = OpenVinoMixture(header.architecture, weights, "float32", 9, k, threads=1)
    print(np.allclose(runs.predict(images).probabilities.sum(axis=1), 1))
print(sorted({"torch", "torchvision", "nncf"} & sys.modules.keys()), threading.active_count())
"""


def test_serving_needs_no_torch_and_tells_nobody(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", SERVES],
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split("\n") == ["True", "True", "[] 1", ""]
    # When OpenVINO reports that it was imported, it leaves an identity in ~/intel for the next time.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stack", [1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_votes_read_from_an_answer_are_the_references(
    voters: Mixture, images: torch.Tensor, pixels: torch.Tensor, precision: Precision, stack: int
) -> None:
    runs = OpenVinoMixture(voters.architecture, weights_of(voters), precision, stack, threads=2)
    check_votes(voters, lambda inputs: runs.predict(inputs.numpy()), TOLERANCE[precision], images, pixels)
