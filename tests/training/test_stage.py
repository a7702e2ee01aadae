"""One stage: it learns, survives a kill at any step, and rolls back when robustness collapses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import training.stage
from model.architecture import Architecture
from model.backbone import ResNet18
from training.data import Split
from training.loading import load_dataset
from training.measure import accuracy_under
from training.pretrain import Alone, ExpertTask
from training.progress import Progress
from training.recipe import ExpertRecipe, Schedule
from training.run_folder import RunFolder
from training.stage import Stage, Trainer, learning_rate, run_stage
from training.task import Figures, Terms
from training.worker import Stop, StopRequested, Worker

CPU = torch.device("cpu")
WORKER = Worker(CPU)
SCHEDULE = Schedule(epochs=4, batch_size=8)
"""Four steps per epoch of 32 images."""


@pytest.fixture(scope="module")
def data(colour_file: Path) -> tuple[Split, Split]:
    return load_dataset(str(colour_file)).split_holdout(10)


@pytest.fixture(autouse=True)
def save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.stage, "SAVE_EVERY", 3)
    monkeypatch.setattr(training.stage, "SAVE_SECONDS", 0)


class SmallTask(ExpertTask):
    """Trains one small expert against N-FGSM; what it is judged and killed by is the test's."""

    def __init__(self, holdout: Split, schedule: Schedule) -> None:
        architecture = Architecture(width=8, num_classes=3, height=8, input_width=8)
        network = Alone(ResNet18(8, 3), architecture).to(memory_format=torch.channels_last)
        super().__init__(network, ExpertRecipe("fgsm", epsilons=(8 / 255,)), schedule, holdout, CPU)
        self.holdout = holdout
        self.judged: Callable[[nn.Module], Figures] = lambda averaged: {
            "clean": accuracy_under(averaged, holdout, None, CPU),
            "robust": 0.5,
        }
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss

    def forward(self, attacked: torch.Tensor, clean: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Terms]:
        loss, _ = super().forward(attacked, clean, targets)
        return self.spoil(loss), {"images": torch.tensor(float(len(attacked)))}

    def judge(self, averaged: nn.Module) -> Figures:
        return self.judged(averaged)


def make_stage(holdout: Split, schedule: Schedule = SCHEDULE, seed: int = 5) -> Stage:
    torch.manual_seed(seed)
    settings = {"schedule": {"epochs": schedule.epochs, "mean": (0.5, 0.5)}, "seed": seed}
    return Stage("alone", SmallTask(holdout, schedule), 3, seed, settings)


def judged_by(stage: Stage, judged: Callable[[nn.Module], Figures]) -> Stage:
    """Return the stage, judged otherwise."""
    assert isinstance(stage.task, SmallTask)
    stage.task.judged = judged
    return stage


def spoilt(stage: Stage, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Stage:
    """Return the stage with its losses changed."""
    assert isinstance(stage.task, SmallTask)
    stage.task.spoil = spoil
    return stage


def killed_at(stage: Stage, step: int) -> Stage:
    """Return the stage, interrupted in its call number ``step``."""
    calls = iter(range(10**6))

    def interrupted(loss: torch.Tensor) -> torch.Tensor:
        if next(calls) == step:
            raise KeyboardInterrupt
        return loss

    return spoilt(stage, interrupted)


def scripted(figures: list[float], seen: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], Figures]:
    """Return a validation that gives these robust accuracies in turn and keeps the weights it was shown."""

    def judge(averaged: nn.Module) -> Figures:
        seen.append({name: value.clone() for name, value in averaged.state_dict().items()})
        return {"robust": figures[len(seen) - 1]}

    return judge


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights as a finished stage stores them."""
    return {name: value.bfloat16().float() if value.ndim > 1 else value for name, value in weights.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def unbroken(data: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, RunFolder]:
    """A run from start to end, which the resumed runs must equal."""
    folder = RunFolder(tmp_path_factory.mktemp("unbroken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.stage, "SAVE_EVERY", 3)
        patch.setattr(training.stage, "SAVE_SECONDS", 0)
        return run_stage(make_stage(data[1]), data[0], folder, WORKER), folder


@pytest.mark.parametrize("steps", [(1,), (3,), (4,), (8,), (15,), (2, 0, 3, 4)], ids=str)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path, steps: tuple[int, ...]
) -> None:
    folder = RunFolder(tmp_path)
    for step in steps:
        stage = make_stage(data[1])
        torch.manual_seed(step)  # a new process has another global state
        with pytest.raises(KeyboardInterrupt):
            run_stage(killed_at(stage, step), data[0], folder, WORKER)
    resumed = run_stage(make_stage(data[1]), data[0], folder, WORKER)
    assert same(resumed.state_dict(), unbroken[0].state_dict())
    assert same(load_file(folder.path / "alone.safetensors"), load_file(unbroken[1].path / "alone.safetensors"))
    assert not resumed.training


def test_a_run_killed_between_logging_and_saving_still_ends_alike(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path
) -> None:
    folder, stage = RunFolder(tmp_path), make_stage(data[1])

    def killed(_: nn.Module) -> Figures:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(judged_by(stage, killed), data[0], folder, WORKER)
    resumed = run_stage(make_stage(data[1]), data[0], folder, WORKER)
    assert same(resumed.state_dict(), unbroken[0].state_dict())


@pytest.mark.parametrize(("seconds", "saved"), [(0, [3, 6, 9, 12, 15]), (30, [9]), (120, [])])
def test_states_are_saved_no_faster_than_is_worth_it(
    data: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, saved: list[int]
) -> None:
    clock = iter(range(0, 10_000, 10))  # ten seconds pass wherever somebody looks
    monkeypatch.setattr(training.stage.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(training.stage, "SAVE_SECONDS", seconds)
    steps, save = list[int](), Progress.save
    monkeypatch.setattr(Progress, "save", lambda self, folder, step: (steps.append(step), save(self, folder, step)))
    run_stage(make_stage(data[1]), data[0], RunFolder(tmp_path), WORKER)
    assert steps == saved


def test_a_finished_stage_is_taken_from_the_folder_without_training(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder]
) -> None:
    stage = make_stage(data[1])
    again = run_stage(killed_at(stage, 0), data[0], unbroken[1], WORKER)
    assert same(again.state_dict(), unbroken[0].state_dict())


def test_another_seed_gives_other_weights(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path
) -> None:
    other = run_stage(replace(make_stage(data[1]), seed=6), data[0], RunFolder(tmp_path), WORKER)
    assert not same(other.state_dict(), unbroken[0].state_dict())


def test_resuming_with_other_settings_is_refused(data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder]) -> None:
    stage = make_stage(data[1])
    changed = replace(stage, settings={**stage.settings, "seed": 99})
    with pytest.raises(ValueError, match="alone was trained with other settings"):
        run_stage(changed, data[0], unbroken[1], WORKER)


def test_a_stage_learns(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    learnt = run_stage(make_stage(data[1], replace(SCHEDULE, epochs=8)), data[0], folder, WORKER)
    assert accuracy_under(learnt, data[1], None, CPU) > 0.8
    losses = [row["loss"] for row in folder.metrics() if "loss" in row]
    assert losses[-1] < losses[0]


def test_progress_is_logged_with_the_held_out_figures(unbroken: tuple[nn.Module, RunFolder]) -> None:
    rows = unbroken[1].metrics()
    assert {row["stage"] for row in rows} == {"alone"}
    assert rows[0]["step"] == 0
    assert {"loss", "lr", "images"} <= rows[0].keys()
    judged = [row for row in rows if "holdout_clean" in row]
    assert [row["step"] for row in judged] == [4, 8, 12, 16]
    assert [row["holdout_robust"] for row in judged] == [0.5] * 4


def test_a_collapse_is_rolled_back_to_the_best_weights_and_logged(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder, seen = RunFolder(tmp_path), list[dict[str, torch.Tensor]]()
    stage = make_stage(data[1])
    result = run_stage(judged_by(stage, scripted([0.3, 0.5, 0.9, 0.1], seen)), data[0], folder, WORKER)
    assert not same(seen[3], seen[2])
    assert same(result.state_dict(), rounded(seen[2]))
    assert same(stage.task.network.state_dict(), seen[2])
    (event,) = [row for row in folder.metrics() if "event" in row]
    assert (event["event"], event["step"], event["robust"], event["best_robust"]) == ("rollback", 16, 0.1, 0.9)


def test_a_collapse_within_the_only_epoch_is_rolled_back_too(data: tuple[Split, Split], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    stage = judged_by(make_stage(data[1], replace(SCHEDULE, epochs=1)), scripted([0.3, 0.5, 0.9, 0.1], seen))
    assert same(run_stage(stage, data[0], RunFolder(tmp_path), WORKER).state_dict(), rounded(seen[2]))


def test_a_collapse_leaves_no_momentum_towards_it(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = judged_by(make_stage(data[1]), scripted([0.9, 0.1, 0.9, 0.9], []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.stage, "SAVE_EVERY", 8)  # the end of the epoch that collapsed
        with pytest.raises(KeyboardInterrupt):
            run_stage(killed_at(stage, 8), data[0], RunFolder(tmp_path), WORKER)
    saved = load_file(tmp_path / "alone.safetensors")
    momenta = [value for name, value in saved.items() if name.startswith("optimiser/")]
    assert len(momenta) == len(list(stage.task.network.parameters()))
    assert not any(value.any() for value in momenta)


@pytest.mark.parametrize("killed", [None, 10], ids=["unbroken", "killed after it"])
def test_after_a_collapse_one_step_attacks_take_two(
    data: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int | None
) -> None:
    steps = dict[int, int]()
    judge = scripted([0.9, 0.1, 0.9, 0.9], [])
    stage = judged_by(make_stage(data[1]), judge)
    monkeypatch.setattr(Trainer, "step", counting(Trainer.step, steps))
    if killed:
        with pytest.raises(KeyboardInterrupt):
            run_stage(killed_at(stage, killed), data[0], RunFolder(tmp_path), WORKER)
        stage = judged_by(make_stage(data[1]), judge)
    run_stage(stage, data[0], RunFolder(tmp_path), WORKER)
    assert steps == {step: 1 if step < 8 else 2 for step in range(16)}


def counting(take: Callable[[Trainer, int], Any], steps: dict[int, int]) -> Callable[[Trainer, int], Any]:
    """Return a trainer's step that counts its attack's passes through the network: those in eval mode."""

    def counted(trainer: Trainer, step: int) -> Any:
        passes = list[bool]()
        network = trainer._stage.task.network
        hook = network.register_forward_hook(lambda module, *_: passes.append(module.training))
        with hook:
            taken = take(trainer, step)
        steps[step] = passes.count(False)
        return taken

    return counted


def test_training_goes_on_from_the_best_weights_after_a_collapse(data: tuple[Split, Split], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    stage = judged_by(make_stage(data[1]), scripted([0.9, 0.1, 0.8, 0.95], seen))
    result = run_stage(stage, data[0], RunFolder(tmp_path), WORKER)
    assert len(seen) == 4
    assert same(result.state_dict(), rounded(seen[3]))
    assert not same(seen[3], seen[0])


def test_a_run_killed_after_a_best_epoch_still_rolls_back_to_it(data: tuple[Split, Split], tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    judge = scripted([0.5, 0.6, 0.9, 0.1], seen)
    stage = judged_by(make_stage(data[1]), judge)
    with pytest.raises(KeyboardInterrupt):
        run_stage(killed_at(stage, 15), data[0], RunFolder(tmp_path), WORKER)
    result = run_stage(judged_by(make_stage(data[1]), judge), data[0], RunFolder(tmp_path), WORKER)
    assert len(seen) == 4
    assert same(result.state_dict(), rounded(seen[2]))


def test_a_small_dip_is_no_collapse(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder, seen = RunFolder(tmp_path), list[dict[str, torch.Tensor]]()
    result = run_stage(judged_by(make_stage(data[1]), scripted([0.9, 0.8, 0.9, 0.7], seen)), data[0], folder, WORKER)
    assert same(result.state_dict(), rounded(seen[3]))
    assert not [row for row in folder.metrics() if "event" in row]


def test_what_chance_explains_is_no_collapse(data: tuple[Split, Split], tmp_path: Path) -> None:
    few = data[1].take(slice(4))
    seen: list[dict[str, torch.Tensor]] = []
    result = run_stage(judged_by(make_stage(few), scripted([0.5, 0.5, 0.5, 0.25], seen)), data[0], RunFolder(tmp_path), WORKER)
    assert same(result.state_dict(), rounded(seen[3]))


def test_a_loss_that_is_not_finite_stops_the_stage_by_name_and_step(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1])
    calls = iter(range(100))

    def exploding(loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan") if next(calls) == 5 else loss

    with pytest.raises(FloatingPointError, match="alone: the loss is nan at step 5"):
        run_stage(spoilt(stage, exploding), data[0], RunFolder(tmp_path), WORKER)
    saved = load_file(tmp_path / "alone.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_exactly(
    data: tuple[Split, Split], unbroken: tuple[nn.Module, RunFolder], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    for taken in range(1, 4):  # every slice of no time takes one step
        with pytest.raises(StopRequested, match="time"):
            run_stage(make_stage(data[1]), data[0], folder, Worker(CPU, stop=Stop(minutes=0)))
        saved = folder.load("alone")
        assert saved is not None
        assert saved[1]["step"] == taken
    resumed = run_stage(make_stage(data[1]), data[0], folder, WORKER)
    assert same(resumed.state_dict(), unbroken[0].state_dict())


def test_a_batch_that_cannot_be_divided_is_refused(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, accumulate=3))
    with pytest.raises(ValueError, match="batch_size 8 can't be divided among 1 workers that each accumulate 3"):
        run_stage(stage, data[0], RunFolder(tmp_path), WORKER)


@pytest.mark.parametrize(
    "change",
    [
        {"augmentation": "idbh"},
        {"cutmix": 1.0},
        {"mixup": 1.0},
        {"trim": 0.25},
        {"weight_perturbation": 0.01},
        {"hold_statistics": False},
        {"swa_from": 0.5},
    ],
    ids=str,
)
def test_every_ingredient_changes_the_result_and_resumes_exactly(
    data: tuple[Split, Split], tmp_path: Path, change: dict[str, Any]
) -> None:
    plain, schedule = replace(SCHEDULE, epochs=1.5), replace(SCHEDULE, epochs=1.5, **change)
    base = run_stage(make_stage(data[1], plain), data[0], RunFolder(tmp_path / "plain"), WORKER)
    whole = run_stage(make_stage(data[1], schedule), data[0], RunFolder(tmp_path / "whole"), WORKER)
    assert not same(base.state_dict(), whole.state_dict())
    with pytest.raises(KeyboardInterrupt):
        run_stage(killed_at(make_stage(data[1], schedule), 5), data[0], RunFolder(tmp_path / "broken"), WORKER)
    resumed = run_stage(make_stage(data[1], schedule), data[0], RunFolder(tmp_path / "broken"), WORKER)
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own doing
def test_a_compiled_network_trains_alike(data: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def trace(module: nn.Module, **options: Any) -> None:  # as torch.compile does, but without a C++ compiler's minute
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", trace)
    losses = []
    for use in (False, True):
        trainer = Trainer(make_stage(data[1], replace(SCHEDULE, precision="float32")), data[0], Worker(CPU, compile=use))
        losses.append([trainer.step(step)[0].item() for step in range(2)])
    assert len(compiled) == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_swa_is_the_mean_of_the_last_steps(data: tuple[Split, Split]) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, epochs=1, swa_from=0.5))
    trainer = Trainer(stage, data[0], WORKER)
    seen = []
    for step in range(4):
        trainer.step(step)
        seen.append({name: value.clone() for name, value in stage.task.network.state_dict().items()})
    for name, value in trainer.progress.averaged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (seen[2][name] + seen[3][name]) / 2)


def test_too_few_images_for_one_batch_are_refused(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, batch_size=33))
    with pytest.raises(ValueError, match="32 training images do not fill one batch of 33"):
        run_stage(stage, data[0], RunFolder(tmp_path), WORKER)


def test_a_fraction_of_an_epoch_is_judged_on_its_way(data: tuple[Split, Split], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run_stage(make_stage(data[1], replace(SCHEDULE, epochs=0.5)), data[0], folder, WORKER)
    assert [row["step"] for row in folder.metrics() if "holdout_clean" in row] == [1, 2]


def test_without_averaging_the_result_is_the_trained_network(data: tuple[Split, Split], tmp_path: Path) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, epochs=0.5, ema_decay=0.0))
    result = run_stage(stage, data[0], RunFolder(tmp_path), WORKER)
    assert same(result.state_dict(), rounded(stage.task.network.state_dict()))


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


def test_losses_are_trimmed_after_three_tenths_of_the_steps(data: tuple[Split, Split]) -> None:
    stage = make_stage(data[1], replace(SCHEDULE, epochs=2.5, trim=0.25))
    shares: list[float] = []

    def note(loss: torch.Tensor) -> torch.Tensor:
        shares.append(stage.task.trim)
        return loss

    trainer = Trainer(spoilt(stage, note), data[0], WORKER)
    for step in range(trainer.steps):
        trainer.step(step)
    assert shares == [0.0] * 3 + [0.25] * 7
