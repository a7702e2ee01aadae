"""The levels above quick, on a small mixture that is somewhat robust: what they add, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.architecture import Architecture
from model.checkpoint import Header, load_checkpoint, read_header, save_checkpoint
from model.mixture import Mixture
from training.attack import Attack, LogProbs, frozen_statistics, perturb
from training.cli import main
from training.evaluation import curves, examination, report, sanity
from training.evaluation.examination import Examination
from training.evaluation.levels import QUICK, STANDARD
from training.loading import load_dataset
from training.measure import Bench

SHADES = ("red", "green", "blue", "grey")


@dataclass(frozen=True)
class Trained:
    data: Path
    checkpoint: Path

    def command(self, *more: str) -> list[str]:
        start = ["evaluate", "--device", "cpu", "--data", str(self.data), "--checkpoint", str(self.checkpoint)]
        return [*start, *more]


def shade_arrays() -> dict[str, np.ndarray]:
    """Return 8x8 images that are a little red, green, blue or nothing: 8/255 makes some of them another, 64/255 all."""
    generator = np.random.default_rng(4)
    arrays: dict[str, np.ndarray] = {"label_names": np.array(SHADES)}
    for part, count in (("train", 260), ("test", 40)):
        labels = np.arange(count) % 4
        images = generator.integers(80, 120, (count, 8, 8, 3), dtype=np.uint8)
        tints = generator.integers(6, 50, (count, 1, 1), dtype=np.uint8)
        for channel in range(3):
            images[labels == channel, :, :, channel] += tints[labels == channel]
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    return arrays


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "shades.npz", **shade_arrays())
    dataset = load_dataset(str(folder / "shades.npz"))
    architecture = Architecture(width=4, num_classes=4, num_experts=2, gate_width=4, height=8, input_width=8)
    torch.manual_seed(0)
    mixture = Mixture(architecture).train()
    optimiser = torch.optim.Adam(mixture.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / 50)
        rows = torch.randint(len(dataset.train), (64,), generator=generator)
        images, labels = dataset.train.images[rows].float() / 255, dataset.train.labels[rows]
        with frozen_statistics(mixture):
            attacked = perturb(mixture, images, labels, Attack.fgsm(8 / 255), generator)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(mixture(attacked), labels).backward()
        optimiser.step()
    header = Header(architecture, SHADES, "", data={"training_sha256": dataset.digest, "held_out_training_images": 20})
    save_checkpoint(folder / "shades.safetensors", mixture.eval(), header)
    return Trained(folder / "shades.npz", folder / "shades.safetensors")


def shorten(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Attack with fewer steps and points: the tests ask how things go together, not how strong the attacks are."""
    short = Attack.pgd(8 / 255, steps, 2 / 255)
    monkeypatch.setitem(examination.STANDARD, "PGD-50x2", replace(short, restarts=2))
    monkeypatch.setitem(examination.STANDARD, "CW-PGD-20", replace(short, objective="margin"))
    monkeypatch.setattr(curves, "STEPS", (1, 10, 20))
    monkeypatch.setattr(curves, "RADII", (2, 8, 64))
    monkeypatch.setattr(sanity, "SQUARE_QUERIES", 50)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, steps=2)
    few = Attack.pgd(8 / 255, 2, 4 / 255)
    monkeypatch.setitem(report.QUICK, "PGD-10", few)
    monkeypatch.setitem(examination.STANDARD, "PGD-20", few)
    monkeypatch.setattr(examination, "PGD_20", few)


@pytest.fixture(scope="module")
def standard(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a whole evaluation at level standard."""
    folder = tmp_path_factory.mktemp("reports") / "standard"
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten(monkeypatch, steps=15)
        command = trained.command("--n", "30", "--level", "standard", "--corruptions", "--out", str(folder))
        assert main([*command, "--compare", str(trained.checkpoint)]) == 0
    return folder


def test_the_levels_attacks_are_what_their_names_say() -> None:
    attacks = {**QUICK, **STANDARD}
    assert {name: attack.steps for name, attack in attacks.items() if attack} == {
        "FGSM": 1,
        "PGD-10": 10,
        "PGD-20": 20,
        "PGD-50x2": 50,
        "CW-PGD-20": 20,
    }
    assert {name for name, attack in attacks.items() if attack and attack.restarts == 2} == {"PGD-50x2"}
    assert {name for name, attack in attacks.items() if attack and attack.objective == "margin"} == {"CW-PGD-20"}
    assert {attack.epsilon for attack in attacks.values() if attack} == {8 / 255}


def reported(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return values


def test_a_network_that_was_trained_as_usual_passes_every_sanity_check(standard: Path) -> None:
    results = reported(standard)
    checks = ["more_steps", "large_epsilon", "square", "transfer", "partial", "top_k", "gradients", "determinism"]
    assert [finding["check"] for finding in results["sanity"]] == checks
    assert [finding["check"] for finding in results["sanity"] if finding["informational"]] == ["top_k"]  # it is not deployed
    assert [f["check"] for f in results["sanity"] if not f["passed"] and f["check"] != "top_k"] == []
    assert all(finding["figures"] and finding["raised_if"] and finding["meaning"] for finding in results["sanity"])
    assert "MASKED" not in (standard / "table.md").read_text()


def test_the_stronger_attacks_are_run_on_the_networks_that_matter(standard: Path) -> None:
    results = reported(standard)
    attacks = ["clean", "FGSM", "PGD-10", "PGD-20", "PGD-50x2", "CW-PGD-20"]
    assert list(results["attacks"]) == attacks
    assert results["attacks"]["PGD-50x2"]["restarts"] == 2
    assert results["attacks"]["CW-PGD-20"]["objective"] == "margin"
    best = results["best_single_expert"]["name"]
    other = ({"expert 0", "expert 1"} - {best}).pop()
    rows = {name: list(row) for name, row in results["accuracy"].items()}
    assert rows["mixture"] == rows["uniform average"] == rows[best] == rows["checkpoint shades"] == attacks
    assert rows[other] == attacks[:3]
    assert rows["top 1"] == ["clean", "PGD-20"]
    assert "top 2" not in rows  # both experts: the mixture itself
    mixture = {attack: cell["percent"] for attack, cell in results["accuracy"]["mixture"].items()}
    assert 0 < mixture["PGD-20"] < mixture["clean"]
    assert {test["attack"] for test in results["paired_tests"]} == {"clean", "PGD-10", "PGD-50x2"}


def test_transferred_images_are_no_stronger_than_the_mixtures_own(standard: Path) -> None:
    results = reported(standard)
    assert results["transfer"].keys() == {"expert 0", "expert 1"}
    for cell in results["transfer"].values():
        assert cell["percent"] >= results["accuracy"]["mixture"]["PGD-20"]["percent"]


def test_the_curves_meet_the_table(standard: Path) -> None:
    results = reported(standard)
    mixture, found = results["accuracy"]["mixture"], results["curves"]
    assert found["n"] == 30
    by_radius = {point["x"]: point["percent"] for point in found["epsilon"]}
    by_steps = {point["x"]: point["percent"] for point in found["steps"]}
    assert by_radius[8] == by_steps[20] == mixture["PGD-20"]["percent"]
    assert by_steps[10] == mixture["PGD-10"]["percent"]
    assert by_radius[2] > by_radius[8] > by_radius[64] == 0


def test_gate_and_experts_are_described_clean_and_attacked(standard: Path) -> None:
    results = reported(standard)
    for name in ("clean", "PGD-20"):
        weights = np.array(results["gate"][name]["per_class"])
        assert weights.shape == (4, 2)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-3)
        assert 0 <= results["gate"][name]["image_entropy"] <= results["gate"][name]["mean_entropy"] <= np.log(2) + 1e-6
        assert 0 <= results["diversity"][name]["disagreement"] <= 1
    assert results["gate"]["clean"] != results["gate"]["PGD-20"]


def test_the_folder_holds_the_whole_report(standard: Path) -> None:
    plots = {f"{name}.png" for name in ("accuracy", "curves", "gate", "corruptions", "gallery")}
    assert {path.name for path in standard.iterdir()} == {"evaluation.json", "table.md", "report.html", *plots}
    for path in standard.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    page = (standard / "report.html").read_text()
    assert page.count("data:image/png") == 5
    assert "PGD-50x2" in page


def test_masked_gradients_end_with_status_3_after_everything_is_written(
    trained: Trained, tmp_path: Path, brief: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = load_checkpoint(trained.checkpoint)
    for expert in mixture.experts:
        for parameter in expert.head.parameters():
            parameter.mul_(1e6)  # float32 rounds the probabilities to 0 and 1
    path = tmp_path / "saturated.safetensors"
    save_checkpoint(path, mixture, read_header(trained.checkpoint), torch.float32)
    masked = Trained(trained.data, path)
    out = tmp_path / "out"
    assert main(masked.command("--n", "20", "--level", "standard", "--stamp", "--out", str(out))) == 3
    printed = capsys.readouterr()
    results = reported(out)
    failing = [f["check"] for f in results["sanity"] if not f["passed"] and not f["informational"]]
    assert "gradients" in failing
    assert "large_epsilon" in failing
    line = f"MASKED GRADIENTS SUSPECTED: {', '.join(failing)}"
    assert printed.out.startswith(line)
    assert printed.err.splitlines()[-1] == f"palisade-train: {line}"
    assert (out / "table.md").read_text().startswith(line)
    assert "asked gradients suspected" in (out / "report.html").read_text()
    assert read_header(path).metrics["sanity"] == results["sanity"]


def test_a_mixture_that_is_deployed_with_top_k_is_judged_as_deployed(trained: Trained, tmp_path: Path, brief: None) -> None:
    path = tmp_path / "hard.safetensors"
    save_checkpoint(path, load_checkpoint(trained.checkpoint), replace(read_header(trained.checkpoint), top_k=1))
    written = tmp_path / "evaluation.json"
    main(Trained(trained.data, path).command("--n", "10", "--level", "standard", "--json", str(written)))
    results = reported(tmp_path)
    assert results["top_k"] == 1
    assert results["accuracy"]["mixture"]["clean"] == results["accuracy"]["top 1"]["clean"]
    (finding,) = [finding for finding in results["sanity"] if finding["check"] == "top_k"]
    assert not finding["informational"]
    assert results["gate"]["clean"]["image_entropy"] == pytest.approx(0, abs=1e-6)


def test_the_full_level_runs_the_chosen_attacks_and_goes_on_with_what_is_recorded(
    trained: Trained, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Examination, "run", lambda self: {})  # level standard's part, which has its own tests
    out = tmp_path / "out"
    arguments = trained.command("--n", "8", "--level", "full", "--attacks", "apgd-ce", "--out", str(out))
    assert main(arguments) == 0
    results = reported(out)
    found = results["autoattack"]
    assert (found["name"], found["n"]) == ("APGD-CE", 8)
    (row,) = found["attacks"]
    assert row["name"] == "APGD-CE"
    assert row["percent"] == pytest.approx(100 * row["robust_after"] / 8)
    assert row["percent"] <= results["accuracy"]["mixture"]["PGD-10"]["percent"]
    assert "APGD-CE on the mixture" in capsys.readouterr().out

    recorded = (out / "autoattack.jsonl").read_text()
    forged = recorded.replace("true", "false")  # goes on from the record: now no image survives
    (out / "autoattack.jsonl").write_text(forged)
    main(arguments)
    assert reported(out)["autoattack"]["attacks"][0]["robust_after"] == 0
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 1
    assert "another evaluation (seed differ)" in capsys.readouterr().err


def test_a_full_evaluation_that_was_killed_measures_nothing_twice(
    trained: Trained, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, correct, calls = tmp_path / "other.safetensors", Bench.correct, list[str]()

    def counted(bench: Bench, network: LogProbs, attack: Attack | None, crafted_on: LogProbs | None = None) -> torch.Tensor:
        calls.append(str(attack))
        if len(calls) == lives:
            raise KeyboardInterrupt
        return correct(bench, network, attack, crafted_on)

    def measured(folder: str) -> dict[str, Any]:
        calls.clear()
        shared = ("--n", "4", "--level", "full", "--attacks", "apgd-ce", "--compare", str(other))
        main(trained.command(*shared, "--out", str(tmp_path / folder)))
        return reported(tmp_path / folder)["accuracy"] if lives < 0 else {}

    monkeypatch.setattr(Bench, "correct", counted)
    monkeypatch.setattr(Examination, "_check", lambda *_: [])  # sanity checks are made again
    shutil.copy(trained.checkpoint, other)
    lives = -1
    expected, whole = measured("whole"), len(calls)
    lives = whole // 2
    measured("killed")
    lives = -1
    assert measured("killed") == expected
    assert len(calls) == whole - whole // 2 + 1
    measured("killed")
    again = len(calls)  # curves
    save_checkpoint(other, load_checkpoint(other).requires_grad_(False).apply(halved), read_header(other))
    measured("whole")
    assert len(calls) == again + len(QUICK) + len(STANDARD)  # other weights in a file of that name


def halved(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.mul_(0.5)


def test_corruptions_are_measured_when_asked_for(standard: Path) -> None:
    corruptions = reported(standard)["corruptions"]
    assert len(corruptions["names"]) == 15
    assert all(len(row) == 5 for row in corruptions["names"].values())
    assert corruptions["n"] == 30
    assert corruptions["mean"] == pytest.approx(np.mean(list(corruptions["names"].values())), abs=0.01)
    assert "15 common corruptions" in (standard / "table.md").read_text()


def test_a_vote_is_examined_without_what_only_a_gate_has(trained: Trained, tmp_path: Path, brief: None) -> None:
    header, mixture = read_header(trained.checkpoint), load_checkpoint(trained.checkpoint)
    architecture = replace(header.architecture, aggregation="vote")
    voters = Mixture(architecture).eval()
    voters.experts.load_state_dict(mixture.experts.state_dict())
    path, figures = tmp_path / "vote.safetensors", tmp_path / "figures.json"
    save_checkpoint(path, voters, replace(header, architecture=architecture))
    main(trained.command("--checkpoint", str(path), "--n", "8", "--level", "standard", "--json", str(figures)))
    results = json.loads(figures.read_text())
    assert "gate" not in results
    assert "certified" not in results  # its experts shared their data
    assert "cross-entropy (PGD) lower the mean" in results["surrogate"]
    assert not [name for name in results["accuracy"] if name.startswith("top")]
    checks = [finding["check"] for finding in results["sanity"]]
    assert checks == ["more_steps", "large_epsilon", "square", "transfer", "gradients", "determinism"]
