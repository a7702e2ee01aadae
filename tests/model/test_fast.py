"""The fast execution against the reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from model.fast import TOLERANCE, FastMixture
from model.mixture import Mixture

DTYPES = [torch.float32, torch.bfloat16]
KS = [None, 1, 2, 3]


def with_top_k(mixture: Mixture, k: int | None) -> Mixture:
    changed = Mixture(mixture.architecture, k).eval()
    changed.load_state_dict(mixture.state_dict())
    return changed


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_and_reference_agree_on_ragged_batches_of_either_input_type(
    mixture: Mixture, images: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype, k: int | None
) -> None:
    reference = with_top_k(mixture, k)
    fast, tolerance = FastMixture(reference, dtype), TOLERANCE[dtype]
    with torch.no_grad():
        expected = reference(images).exp()
    largest, second = expected.topk(2, dim=1).values.unbind(dim=1)
    clear = largest - second > 2 * tolerance
    assert clear.sum() >= 10
    for count in (1, 2, 7, 33):
        for inputs in (images[:count], pixels[:count]):
            got = fast.predict(inputs).probabilities
            assert got.shape == (count, 5)
            assert got.dtype == torch.float32
            assert (got - expected[:count]).abs().max() <= tolerance
            assert torch.equal(got.argmax(dim=1)[clear[:count]], expected[:count].argmax(dim=1)[clear[:count]])


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reported_gate_is_the_reference_gate_renormalised_over_the_experts_that_ran(
    mixture: Mixture, images: torch.Tensor, dtype: torch.dtype, k: int | None
) -> None:
    got = FastMixture(with_top_k(mixture, k), dtype).predict(images).gate
    with torch.no_grad():
        gate = mixture.components(images)[0].exp()
    kept = torch.zeros_like(gate).scatter(1, gate.topk(k or 3, dim=1).indices, 1.0) * gate
    assert ((got > 0).sum(dim=1) == (k or 3)).all()
    torch.testing.assert_close(got, kept / kept.sum(dim=1, keepdim=True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_only_chosen_experts_run(mixture: Mixture, images: torch.Tensor, k: int) -> None:
    reference = with_top_k(mixture, k)
    images_seen = [0, 0, 0]
    for index, expert in enumerate(reference.experts):

        def count(_: object, inputs: tuple[torch.Tensor], __: object, index: int = index) -> None:
            images_seen[index] += len(inputs[0])

        expert.register_forward_hook(count)  # the copy inside FastMixture keeps the hook
    prediction = FastMixture(reference, torch.float32).predict(images)
    assert images_seen == (prediction.gate > 0).sum(dim=0).tolist()
    assert sum(images_seen) == 33 * k
    images_seen[:] = [0, 0, 0]
    FastMixture(reference, torch.float32).predict(images[:1])
    assert sorted(images_seen) == [0] * (3 - k) + [1] * k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_left_as_it_was(mixture: Mixture, images: torch.Tensor, dtype: torch.dtype) -> None:
    reference = copy.deepcopy(mixture)
    FastMixture(reference, dtype).predict(images)
    before, after = mixture.state_dict(), reference.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert all(parameter.requires_grad for parameter in reference.parameters())
    assert torch.equal(reference(images), mixture(images))


def test_the_images_are_left_as_they_were(mixture: Mixture, pixels: torch.Tensor, images: torch.Tensor) -> None:
    fast = FastMixture(mixture, torch.float32)
    for inputs in (pixels, images):
        kept = inputs.clone()
        fast.predict(inputs)
        assert torch.equal(inputs, kept)


def test_a_mixture_in_training_mode_is_refused(mixture: Mixture) -> None:
    with pytest.raises(ValueError, match="training mode"):
        FastMixture(copy.deepcopy(mixture).train())


def test_the_type_chosen_by_default_keeps_its_tolerance(mixture: Mixture, images: torch.Tensor) -> None:
    fast = FastMixture(mixture)
    with torch.no_grad():
        expected = mixture(images).exp()
    assert (fast.predict(images).probabilities - expected).abs().max() <= TOLERANCE[fast.dtype]


def test_a_smooth_activation_survives_folding(mixture: Mixture, images: torch.Tensor) -> None:
    torch.manual_seed(2)
    smooth = Mixture(replace(mixture.architecture, activation="silu"))
    smooth.load_state_dict(mixture.state_dict())
    smooth.eval()
    with torch.no_grad():
        expected = smooth(images).exp()
        assert (expected - mixture(images).exp()).abs().max() > 0.1  # the same weights, another network
    assert (FastMixture(smooth, torch.float32).predict(images).probabilities - expected).abs().max() <= TOLERANCE[torch.float32]
