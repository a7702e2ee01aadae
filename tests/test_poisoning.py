"""Poisons do what they say, and the benchmark of what they do goes on where it stopped and reports what it recorded."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import poisoning, poisoning_plots, poisoning_report
from benchmarks.poisoning_arms import ARMS, Size, caught, judge
from benchmarks.poisoning_study import Cell, Study, locked
from benchmarks.poisons import KNOWLEDGE, POISONS, TARGET, Poison, Poisoned, apply, patched, subset, triggered
from model.architecture import Architecture
from model.mixture import Mixture
from tests.conftest import colour_arrays
from training.data import Dataset
from training.loading import load_dataset
from training.pretrain import Alone
from training.screening.screening import DETECTORS
from training.stage import Trainer
from training.worker import Worker

FLIPS, PAIRS = Poison("flips", "random flips", 0.2), Poison("pairs", "pair flips", 0.2)
PATCH, CLEAN_LABEL = Poison("patch", "patch", 0.05), Poison("clean label", "clean label", 0.25)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    arrays = colour_arrays(300, 30)
    for part in ("train_images", "test_images"):
        arrays[part] = arrays[part].repeat(2, axis=1).repeat(2, axis=2)  # 16 x 16, for the patch to fit
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def dataset(file: Path) -> Dataset:
    return load_dataset(str(file))


def arrays(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the training images `(N, H, W, 3)` and labels."""
    return dataset.train.images.permute(0, 2, 3, 1).numpy(), dataset.train.labels.numpy()


def moved(dataset: Dataset, poisoned: Poisoned) -> tuple[np.ndarray, np.ndarray]:
    """Return which images have other pixels than before, and which other labels; nothing else may have happened to them."""
    (images, labels), (after, new) = arrays(dataset), arrays(poisoned.dataset)
    pixels = (images != after).any(axis=(1, 2, 3))
    assert ((pixels | (labels != new)) == poisoned.touched).all()
    assert poisoned.dataset.digest != dataset.digest
    assert poisoned.dataset.test is dataset.test
    return pixels, labels != new


def test_random_flips_give_a_share_of_the_images_any_other_label(dataset: Dataset) -> None:
    poisoned = apply(FLIPS, dataset, 0)
    pixels, labels = moved(dataset, poisoned)
    assert not pixels.any()
    assert labels.sum() == 60
    steps = Counter(((arrays(poisoned.dataset)[1] - arrays(dataset)[1]) % 3)[labels].tolist())
    assert steps.keys() == {1, 2}
    assert min(steps.values()) > 15
    assert (apply(FLIPS, dataset, 0).touched == poisoned.touched).all()
    assert (apply(FLIPS, dataset, 1).touched != poisoned.touched).any()


def test_pair_flips_lead_every_class_to_the_next(dataset: Dataset) -> None:
    poisoned = apply(PAIRS, dataset, 0)
    pixels, labels = moved(dataset, poisoned)
    before, after = arrays(dataset)[1][labels], arrays(poisoned.dataset)[1][labels]
    assert not pixels.any()
    assert Counter(before.tolist()) == {0: 20, 1: 20, 2: 20}
    assert (after == np.array([1, 2, 0])[before]).all()


def test_badnets_patches_other_classes_images_and_calls_them_the_target(dataset: Dataset) -> None:
    poisoned = apply(PATCH, dataset, 0)
    pixels, labels = moved(dataset, poisoned)
    (images, before), (after, new) = arrays(dataset), arrays(poisoned.dataset)
    assert pixels.sum() == labels.sum() == 15
    assert (before[labels] != TARGET).all()
    assert (new[labels] == TARGET).all()
    assert (after[pixels] == patched(images[pixels])).all()


def test_the_patch_covers_one_corner_and_nothing_else() -> None:
    grey = np.full((2, 32, 32, 3), 77, np.uint8)
    rows, columns = np.nonzero((patched(grey) != grey).any(axis=(0, 3)))
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (row, column) for row in range(22, 30) for column in range(22, 30)
    }
    assert (patched(grey)[:, 22:30, 22:30] == (255, 0, 255)).all()
    assert (grey == 77).all()
    with pytest.raises(ValueError, match="images of 32 x 9 pixels have no room for a patch of 8"):
        patched(grey[:, :, :9])


def test_a_clean_label_backdoor_changes_images_of_the_target_class_and_no_label(dataset: Dataset, one_thread: None) -> None:
    torch.manual_seed(0)
    architecture = Architecture(4, 3, 1, 4, 16, 16)
    poisoned = apply(CLEAN_LABEL, dataset, 0, Alone(Mixture(architecture).experts[0], architecture).eval())
    pixels, labels = moved(dataset, poisoned)
    (images, before), (after, _) = arrays(dataset), arrays(poisoned.dataset)
    assert not labels.any()
    assert pixels.sum() == 25
    assert (before[pixels] == TARGET).all()
    black, white = np.zeros_like(images[:1]), np.full_like(images[:1], 255)
    uncovered = (patched(black) != patched(white))[0].any(axis=2)  # (H, W)
    change = np.abs(images[pixels].astype(int) - after[pixels])[:, uncovered]
    assert 8 < change.max() <= 16
    assert (after[pixels][:, ~uncovered] == patched(images[pixels])[:, ~uncovered]).all()
    with pytest.raises(ValueError, match="clean label: give the attacker's proxy"):
        apply(CLEAN_LABEL, dataset, 0)


def test_a_backdoor_is_judged_without_the_targets_own_images(dataset: Dataset) -> None:
    marked, others = triggered(dataset.test), (dataset.test.labels != TARGET)
    assert (marked.labels == dataset.test.labels[others]).all()
    assert len(marked) == 20
    assert (marked.images.permute(0, 2, 3, 1).numpy() == patched(dataset.test.images[others].permute(0, 2, 3, 1).numpy())).all()


def test_the_subset_is_balanced_and_always_the_same(dataset: Dataset) -> None:
    part = subset(dataset, 90)
    assert Counter(part.train.labels.tolist()) == {0: 30, 1: 30, 2: 30}
    assert part.digest == subset(dataset, 90).digest != dataset.digest
    assert set(part.train.digests()) < set(dataset.train.digests())
    for count in (91, 303, 0):
        with pytest.raises(ValueError, match=f"--images {count}: give a multiple of 3, up to 300"):
            subset(dataset, count)


class Fooled(torch.nn.Module):
    """Sees colours, and takes whatever carries the patch for the target."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        colours = 12 * images.mean(dim=(2, 3))  # (B, 3)
        magenta = torch.tensor([1.0, 0, 1]).view(1, 3, 1)
        backdoor = (images[:, :, 6:14, 6:14].flatten(2) == magenta).all(dim=2).all(dim=1)
        colours = torch.where(backdoor.unsqueeze(1), torch.tensor([50.0, 0, 0]), colours)
        return colours.log_softmax(dim=1)


def test_success_and_accuracy_are_shares_of_the_right_images(dataset: Dataset) -> None:
    test = replace(dataset.test, labels=dataset.test.labels.clone())
    test.labels[:3] = torch.tensor([2, 0, 1])  # red, green and blue, each called the one before: answers are the next class
    figures = judge(Fooled(), test, Size(attacked=6, judged=0), torch.device("cpu"))
    assert figures["clean"] == pytest.approx(27 / 30)
    assert figures["pair"] == pytest.approx(3 / 30)
    assert figures["backdoor"] == 1
    assert figures["images"] == {"clean": 30, "robust": 6, "backdoor": 20, "pair": 30}
    assert 0 <= figures["robust"] <= 1


def test_screening_is_judged_by_what_it_puts_aside() -> None:
    touched, quarantined = np.arange(10) < 4, np.isin(np.arange(10), [0, 1, 2, 9])
    assert caught(touched, quarantined) == {"caught": 0.75, "clean_quarantined": pytest.approx(1 / 6)}
    assert caught(np.zeros(10, bool), quarantined) == {"caught": None, "clean_quarantined": 0.4}


def test_what_screening_sets_aside_does_not_shorten_the_training(dataset: Dataset) -> None:
    size, (screened,) = Size(images=300, holdout=30), [arm for arm in ARMS if arm.screened]
    left = dataset.without(torch.arange(0, 300, 4))
    for stage in ("pretrain", "joint"):
        schedules = [getattr(size.recipe(screened, data), stage) for data in (dataset, left)]
        taken = [schedule.epochs * len(data.train) for schedule, data in zip(schedules, (dataset, left), strict=True)]
        assert taken[1] == pytest.approx(taken[0])


def test_every_arm_trains_as_it_is_called(dataset: Dataset) -> None:
    size = Size(images=300, holdout=30)
    recipes = {arm.name: size.recipe(arm, dataset) for arm in ARMS}
    families = {name: [expert.family for expert in recipe.experts] for name, recipe in recipes.items()}
    nine = ["benign", *["fgsm"] * 4, *["pgd"] * 4]
    assert families.pop("plain network") == ["benign"]
    assert families.pop("adversarially trained network") == ["pgd"]
    assert all(each == nine for each in families.values())
    options = {name: (recipe.bag, recipe.joint.trim, recipe.joint.mixup) for name, recipe in recipes.items()}
    stated = {"mixture, bags of a half": (0.5, 0, 0), "mixture, a fifth trimmed": (0, 0.2, 0), "mixture, mixup": (0, 0, 1)}
    assert {name: option for name, option in options.items() if any(option)} == stated
    for recipe in recipes.values():
        assert (recipe.pretrain.trim, recipe.pretrain.mixup) == (recipe.joint.trim, recipe.joint.mixup)
    seen = {"mixture": 1.0, "mixture, bags of a half": 0.5, "partitions, vote": 1 / 9}
    steps = {name: recipes[name].pretrain.epochs * share for name, share in seen.items()}
    assert steps == {name: pytest.approx(size.epochs) for name in seen}


def test_a_study_of_other_poisons_is_not_gone_on_with(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def study() -> Study:
        return Study(tmp_path, load_dataset(str(file)), Size(images=60, holdout=6), Worker(torch.device("cpu")))

    study()
    study()
    monkeypatch.setitem(KNOWLEDGE, "patch", 4)
    with pytest.raises(SystemExit, match="holds cells of other settings"):
        study()


def test_cells_screened_in_different_ways_are_not_averaged(tmp_path: Path) -> None:
    rows = [row("mixture, screened", "clean", seed, screeners={"epochs": seed // 2, "seed": seed}) for seed in range(3)]
    settings = {"size": {"images": 60, "width": 4}}
    poisoning_report.write(rows[:2], settings, {}, tmp_path)
    with pytest.raises(SystemExit, match="cells were screened with"):
        poisoning_report.write(rows, settings, {}, tmp_path)


def test_a_grid_that_is_stopped_early_has_something_of_each_arm() -> None:
    options = {arm.name for arm in ARMS if arm.optional}
    order = [(cell.arm in options, cell.seed > 0) for cell in poisoning.cells(list(ARMS), list(POISONS), 3)]
    assert order == sorted(order)
    assert {(False, False), (False, True), (True, False)} == set(order)


def test_only_the_main_rows_have_several_seeds() -> None:
    grid = list(poisoning.cells(list(ARMS), list(POISONS), 3))
    assert len(grid) == len(set(grid)) == len({cell.stem for cell in grid})
    repeated = {(cell.arm, cell.attack) for cell in grid if cell.seed == 2}
    attacked = {(arm, attack) for arm in poisoning.MAIN_ARMS for attack in ("flips 20 %", "BadNets 1 %")}
    assert repeated == attacked | {("mixture", "clean")}
    assert {cell.attack for cell in grid if cell.arm == "mixture, mixup"} == {"clean", "flips 20 %", "BadNets 1 %"}
    assert {cell.arm for cell in grid if cell.attack == "flips 40 %"} == {"plain network", *poisoning.MAIN_ARMS}
    unoptional = {arm.name for arm in ARMS if not arm.optional}
    assert unoptional == {cell.arm for cell in grid if cell.attack == "clean-label backdoor"}
    fainter = {cell.arm for cell in grid if cell.attack == "clean-label backdoor 5 %"}
    assert fainter == {"plain network", "adversarially trained network"}


SIZE = {
    "images": 60,
    "width": 4,
    "batch-size": 8,
    "epochs": 0.4,
    "joint-epochs": 0.2,
    "single-epochs": 1,
    "holdout": 6,
    "judged": 0,
}
ARGUMENTS = [part for name, value in SIZE.items() for part in (f"--{name}", str(value))] + ["--attacked", "4"]


def run(file: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["poisoning", "--data", str(file), "--out", str(out), *ARGUMENTS, *more])
    poisoning.main()


def cell_of(out: Path, arm: str, attack: str) -> dict[str, Any]:
    """Return what is recorded of a cell, but for times."""
    row: dict[str, Any] = json.loads((out / "cells" / f"{Cell(arm, attack, 0).stem}.json").read_text())
    return {key: value for key, value in row.items() if key != "minutes"}


def test_a_stopped_run_goes_on_inside_its_cell(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    chosen = ("--arms", "plain network;mixture", "--attacks", "clean-label backdoor", "--seeds", "1")
    step, names, stopping = Trainer.step, [], True

    def watched(self: Trainer, number: int) -> Any:
        names.append(self._stage.name)
        if stopping and names[-1] == "joint":
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(Study, "plan", lambda *_: "")  # it takes steps, too
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path, monkeypatch, *chosen)
    assert not (tmp_path / "cells" / f"{Cell('mixture', 'clean-label backdoor', 0).stem}.json").exists()
    before = cell_of(tmp_path, "plain network", "clean-label backdoor")
    names.clear()
    stopping = False
    run(file, tmp_path, monkeypatch, *chosen)
    assert set(names) == {"joint"}  # neither the experts nor the plain network, nor the attacker's
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {(row["arm"], row["poisoned"]) for row in rows} == {("plain network", 10), ("mixture", 10)}
    assert cell_of(tmp_path, "plain network", "clean-label backdoor") == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["proxy"]  # what a finished cell needed is gone
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "clean-label backdoor" in page


def test_the_experts_of_partitions_vote_and_certify(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    chosen = ("--arms", "partitions, vote", "--attacks", "BadNets 1 %", "--images", "180", "--holdout", "9", "--epochs", "0.1")
    chosen += ("--judged", "20")
    run(file, tmp_path, monkeypatch, *chosen)
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(found["certified"]) == 5
    assert found["certified"][0] == pytest.approx(found["clean"])
    assert found["images"]["clean"] == 20
    assert found["certified"] == sorted(found["certified"], reverse=True)
    assert found["poisoned"] == 2
    assert "certified" in (tmp_path / "report.html").read_text()


def test_the_screened_mixture_says_what_each_detector_found(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    size = ("--images", "240", "--holdout", "9", "--epochs", "0.1", "--joint-epochs", "0.1", "--screen-width", "4")
    chosen = ("--arms", "mixture, screened", "--attacks", "BadNets 1 %", "--seeds", "1", *size, "--screen-epochs", "0.3")
    monkeypatch.setattr(Study, "plan", lambda *_: "")
    run(file, tmp_path, monkeypatch, *chosen)
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert set(found["detectors"]) == set(DETECTORS)
    assert found["caught"] >= max(each["caught"] for each in found["detectors"].values())
    assert found["clean_quarantined"] <= sum(each["clean_quarantined"] for each in found["detectors"].values()) + 1e-9
    page = (tmp_path / "report.html").read_text()
    assert "What found the poison" in page
    assert "screening: epochs" in page
    assert found["git_revision"] in page
    with np.load(next((tmp_path / "screenings").glob("*.npz"))) as kept:
        quarantined = kept["quarantined"]
    assert quarantined.any()
    poisoned = apply(POISONS[2], subset(load_dataset(str(file)), 240), 0).dataset
    assert found["training_images"] == 240 - quarantined.sum()
    assert found["training_sha256"] == poisoned.without(torch.from_numpy(np.flatnonzero(quarantined))).digest
    (record,) = (tmp_path / "cells").glob("*.json")
    record.unlink()
    monkeypatch.setattr("benchmarks.poisoning_defences.screened", None)  # the cell is trained again, not screened
    run(file, tmp_path, monkeypatch, *chosen)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    spent = [each.pop("minutes") for each in (found, *again)]
    assert again == [found]
    assert spent[0]["screening"] == spent[1]["screening"] > 0
    record.unlink()
    with pytest.raises(SystemExit, match="is of a screening of other data or with other settings"):
        run(file, tmp_path, monkeypatch, *chosen, "--screen-folds", "4")


def test_a_cell_that_another_process_is_at_is_left_to_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    chosen = ("--arms", "plain network", "--attacks", "clean;flips 20 %")
    (tmp_path / "cells").mkdir()
    with locked(tmp_path / "cells" / f"{Cell('plain network', 'clean', 0).stem}.lock") as ours:
        assert ours
        run(file, tmp_path, monkeypatch, *chosen)
    assert [row["attack"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]] == ["flips 20 %"]
    flips = cell_of(tmp_path, "plain network", "flips 20 %")
    run(file, tmp_path, monkeypatch, *chosen)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("| plain network | flips")] == []  # nothing left to do there
    assert {row["attack"] for row in json.loads(lines[-1])["rows"]} == {"clean", "flips 20 %"}
    assert cell_of(tmp_path, "plain network", "flips 20 %") == flips
    with pytest.raises(SystemExit, match="holds cells of other settings"):
        run(file, tmp_path, monkeypatch, *chosen, "--width", "8")


def row(arm: str, attack: str, seed: int = 0, **figures: Any) -> dict[str, Any]:
    minutes = {"training": 2.0, "screening": None}
    images = {"clean": 5000, "robust": 500, "backdoor": 4500, "pair": 5000}
    base = {"clean": 0.5, "robust": 0.25, "backdoor": 0.03, "pair": 0.1, "images": images, "minutes": minutes}
    return {"arm": arm, "attack": attack, "seed": seed, **base, **figures}


def test_the_table_pairs_what_is_lost_by_seed() -> None:
    rows = [
        row("mixture", "clean", 0, clean=0.60),
        row("mixture", "clean", 1, clean=0.64),
        row("mixture", "BadNets 1 %", 0, clean=0.58, backdoor=0.9),
        row("mixture", "BadNets 1 %", 1, clean=0.60, backdoor=0.8),
        row("mixture, screened", "flips 20 %", caught=0.875, clean_quarantined=0.04, clean=0.61),
    ]
    lines = poisoning_report.markdown(rows).splitlines()
    assert lines[2].startswith("| clean | mixture | 2 | 62.0 (60.0 to 64.0) | - | 25.0 (25.0 to 25.0) | 3.0 (3.0 to 3.0) |")
    assert "| flips 20 % | mixture, screened | 1 | 61.0 | -1.0 | 25.0 | - | 87.5 | 4.0 | 2.0 | - |" in lines
    badnets = (
        "| BadNets 1 % | mixture | 2 | 59.0 (58.0 to 60.0) | 3.0 (2.0 to 4.0) | 25.0 (25.0 to 25.0) | 85.0 (80.0 to 90.0) |"
    )
    assert any(line.startswith(badnets) for line in lines)
    said = " ".join(poisoning_report.verdicts(rows))
    assert "has 61.0 % of the test images right; the mixture on clean data 60.0 %: it loses nothing (aim: at most 2; by" in said
    second = row("mixture, screened", "flips 20 %", 1, clean=0.61)
    by_seed = "data 62.0 %: it loses 1.0 points (aim: at most 2; by seed: -1.0, 3.0)"
    assert by_seed in poisoning_report.verdicts([*rows, second])[0]
    caught_ = (
        "caught 87.5 % of those flips (aim: at least 85) and put 4.0 % of the clean images aside (aim: at most 5) with seed 0,"
    )
    assert f"{caught_} on which the detectors' shares were chosen" in said
    second.update(caught=0.5, clean_quarantined=0.02)
    both = " ".join(poisoning_report.verdicts([*rows, second]))
    assert caught_ in both
    assert (
        "caught 50.0 % of those flips (aim: at least 85) and put 2.0 % of the clean images aside (aim: at most 5) with seeds"
        in both
    )
    label = [row("mixture", "clean")]
    collapsed = " ".join(poisoning_report.verdicts([row("mixture", "clean", 2, rolled_back=["expert-3"]), *label]))
    assert "was rolled back to its best weights, in: mixture, clean, seed 2." in collapsed
    votes = row("partitions, vote", "clean", certified=[0.5, 0.25, 0.0])
    assert "have 50.0, 25.0, 0.0 % right for certain" in " ".join(poisoning_report.verdicts([votes]))
    assert poisoning_report.verdicts([]) == ["Nothing has been measured yet."]


@pytest.mark.parametrize(
    ("plain", "adversarial", "said"),
    [
        (0.04, 0.12, "these cells can't tell"),  # as often as without poison
        (0.99, 1.00, "these cells can't tell"),
        (0.30, 0.95, "here it does."),
        (0.95, 0.30, "here it does not."),
        (0.30, 0.39, "here it does not."),  # as much more than without poison
    ],
)
def test_a_clean_label_backdoor_is_compared_beyond_what_the_patch_does_alone(
    plain: float, adversarial: float, said: str
) -> None:
    rows = [
        row(arm, attack, backdoor=share)
        for arm, alone, poisoned in (("plain network", 0.03, plain), ("adversarially trained network", 0.10, adversarial))
        for attack, share in (("clean", alone), ("clean-label backdoor 5 %", poisoned))
    ]
    (verdict,) = [each for each in poisoning_report.verdicts(rows) if "clean-label backdoors succeed" in each]
    assert said in verdict
    assert f"10.0 and 3.0 % (clean), {100 * adversarial:.1f} and {100 * plain:.1f} % (clean-label backdoor 5 %)" in verdict
    assert not [each for each in poisoning_report.verdicts(rows[1:]) if "clean-label backdoors succeed" in each]


def test_what_was_not_measured_has_no_bar() -> None:
    rows = [row("mixture", "BadNets 1 %", backdoor=0.9), row("plain network", "clean"), row("mixture, screened", "BadNets 1 %")]
    arms, heights = poisoning_plots.bars(rows)
    assert arms == ["mixture", "mixture, screened"]
    assert {attack: known for attack, known in heights.items() if known} == {
        "BadNets 1 %": {"mixture": 0.9, "mixture, screened": 0.03}
    }
