"""One stage: it learns, survives a kill at any step, and rolls back when robustness collapses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import training.stage
from model.architecture import Architecture
from model.backbone import ResNet18
from training.attack import Attack, frozen_statistics, perturb
from training.data import Split, load_dataset
from training.losses import mixture_cross_entropy
from training.measure import accuracy_under
from training.pretrain import Alone
from training.recipe import Schedule
from training.run_folder import RunFolder
from training.stage import Loss, Stage, Values, learning_rate, run_stage

CPU = torch.device("cpu")
STEPS = 12
SCHEDULE = Schedule(epochs=3, batch_size=8)
"""Four steps per epoch of 32 images."""


@pytest.fixture(scope="module")
def data(colour_file: Path) -> tuple[Split, Split]:
    return load_dataset(str(colour_file)).split_holdout(10)


@pytest.fixture(autouse=True)
def save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.stage, "SAVE_EVERY", 3)


def make_stage(holdout: Split, schedule: Schedule = SCHEDULE, seed: int = 5) -> Stage:
    """Return a stage that trains one small expert against N-FGSM."""
    torch.manual_seed(seed)
    architecture = Architecture(width=8, num_classes=3, height=8, input_width=8)
    network = Alone(ResNet18(8, 3), architecture).to(memory_format=torch.channels_last)

    def loss(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Values]:
        with frozen_statistics(network):
            attacked = perturb(network, images, labels, Attack.noise_fgsm(8 / 255), generator)
        return mixture_cross_entropy(network(attacked), labels), {"images": float(len(images))}

    def validate(averaged: nn.Module) -> Values:
        return {"clean": accuracy_under(averaged, holdout, None, CPU), "robust": 0.5}

    settings = {"schedule": {"epochs": schedule.epochs, "mean": (0.5, 0.5)}, "seed": seed}
    return Stage("alone", network, schedule, loss, validate, seed, settings)


def killed_at(loss: Loss, step: int) -> Loss:
    """Return the loss, interrupted in its call number ``step``."""
    calls = iter(range(10**6))

    def interrupted(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Values]:
        if next(calls) == step:
            raise KeyboardInterrupt
        return loss(images, labels, generator)

    return interrupted


def scripted(figures: list[float], seen: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], Values]:
    """Return a validation that gives these robust accuracies in turn and keeps the weights it was shown."""

    def validate(averaged: nn.Module) -> Values:
        seen.append({name: value.clone() for name, value in averaged.state_dict().items()})
        return {"robust": figures[len(seen) - 1]}

    return validate


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def unbroken(data: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, RunFolder]:
    """A run from start to end, which the resumed runs must equal."""
    folder = RunFolder(tmp_path_factory.mktemp("unbroken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.stage, "SAVE_EVERY", 3)
        return run_stage(make_stage(data[1]), data[0], folder, CPU), folder


@pytest.mark.parametrize("steps", [(1,), (3,), (4,), (8,), (11,), (2, 0, 3, 4)], ids=str)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path, steps: tuple[int, ...]
) -> None:
    folder = RunFolder(tmp_path)
    for step in steps:
        stage = make_stage(data[1])
        torch.manual_seed(step)  # a new process has another global state
        with pytest.raises(KeyboardInterrupt):
            run_stage(replace(stage, loss=killed_at(stage.loss, step)), data[0], folder, CPU)
    resumed = run_stage(make_stage(data[1]), data[0], folder, CPU)
    assert same(resumed.state_dict(), unbroken[0].state_dict())
    assert same(load_file(folder.path / "alone.safetensors"), load_file(unbroken[1].path / "alone.safetensors"))
    assert not resumed.training


def test_a_run_killed_between_logging_and_saving_still_ends_alike(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path
) -> None:
    folder, stage = RunFolder(tmp_path), make_stage(data[1])

    def killed(_: nn.Module) -> Values:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(replace(stage, validate=killed), data[0], folder, CPU)
    resumed = run_stage(make_stage(data[1]), data[0], folder, CPU)
    assert same(resumed.state_dict(), unbroken[0].state_dict())


def test_a_finished_stage_is_taken_from_the_folder_without_training(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder]
) -> None:
    stage = make_stage(data[1])
    again = run_stage(replace(stage, loss=killed_at(stage.loss, 0)), data[0], unbroken[1], CPU)
    assert same(again.state_dict(), unbroken[0].state_dict())


def test_another_seed_gives_other_weights(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path
) -> None:
    other = run_stage(replace(make_stage(data[1]), seed=6), data[0], RunFolder(tmp_path), CPU)
    assert not same(other.state_dict(), unbroken[0].state_dict())


def test_resuming_with_other_settings_is_refused(data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder]) -> None:
    stage = make_stage(data[1])
    changed = replace(stage, settings={**stage.settings, "seed": 99})
    with pytest.raises(ValueError, match="'alone' trained with other settings"):
        run_stage(changed, data[0], unbroken[1], CPU)


def test_a_stage_learns(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    learnt = run_stage(make_stage(data[1], replace(SCHEDULE, epochs=8)), data[0], folder, CPU)
    assert accuracy_under(learnt, data[1], None, CPU) > 0.9
    losses = [row["loss"] for row in folder.metrics() if "loss" in row]
    assert losses[-1] < losses[0]


def test_progress_is_logged_with_the_held_out_figures(unbroken: tuple[nn.Module, RunFolder]) -> None:
    rows = unbroken[1].metrics()
    assert {row["stage"] for row in rows} == {"alone"}
    assert rows[0]["step"] == 0
    assert {"loss", "lr", "images"} <= rows[0].keys()
    judged = [row for row in rows if "holdout_clean" in row]
    assert [row["step"] for row in judged] == [4, 8, 12]
    assert [row["holdout_robust"] for row in judged] == [0.5] * 3


def test_a_collapse_is_rolled_back_to_the_best_weights_and_logged(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder, seen = RunFolder(tmp_path), list[dict[str, torch.Tensor]]()
    stage = make_stage(data[1], replace(SCHEDULE, epochs=2))
    result = run_stage(replace(stage, validate=scripted([0.9, 0.1], seen)), data[0], folder, CPU)
    assert not same(seen[1], seen[0])
    assert same(result.state_dict(), seen[0])
    assert same(stage.module.state_dict(), seen[0])
    (event,) = [row for row in folder.metrics() if "event" in row]
    assert (event["event"], event["step"], event["robust"], event["best_robust"]) == ("rollback", 8, 0.1, 0.9)


def test_a_collapse_leaves_no_momentum_towards_it(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = replace(make_stage(data[1], replace(SCHEDULE, epochs=2)), validate=scripted([0.9, 0.1], []))
    run_stage(stage, data[0], RunFolder(tmp_path), CPU)
    saved = load_file(tmp_path / "alone.safetensors")
    momenta = [value for name, value in saved.items() if name.startswith("optimiser/")]
    assert len(momenta) == len(list(stage.module.parameters()))
    assert not any(value.any() for value in momenta)


def test_training_goes_on_from_the_best_weights_after_a_collapse(data: tuple[Split, Split], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    stage = replace(make_stage(data[1]), validate=scripted([0.9, 0.1, 0.95], seen))
    result = run_stage(stage, data[0], RunFolder(tmp_path), CPU)
    assert len(seen) == 3
    assert same(result.state_dict(), seen[2])
    assert not same(seen[2], seen[0])


def test_a_run_killed_after_a_best_epoch_still_rolls_back_to_it(data: tuple[Split, Split], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    stage = replace(make_stage(data[1], replace(SCHEDULE, epochs=2)), validate=scripted([0.9, 0.1], seen))
    with pytest.raises(KeyboardInterrupt):
        run_stage(replace(stage, loss=killed_at(stage.loss, 7)), data[0], RunFolder(tmp_path), CPU)
    fresh = make_stage(data[1], replace(SCHEDULE, epochs=2))
    result = run_stage(replace(fresh, validate=stage.validate), data[0], RunFolder(tmp_path), CPU)
    assert len(seen) == 2
    assert same(result.state_dict(), seen[0])


def test_a_small_dip_is_no_collapse(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder, seen = RunFolder(tmp_path), list[dict[str, torch.Tensor]]()
    stage = make_stage(data[1], replace(SCHEDULE, epochs=2))
    result = run_stage(replace(stage, validate=scripted([0.9, 0.7], seen)), data[0], folder, CPU)
    assert same(result.state_dict(), seen[1])
    assert not [row for row in folder.metrics() if "event" in row]


def test_a_loss_that_is_not_finite_stops_the_stage_by_name_and_step(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1])
    calls = iter(range(100))

    def exploding(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Values]:
        loss, values = stage.loss(images, labels, generator)
        return (loss * float("nan") if next(calls) == 5 else loss), values

    with pytest.raises(FloatingPointError, match="alone: the loss is nan at step 5"):
        run_stage(replace(stage, loss=exploding), data[0], RunFolder(tmp_path), CPU)
    saved = load_file(tmp_path / "alone.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_too_few_images_for_one_batch_are_refused(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, batch_size=33))
    with pytest.raises(ValueError, match="32 training images do not fill one batch of 33"):
        run_stage(stage, data[0], RunFolder(tmp_path), CPU)


def test_a_fraction_of_an_epoch_is_judged_once_at_its_end(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run_stage(make_stage(data[1], replace(SCHEDULE, epochs=0.5)), data[0], folder, CPU)
    assert [row["step"] for row in folder.metrics() if "holdout_clean" in row] == [2]


def test_without_averaging_the_result_is_the_trained_network(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, epochs=0.5, ema_decay=0.0))
    result = run_stage(stage, data[0], RunFolder(tmp_path), CPU)
    assert same(result.state_dict(), stage.module.state_dict())


@pytest.mark.parametrize("steps", [10, 400])
@pytest.mark.parametrize(("warmup", "final"), [(0.15, 0.1), (0.5, 0.0), (0.0, 0.25)])
def test_the_learning_rate_climbs_to_its_peak_once_and_falls_to_its_end(steps: int, warmup: float, final: float) -> None:
    schedule = Schedule(epochs=1, peak_lr=0.2, warmup=warmup, final_lr=final)
    rates = [learning_rate(schedule, step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    one_step = 0.2 / (steps * (1 - warmup))
    assert max(rates) == pytest.approx(0.2, abs=one_step)
    assert max(rates) <= 0.2
    assert peak == pytest.approx(warmup * steps, abs=1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(final * 0.2, abs=one_step)
    if warmup:
        assert 0 < rates[0] <= 0.2 / (warmup * steps)
