"""The fast executions against the reference."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from model.fast import TOLERANCE, FastMixture
from model.fast_compiled import CompiledMixture
from model.fast_dense import DenseMixture
from model.fast_graphs import GraphedMixture
from model.fast_package import PackagedMixture, export_package
from model.mixture import Mixture
from tests.model.votes import check_votes

DTYPES = [torch.float32, torch.bfloat16]
KS = [None, 1, 2, 3]
Make = Callable[[str, torch.dtype], Any]

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler (g++ or $CXX)")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DENSE = [
    *((name, dtype) for name in ("looped", "stacked", "stacked by two") for dtype in DTYPES),
    pytest.param(("compiled", torch.float32), marks=needs_compiler),
    pytest.param(("packaged", torch.bfloat16), marks=needs_compiler),
    *(pytest.param((name, dtype), marks=needs_cuda) for name in ("graphed", "graphed by two") for dtype in DTYPES),
]
dense = pytest.mark.parametrize("fast", DENSE, ids=lambda case: f"{case[0]} {case[1]}", indirect=True)
every = pytest.mark.parametrize(
    "fast", [("loop", torch.float32), *DENSE], ids=lambda case: f"{case[0]} {case[1]}", indirect=True
)


def with_top_k(mixture: Mixture, k: int | None) -> Mixture:
    changed = Mixture(mixture.architecture, k).eval()
    changed.load_state_dict(mixture.state_dict())
    return changed


@pytest.fixture(scope="module")
def shallow(mixture: Mixture) -> Mixture:
    """The mixture without the second block of every stage: as varied to a compiler, and compiled in half the time."""
    cut = copy.deepcopy(mixture)
    for expert in cut.experts:
        expert.blocks = nn.Sequential(*list(expert.blocks)[::2])
    return cut


@pytest.fixture(scope="module")
def make(shallow: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Make an execution of the shallow mixture, each once: compiling takes seconds."""
    folder = tmp_path_factory.mktemp("compiled")

    @cache
    def made(name: str, dtype: torch.dtype) -> Any:
        if name == "loop":
            return FastMixture(shallow, dtype)
        if name == "looped":
            return DenseMixture(shallow, dtype, stack=1)
        if name.startswith("stacked"):
            return DenseMixture(shallow, dtype, stack=2 if name.endswith("two") else None)
        if name == "compiled":
            return CompiledMixture(shallow, dtype)
        if name == "packaged":
            path = folder / f"{dtype}.pt2"
            export_package(shallow, path, dtype)
            return PackagedMixture(path)
        on_device = copy.deepcopy(shallow).cuda()
        return GraphedMixture(on_device, dtype, max_batch=6, stack=2 if name.endswith("two") else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "generated"))
        yield made


@pytest.fixture
def fast(make: Make, request: pytest.FixtureRequest) -> Iterator[Any]:
    made = make(*request.param)
    with torch.compiler.set_stance("fail_on_recompile"):  # no batch waits for the compiler
        yield made


def check_against(reference: Mixture, fast: Any, images: torch.Tensor, pixels: torch.Tensor) -> None:
    """Compare on ragged batches of either input type."""
    tolerance = TOLERANCE[fast.dtype]
    with torch.no_grad():
        expected = reference(images).exp()
    largest, second = expected.topk(2, dim=1).values.unbind(dim=1)
    clear = largest - second > 2 * tolerance
    assert clear.sum() >= 10
    for count in (7, 1, 33, 2):
        for inputs in (images[:count], pixels[:count]):
            got = fast.predict(inputs).probabilities.cpu()
            assert got.shape == (count, 5)
            assert got.dtype == torch.float32
            assert (got - expected[:count]).abs().max() <= tolerance
            assert torch.equal(got.argmax(dim=1)[clear[:count]], expected[:count].argmax(dim=1)[clear[:count]])


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_and_reference_agree_on_ragged_batches_of_either_input_type(
    mixture: Mixture, images: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype, k: int | None
) -> None:
    reference = with_top_k(mixture, k)
    check_against(reference, FastMixture(reference, dtype), images, pixels)


@dense
def test_dense_executions_agree_with_the_reference_likewise(
    fast: Any, shallow: Mixture, images: torch.Tensor, pixels: torch.Tensor
) -> None:
    check_against(shallow, fast, images, pixels)


@dense
def test_dense_executions_report_the_gate_of_every_expert(fast: Any, shallow: Mixture, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected = shallow.components(images)[0].exp()
    torch.testing.assert_close(fast.predict(images).gate.cpu(), expected, rtol=0, atol=1e-4)


@every
def test_memory_layout_does_not_matter(fast: Any, shallow: Mixture, images: torch.Tensor) -> None:
    channels_last = images[:4].contiguous(memory_format=torch.channels_last)
    for odd in (channels_last, channels_last[:1], images[::5], images[::5][:1], images.flip(3)[3:5].transpose(2, 3)):
        with torch.no_grad():
            expected = shallow(odd).exp()
        assert (fast.predict(odd).probabilities.cpu() - expected).abs().max() <= TOLERANCE[fast.dtype]


@every
def test_images_that_do_not_fit_are_refused(fast: Any, images: torch.Tensor) -> None:
    for wrong in (images[0], images[:0], images[:, :1], images[..., :8], images[:, :, :8]):
        with pytest.raises(ValueError, match=r"must be \(B, 3, 16, 16\) with B of 1 or more, not \("):
            fast.predict(wrong)
    with pytest.raises(ValueError, match=r"must be uint8, or float32 in \[0, 1\], not torch.float64"):
        fast.predict(images.double())


@every
def test_an_answer_is_not_overwritten_by_the_next(fast: Any, images: torch.Tensor) -> None:
    first = fast.predict(images[:4])
    kept = first.probabilities.clone(), first.gate.clone()
    fast.predict(images[4:8])
    assert torch.equal(first.probabilities, kept[0])
    assert torch.equal(first.gate, kept[1])


@dense
def test_every_batch_size_gives_the_same_answers(fast: Any, images: torch.Tensor) -> None:
    whole = fast.predict(images).probabilities
    for size in range(1, 33):
        torch.testing.assert_close(
            fast.predict(images[-size:]).probabilities, whole[-size:], rtol=0, atol=TOLERANCE[fast.dtype]
        )


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("execution", [DenseMixture, CompiledMixture])
def test_only_the_loop_skips_experts(mixture: Mixture, execution: Callable[[Mixture], object], k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k={k} skips experts, which only the loop does"):
        execution(with_top_k(mixture, k))


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


@pytest.mark.parametrize("execution", [FastMixture, DenseMixture])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_left_as_it_was(
    mixture: Mixture, images: torch.Tensor, dtype: torch.dtype, execution: Callable[[Mixture, torch.dtype], Any]
) -> None:
    reference = copy.deepcopy(mixture)
    execution(reference, dtype).predict(images)
    before, after = mixture.state_dict(), reference.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert all(parameter.requires_grad for parameter in reference.parameters())
    assert torch.equal(reference(images), mixture(images))


@every
def test_the_images_are_left_as_they_were(fast: Any, pixels: torch.Tensor, images: torch.Tensor) -> None:
    for inputs in (pixels, images):
        kept = inputs.clone()
        fast.predict(inputs)
        assert torch.equal(inputs, kept)


@pytest.mark.parametrize("execution", [FastMixture, DenseMixture])
def test_a_mixture_in_training_mode_is_refused(mixture: Mixture, execution: Callable[[Mixture], object]) -> None:
    with pytest.raises(ValueError, match="training mode"):
        execution(copy.deepcopy(mixture).train())


def test_the_type_chosen_by_default_keeps_its_tolerance(mixture: Mixture, images: torch.Tensor) -> None:
    fast = FastMixture(mixture)
    with torch.no_grad():
        expected = mixture(images).exp()
    assert (fast.predict(images).probabilities - expected).abs().max() <= TOLERANCE[fast.dtype]


@pytest.mark.parametrize("execution", [FastMixture, DenseMixture])
def test_a_smooth_activation_survives_folding(
    mixture: Mixture, images: torch.Tensor, execution: Callable[[Mixture, torch.dtype], Any]
) -> None:
    torch.manual_seed(2)
    smooth = Mixture(replace(mixture.architecture, activation="silu"))
    smooth.load_state_dict(mixture.state_dict())
    smooth.eval()
    with torch.no_grad():
        expected = smooth(images).exp()
        assert (expected - mixture(images).exp()).abs().max() > 0.1  # the same weights, another network
    got = execution(smooth, torch.float32).predict(images).probabilities
    assert (got - expected).abs().max() <= TOLERANCE[torch.float32]


def assert_votes_agree(voters: Mixture, fast: Any, images: torch.Tensor, pixels: torch.Tensor) -> None:
    def predict(inputs: torch.Tensor) -> Any:
        probabilities, gate = fast.predict(inputs)
        return probabilities.cpu().numpy(), gate.cpu().numpy()

    check_votes(voters, predict, TOLERANCE[fast.dtype], images, pixels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", [0, 1, 2, 3])
def test_votes_read_from_a_fast_answer_are_the_references(
    voters: Mixture, images: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype, stack: int
) -> None:
    fast = DenseMixture(voters, dtype, stack) if stack else FastMixture(voters, dtype)
    assert_votes_agree(voters, fast, images, pixels)


def test_votes_are_exported_for_the_compiler_with_a_free_batch_size(voters: Mixture, images: torch.Tensor) -> None:
    dense = DenseMixture(voters, torch.float32)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(dense, (images[:2],), dynamic_shapes=shapes).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images)[0], voters(images).exp(), rtol=0, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_votes_survive_a_cuda_graph(voters: Mixture, images: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype) -> None:
    graphed = GraphedMixture(copy.deepcopy(voters).cuda(), dtype, max_batch=6, stack=2)
    assert_votes_agree(voters, graphed, images, pixels)
