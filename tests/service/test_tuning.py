"""Tuning: which plan is chosen from measured rates, and what is accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from model.architecture import PRESETS
from model.checkpoint import Header, read_header
from service.replay import Replay, read_replay
from service.stopwatch import Stopwatch
from service.tuning import Agreement, Judgement, choose, fastest, measure, probe

Arrays = dict[str, np.ndarray]


def rates(**by_name: list[float]) -> dict[str, dict[int, list[float]]]:
    """Medians at batch 1, 8 and 64 as three rounds of measurements."""
    return {
        name.replace("_", "-"): {batch: [value / 2, value, value * 3] for batch, value in zip((1, 8, 64), values, strict=True)}
        for name, values in by_name.items()
    }


def test_the_fastest_at_each_batch_size_is_chosen_by_the_median() -> None:
    plans = choose(rates(loop_float32=[1, 2, 9], grouped_float32=[3, 4, 5], openvino_float32_x1=[2, 3, 4]))
    assert str(plans["float32"]) == "grouped-float32 up to 8, loop-float32 beyond"


def test_fewer_executions_are_preferred_when_hardly_slower() -> None:
    nearly = rates(loop_float32=[100, 98, 97], grouped_float32=[50, 100, 60], openvino_float32_x1=[40, 40, 100])
    assert str(choose(nearly)["float32"]) == "loop-float32"
    clearly = rates(loop_float32=[100, 98, 96], grouped_float32=[50, 100, 60], openvino_float32_x1=[40, 40, 100])
    assert str(choose(clearly)["float32"]) == "loop-float32 up to 8, openvino-float32-x1 beyond"


def test_of_equally_few_executions_the_fastest_are_chosen() -> None:
    plans = choose(rates(loop_float32=[98, 98, 98], grouped_float32=[100, 99, 100], openvino_float32_x1=[99, 100, 99]))
    assert str(plans["float32"]) == "grouped-float32"


def test_each_precision_has_its_plan_and_the_fastest_over_all_batch_sizes_is_the_default() -> None:
    measured = rates(loop_float32=[100, 100, 100], loop_bfloat16=[60, 200, 300], openvino_int8_x3=[60, 190, 290])
    plans = choose(measured)
    assert {name: str(plan) for name, plan in plans.items()} == {
        "float32": "loop-float32",
        "bfloat16": "loop-bfloat16",
        "int8": "openvino-int8-x3",
    }
    assert fastest(plans, measured) == "bfloat16"
    slow_at_one = rates(loop_float32=[100, 100, 100], loop_bfloat16=[20, 200, 240])
    assert fastest(choose(slow_at_one), slow_at_one) == "float32"  # geometric means 100 and 98.6


def test_executions_take_turns_in_every_round() -> None:
    turns: list[tuple[str, int]] = []

    class Watch:
        def __init__(self, name: str) -> None:
            self.name = name

        def rate(self, batch: int, seconds: float) -> float:
            turns.append((self.name, batch))
            return len(turns) * seconds

    ticks: list[str] = []
    watches = cast(list[Stopwatch], [Watch("a"), Watch("b")])
    found = measure(watches, [1, 8], 2.0, 2, ticks.append)
    assert turns == [("a", 1), ("b", 1), ("a", 8), ("b", 8)] * 2
    assert ticks == [name for name, _ in turns]
    assert found == {"a": {1: [2, 10], 8: [6, 14]}, "b": {1: [4, 12], 8: [8, 16]}}


def test_an_execution_agrees_if_probabilities_and_clear_labels_do() -> None:
    reference = np.array([[0.9, 0.1], [0.52, 0.48], [0.2, 0.8]], np.float32)
    near = np.array([[0.88, 0.12], [0.49, 0.51], [0.2, 0.8]], np.float32)
    agreement = Agreement.between("loop-bfloat16", near, reference)
    assert agreement.largest == pytest.approx(0.03, abs=1e-6)
    assert (agreement.clear_labels_differ, agreement.n) == (0, 3)  # the label that differs is a close call
    assert agreement.holds("loop-bfloat16")
    assert not agreement.holds("loop-float32")
    far = Agreement.between("openvino-int8-x3", reference[:, ::-1], reference)
    assert not far.holds("openvino-int8-x3")


def test_an_execution_of_a_vote_agrees_if_the_means_do_and_few_votes_differ() -> None:
    def told(votes: list[int], mean: list[float]) -> list[float]:
        return [(count + share) / 10 for count, share in zip(votes, mean, strict=True)]

    reference = np.array([told([6, 3], [0.55, 0.45])] * 20, np.float32)
    flipped = reference.copy()
    flipped[0] = told([5, 4], [0.52, 0.48])  # one open vote of 180, which moves the answer by 0.1
    agreement = Agreement.between("loop-bfloat16", flipped, reference, voters=9)
    assert agreement.largest == pytest.approx(0.03, abs=1e-5)
    assert agreement.votes_differ == pytest.approx(1 / 180)
    assert agreement.holds("loop-bfloat16")
    assert not agreement.holds("loop-float32")
    assert Agreement.between("loop-float32", reference, reference, voters=9).holds("loop-float32")
    means_only = np.array([told([0, 0], [0.55, 0.45])] * 20, np.float32)  # an execution that forgets to count
    assert not Agreement.between("loop-bfloat16", means_only, reference, voters=9).holds("loop-bfloat16")
    away = np.array([told([6, 3], [0.7, 0.3])] * 20, np.float32)
    assert not Agreement.between("loop-bfloat16", away, reference, voters=9).holds("loop-bfloat16")


def test_int8_may_lose_three_tenths_of_a_point_and_no_more() -> None:
    def judged(clean: float, attacked: float) -> Judgement:
        return Judgement(1000, {"clean": {"float32": 75, "int8": clean}, "attacked": {"float32": 43, "int8": attacked}})

    assert judged(74.7, 42.7).accepted
    assert judged(76, 45).accepted
    assert not judged(74.6, 43).accepted
    assert not judged(75, 42.6).accepted
    assert str(judged(74.6, 43)) == (
        "int8 is right on clean 74.60 % (float32: 75.00 %), attacked 43.00 % (float32: 43.00 %), n = 1000: "
        "not accepted, as more than 0.3 points are lost"
    )


def test_accuracy_is_counted_against_the_labels_for_clean_and_attacked_images() -> None:
    def answers(*labels: int) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[list(labels)]

    float32 = {"clean": answers(0, 1, 2), "attacked": answers(0, 0, 0)}
    int8 = {"clean": answers(0, 1, 1), "attacked": answers(0, 1, 0)}
    judgement = Judgement.between(np.array([0, 1, 2]), float32, int8)
    assert judgement.n == 3
    assert judgement.percent == {"clean": {"float32": 100, "int8": 66.67}, "attacked": {"float32": 33.33, "int8": 66.67}}
    assert not judgement.accepted


def test_probes_differ_from_each_other_and_fit_any_size() -> None:
    images = probe(replace(PRESETS["compact"], height=18, input_width=33), 5)
    assert images.shape == (5, 3, 18, 33)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 5
    assert images.max() > 200
    assert images.min() < 50


# --- replays


@pytest.fixture
def header() -> Header:
    return read_header("compact")


@pytest.fixture
def arrays(header: Header) -> Arrays:
    """What ``palisade-train replay`` writes, for 8 images."""
    generator = np.random.default_rng(0)
    clean = generator.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    return {
        "clean": clean,
        "attacked": clean.astype(np.float32) / 255,
        "labels": np.arange(8),
        "provenance": np.array(json.dumps({"checkpoint_sha256": header.weights_sha256})),
    }


def save(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "replay.npz", allow_pickle=True, **arrays)  # type: ignore[arg-type]
    return folder / "replay.npz"


def test_no_image_that_int8_is_calibrated_on_judges_it(tmp_path: Path, header: Header, arrays: Arrays) -> None:
    replay = read_replay(save(tmp_path, arrays), header)
    calibration, judged = replay.split()
    assert (len(calibration), len(judged)) == (2, 6)
    assert calibration.labels.tolist() + judged.labels.tolist() == list(range(8))
    assert np.array_equal(calibration.inputs, np.concatenate([arrays["attacked"][:2]] * 2))
    many = Replay(*(np.zeros((4000, *shape), np.uint8) for shape in ((3, 1, 1), (3, 1, 1), ())))  # type: ignore[arg-type]
    assert [len(part) for part in many.split()] == [256, 3744]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attacked": None}, "is no replay"),
        ({"provenance": np.array("{")}, "is no replay"),
        ({"provenance": np.array('{"checkpoint_sha256": "ab"}')}, "attacks the checkpoint ab, this is e24c0dfbd5ab"),
        ({"clean": np.zeros((8, 3, 16, 16), np.uint8)}, r"clean must be \(8, 3, 32, 32\) uint8, not \(8, 3, 16, 16\)"),
        ({"attacked": np.zeros((8, 3, 32, 32))}, "attacked must be .* float32, not .* float64"),
        ({"labels": np.arange(8.0)}, r"labels must be \(8,\) int64"),
        ({"labels": np.array([object()] * 8)}, "is no replay"),
    ],
    ids=["missing", "provenance", "checkpoint", "size", "type", "labels", "pickle"],
)
def test_what_is_no_replay_for_the_checkpoint_is_refused(
    tmp_path: Path, header: Header, arrays: Arrays, change: dict[str, np.ndarray | None], complaint: str
) -> None:
    path = save(tmp_path, {name: array for name, array in (arrays | change).items() if array is not None})
    with pytest.raises(ValueError, match=complaint) as raised:
        read_replay(path, header)
    assert str(path) in str(raised.value)


def test_a_missing_replay_is_refused(tmp_path: Path, header: Header) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.npz is no replay"):
        read_replay(tmp_path / "nowhere.npz", header)
