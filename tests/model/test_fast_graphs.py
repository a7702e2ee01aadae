"""What of the CUDA graphs needs no CUDA device; their answers are compared in test_fast.py where there is one."""

from __future__ import annotations

import pytest
import torch

from model.fast_graphs import GraphedMixture, bucket_for, buckets_up_to
from model.mixture import Mixture


@pytest.mark.parametrize(
    ("max_batch", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (64, (1, 2, 4, 8, 16, 32, 64)), (65, (1, 2, 4, 8, 16, 32, 64, 65))],
)
def test_buckets_are_powers_of_two_and_the_largest_batch(max_batch: int, expected: tuple[int, ...]) -> None:
    assert buckets_up_to(max_batch) == expected


@pytest.mark.parametrize(("batch", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12)])
def test_a_batch_runs_in_the_smallest_bucket_that_holds_it(batch: int, expected: int) -> None:
    assert bucket_for(batch, (1, 2, 4, 8, 12)) == expected


@pytest.mark.parametrize("batch", [-1, 0, 13])
def test_a_batch_that_no_bucket_holds_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 12 images .* not {batch}"):
        bucket_for(batch, (1, 2, 4, 8, 12))


@pytest.mark.parametrize("max_batch", [0, -4])
def test_there_are_no_buckets_for_no_images(max_batch: int) -> None:
    with pytest.raises(ValueError, match=f"max_batch must be 1 or more, not {max_batch}"):
        buckets_up_to(max_batch)


def test_a_mixture_on_the_cpu_is_refused(mixture: Mixture) -> None:
    with pytest.raises(ValueError, match="need a mixture on a CUDA device, not on cpu"):
        GraphedMixture(mixture, torch.float32)
