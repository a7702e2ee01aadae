"""Thieves learn from answers, policies show them less, and a run that was stopped goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import black_box, extraction, growth
from benchmarks.extraction_adaptive import recovery, repeats
from benchmarks.extraction_thief import Student, adaptive, augmenting, library, random
from benchmarks.extraction_victim import POLICIES, Pool, as_targets, shown
from benchmarks.record import Record
from service.policy import Policy

SMALL = Student(width=4, epochs=3.0)


BRIEF = Student(width=4, epochs=0.1)


def colour_model(images: np.ndarray) -> np.ndarray:
    """Return probabilities ``(N, 3)`` that follow how red, green and blue an image is."""
    means = images.mean(axis=(2, 3)) / (255 if images.dtype == np.uint8 else 1)
    odds = np.exp(12 * (means - means.mean(axis=1, keepdims=True)))
    return np.asarray((odds / odds.sum(axis=1, keepdims=True)).astype(np.float32))


def coloured(count: int, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    images = chance.integers(0, 120, (count, 3, 16, 16))
    images[np.arange(count), chance.integers(0, 3, count)] += 100
    return images.astype(np.uint8)


@pytest.fixture(scope="module")
def pool() -> Pool:
    images = coloured(96, 0)
    images = np.concatenate([images, images[..., ::-1]])
    exact = colour_model(images)
    return Pool(images, exact.argmax(axis=1), exact)


def agreement(clone: object, images: np.ndarray) -> float:
    import torch

    with torch.no_grad():
        found = clone(torch.from_numpy(images).float() / 255)  # type: ignore[operator]
    return float((found.argmax(dim=1).numpy() == colour_model(images).argmax(axis=1)).mean())


def test_a_thief_with_answers_agrees_with_the_model_more_than_one_with_noise(pool: Pool, one_thread: None) -> None:
    unseen = coloured(300, 1)
    answered = random(pool, as_targets, 96, 0, SMALL)
    noise = np.random.default_rng(2).dirichlet(np.ones(3), 96)
    misled = random(pool, lambda exact: noise[: len(exact)], 96, 0, SMALL)
    assert agreement(answered.clone, unseen) > 0.7
    assert agreement(answered.clone, unseen) > agreement(misled.clone, unseen) + 0.2


def test_copycat_and_random_knockoff_are_one_thief(pool: Pool, one_thread: None) -> None:
    thefts = [library(attack, pool, as_targets, 40, 3, BRIEF) for attack in ("KnockoffNets", "CopycatCNN")]
    assert (thefts[0].images == thefts[1].images).all()
    assert agreement(thefts[0].clone, pool.images) == agreement(thefts[1].clone, pool.images)
    assert len(np.unique(thefts[0].images, axis=0)) == 40


def test_the_adaptive_thief_asks_nothing_twice_and_keeps_to_its_budget(pool: Pool, one_thread: None) -> None:
    theft = adaptive(pool, as_targets, 96, 0, BRIEF)
    assert len(np.unique(theft.images, axis=0)) == len(theft.images) == 96


def test_an_augmenting_thief_moves_its_photos_by_a_tenth(pool: Pool, one_thread: None) -> None:
    theft = augmenting(pool, as_targets, 150, 0, BRIEF, colour_model)
    photos, made = theft.images[:96].astype(int), theft.images[96:].astype(int)
    assert len(made) == 54
    nearest = np.abs(made[:, None] - photos[None]).max(axis=(2, 3, 4)).min(axis=1)
    assert nearest.max() <= 26
    assert np.allclose(theft.exact, colour_model(theft.images))


def test_a_budget_that_the_pool_cannot_fill_is_refused(pool: Pool) -> None:
    assert len(pool.offered(96)) == 96
    assert len(pool.offered(97)) == 192
    with pytest.raises(ValueError, match="a budget of 193 queries, but the pool has 192 images"):
        pool.offered(193)


def test_policies_distort_answers_in_the_order_of_what_they_show() -> None:
    exact = np.random.default_rng(0).dirichlet(np.full(10, 0.5), 500)
    lost = {name: np.abs(shown(policy, exact) - exact).sum(axis=1).mean() for name, policy in POLICIES.items()}
    assert lost["full"] < 1e-8
    assert lost["full"] < lost["4 decimals"] < lost["2 decimals"] < lost["1 decimal"] < lost["label only"]
    assert lost["2 decimals"] < lost["top 3, 2 decimals"] < lost["top 1, 2 decimals"]
    for policy in POLICIES.values():
        answers = shown(policy, exact)
        assert (answers.argmax(axis=1) == exact.argmax(axis=1))[np.sort(answers)[:, -1] > np.sort(answers)[:, -2]].all()
        assert as_targets(answers).sum(axis=1) == pytest.approx(1)


def test_what_an_answer_hides_is_spread_over_the_hidden_classes() -> None:
    assert as_targets(np.array([[0.6, 0.2, 0.0, 0.0]])).tolist() == [pytest.approx([0.6, 0.2, 0.1, 0.1])]
    assert as_targets(np.array([[0.0, 1.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("name", ["reverse sigmoid", "1 decimal"])
def test_who_knows_the_policy_comes_closer_to_the_exact_answers(name: str) -> None:
    scores = np.exp(2.5 * np.random.default_rng(5).normal(size=(200, 10)))
    exact = scores / scores.sum(axis=1, keepdims=True)
    answers = shown(POLICIES[name], exact)
    guesses = recovery(POLICIES[name], 10, seed=0)(answers)
    assert guesses.sum(axis=1) == pytest.approx(1)
    assert np.abs(guesses - exact).sum() < np.abs(as_targets(answers) - exact).sum()
    for value in np.unique(answers[0]):
        assert np.ptp(guesses[0][answers[0] == value]) == pytest.approx(0)


def test_repeats_bring_nothing_while_answers_are_kept() -> None:
    def jittery(images: np.ndarray) -> np.ndarray:
        """Answers differ with the size of the batch that they ride in, far more than a real model's."""
        rows = colour_model(images).astype(np.float64)
        rows[:, 0] += 0.01 * len(images)
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))

    found = repeats(jittery, coloured(30, 4), Policy("coarse", decimals=1), times=14, seed=0)
    assert found["cached_differing_share"] == 0
    assert found["not_cached_differing_share"] > 0
    steady = repeats(colour_model, coloured(30, 4), Policy("fine", decimals=3), times=14, seed=0)
    assert steady["cached"] == pytest.approx(steady["one_answer"])
    assert steady["near_copies"] != pytest.approx(steady["one_answer"])


def test_a_record_forgets_a_line_that_a_kill_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "results.jsonl"
    Record(path).add({"number": 1})
    path.write_text(path.read_text() + '{"number": 2')
    record = Record(path)
    assert record.rows == [{"number": 1}]
    record.add({"number": 3})
    assert path.read_text() == '{"number": 1}\n{"number": 3}\n'
    assert (record.count(number=3), record.count(number=3, settings={})) == (1, 0)


def toy_files(folder: Path) -> tuple[Path, Path]:
    chance = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"label_names": np.array([f"class {number}" for number in range(10)])}
    for part, count in (("train", 10), ("test", 60)):
        arrays[f"{part}_images"] = chance.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 10
    np.savez(folder / "data.npz", **arrays)
    np.savez(folder / "pool.npz", images=chance.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), labels=np.arange(40) % 4)
    return folder / "data.npz", folder / "pool.npz"


def test_the_extraction_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    monkeypatch.setattr("benchmarks.extraction_victim.RECORDED", tmp_path / "build")
    data, pool = toy_files(tmp_path)
    checkpoint = growth.write_checkpoint(tmp_path / "tiny.safetensors", experts=1)
    arguments = ["--data", str(data), "--pool", str(pool), "--out", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
    arguments += ["--budgets", "16", "--policies", "full;label only", "--pools", "cifar100", "--seeds", "2", "--width", "4"]
    arguments += ["--epochs", "0.2", "--attacked", "4", "--thieves", "random;random, recovering"]

    def run(*more: str) -> tuple[list[str], list[dict[str, object]]]:
        monkeypatch.setattr(sys, "argv", ["extraction", *arguments, *more])
        extraction.main()
        lines = capsys.readouterr().out.splitlines()
        return lines, json.loads(lines[-1])["rows"]

    lines, rows = run()
    thefts = [(row["thief"], row["policy"], row["seed"]) for row in rows if row["kind"] == "theft"]
    assert len(thefts) == len(set(thefts)) == 6
    assert any(line.startswith("| random, cifar100 | ") for line in lines)
    written = (tmp_path / "out" / "results.jsonl").read_text()
    cut = written.splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_text("".join(cut[:-2]) + cut[-2][:30])
    _, again = run()
    drop = {"seconds", "processor_s"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in again] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]
    assert run("--report")[1] == again
    assert (tmp_path / "out" / "agreement.png").stat().st_size > 1000


def test_black_box_attacks_ask_the_service_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    data, _ = toy_files(tmp_path)
    checkpoint = growth.write_checkpoint(tmp_path / "tiny.safetensors", experts=1)
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--attacked", "1", "--queries", "40"]
    arguments += ["--set", f"checkpoint={checkpoint}", "--set", "threads=1", "--set", "watch_sequence_images=5"]
    monkeypatch.setattr(sys, "argv", ["black_box", *arguments])
    black_box.main()
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert {(row["attack"], row["watch"]) for row in rows} == {
        (attack, watch) for attack in ("Square", "HopSkipJump") for watch in ("off", "act")
    }
    assert all(row["queries"] <= 40 for row in rows)
    assert not any(row["refused"] for row in rows if row["watch"] == "off")
    assert sum(line.startswith(("| Square |", "| HopSkipJump |")) for line in lines) == 4
    black_box.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows


def test_a_refused_search_is_told_from_one_that_succeeded() -> None:
    rows = [
        {"attack": "Square", "watch": "off", "refused": False, "queries": 900, "succeeded": True, "least_l2": 0.25},
        {"attack": "Square", "watch": "act", "refused": True, "queries": 110, "succeeded": False, "least_l2": None},
    ]
    assert black_box.table(rows).splitlines()[2:] == [
        "| Square | off | 1 | 0 | - | 1 | 900 | 0.25 |",
        "| Square | act | 1 | 1 | 110 | 0 | 110 | - |",
    ]
