"""AutoAttack: what it finds, what it may be called, and that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.architecture import Architecture
from model.checkpoint import Header
from tests.training.evaluation.linear import Linear, linear
from training.attack import LogProbs
from training.evaluation import autoattack
from training.evaluation.autoattack import Ensemble, Journal, check_classes, describe, parse_attacks

EPSILON = 8 / 255
KEY = {"checkpoint_sha256": "a", "seed": 0}


@pytest.fixture(scope="module")
def network() -> Linear:
    return linear(classes=4, count=60)


def run(
    network: Linear, folder: Path, attacks: tuple[str, ...], answers: LogProbs | None = None, batch_size: int = 100
) -> dict[str, torch.Tensor]:
    ensemble = Ensemble(attacks, EPSILON, queries=50)
    journal = Journal(folder / "autoattack.jsonl", KEY)
    return autoattack.run(answers or network, replace(network.bench, batch_size=batch_size), ensemble, journal)


# --- what it finds


def test_the_ensemble_breaks_exactly_what_can_be_broken(network: Linear, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    after = run(network, tmp_path, autoattack.ATTACKS)
    assert torch.equal(torch.get_rng_state(), before)
    robust = network.robust(EPSILON)
    assert 10 < robust.sum() < 50
    assert torch.equal(after["clean"], network.robust(0))
    assert torch.equal(after["square"], robust)
    assert list(after) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    for right in after.values():
        assert not (robust & ~right).any()


@pytest.mark.parametrize("attack", ["apgd-t", "fab-t"])
def test_each_targeted_attack_alone_breaks_what_can_be_broken(network: Linear, tmp_path: Path, attack: str) -> None:
    assert torch.equal(run(network, tmp_path, (attack,))[attack], network.robust(EPSILON))


def test_the_figures_count_images_and_name_the_ensemble(network: Linear, tmp_path: Path) -> None:
    ensemble = Ensemble(("apgd-ce", "square"), EPSILON, queries=5)
    after = {"clean": torch.arange(60) < 50, "apgd-ce": torch.arange(60) < 30, "square": torch.arange(60) < 27}
    written = autoattack.to_json(after, ensemble)
    assert written["name"] == "APGD-CE + Square"
    assert (written["n"], written["queries"], written["epsilon"]) == (60, 5, EPSILON)
    assert [(row["name"], row["robust_after"], row["percent"]) for row in written["attacks"]] == [
        ("APGD-CE", 30, 50.0),
        ("Square", 27, 45.0),
    ]
    assert written["attacks"][1]["low"] < 45 < written["attacks"][1]["high"]


# --- names


def test_only_all_four_attacks_are_called_autoattack() -> None:
    assert describe(parse_attacks("square,fab-t,apgd-t,apgd-ce")) == "AutoAttack"
    assert describe(parse_attacks("apgd-t, apgd-ce")) == "APGD-CE + APGD-T"
    assert describe(parse_attacks("square")) == "Square"


@pytest.mark.parametrize("text", ["", "apgd", "apgd-ce,apgd-dlr", "apgd-ce,,square"])
def test_unknown_attacks_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="there are apgd-ce, apgd-t, fab-t, square"):
        parse_attacks(text)


def test_too_few_classes_for_the_targeted_loss_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="--attacks apgd-ce,fab-t,square"):
        check_classes(autoattack.ATTACKS, 3)
    check_classes(("apgd-ce", "fab-t", "square"), 3)
    check_classes(autoattack.ATTACKS, 4)


# --- resuming


class Killed(BaseException):
    pass


class Mortal:
    """A network that dies at a given call, and counts its calls."""

    def __init__(self, network: Linear, lives: int) -> None:
        self.network, self.lives, self.calls = network, lives, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.calls == self.lives:
            raise Killed
        self.calls += 1
        return self.network(images)


def test_a_killed_run_goes_on_after_its_last_finished_batch(network: Linear, tmp_path: Path) -> None:
    attacks = ("apgd-ce", "square")  # some hundred and some fifty calls for each batch
    (tmp_path / "whole").mkdir()
    unbroken = Mortal(network, -1)
    expected = run(network, tmp_path / "whole", attacks, unbroken, batch_size=40)
    for lives in (1, 50, 150, 160, -1):
        mortal = Mortal(network, lives)
        try:
            resumed = run(network, tmp_path, attacks, mortal, batch_size=40)
        except Killed:
            assert lives > 0
    assert list(resumed) == list(expected)
    assert all(torch.equal(resumed[attack], right) for attack, right in expected.items())
    assert mortal.calls < unbroken.calls  # the last run did not start from the beginning
    again = Mortal(network, 0)
    finished = run(network, tmp_path, attacks, again, batch_size=40)  # all is known: the network is not asked once
    assert all(torch.equal(finished[attack], right) for attack, right in expected.items())


def test_a_run_can_be_extended_by_more_attacks(network: Linear, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    expected = run(network, tmp_path / "whole", ("apgd-ce", "square"))
    run(network, tmp_path, ("apgd-ce",))
    more, all_ = Mortal(network, -1), Mortal(network, -1)
    extended = run(network, tmp_path, ("apgd-ce", "square"), more)
    assert all(torch.equal(extended[attack], right) for attack, right in expected.items())
    (tmp_path / "again").mkdir()
    run(network, tmp_path / "again", ("apgd-ce", "square"), all_)
    assert 0 < more.calls < all_.calls  # Square's alone


def test_a_line_that_a_kill_left_half_written_is_done_again(network: Linear, tmp_path: Path) -> None:
    expected = run(network, tmp_path, ("apgd-ce",))
    path = tmp_path / "autoattack.jsonl"
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 30, 5):
        path.write_bytes(whole[:size])
        resumed = run(network, tmp_path, ("apgd-ce",))
        assert torch.equal(resumed["apgd-ce"], expected["apgd-ce"])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("other", [{**KEY, "seed": 1}, {**KEY, "checkpoint_sha256": "b"}, {**KEY, "queries": 9}], ids=str)
def test_the_record_of_another_run_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    path = tmp_path / "autoattack.jsonl"
    Journal(path, KEY).add("clean", [0, 1], [True, False])
    assert Journal(path, KEY).find("clean", [0, 1]) == [True, False]
    assert Journal(path, KEY).find("clean", [0, 2]) is None
    kept = path.read_bytes()
    changed = next(name for name in other if KEY.get(name) != other[name])
    with pytest.raises(ValueError, match=rf"another evaluation \({changed} differ\).*choose another --out"):
        Journal(path, other)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("content", ["not JSON\n", "[]\n", '{"key": 1}\nnot JSON\n', '{"key": 1}\n{"attack": "clean"}\n'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "autoattack.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is damaged .*: delete it to start again"):
        Journal(path, KEY)


HEADER = Header(Architecture(width=4), tuple("abcdefghij"), "c0ffee", top_k=2)


def test_the_record_says_what_it_depends_on(network: Linear, tmp_path: Path) -> None:
    autoattack.open_journal(tmp_path, Ensemble(("square",), EPSILON, 50), network.bench, HEADER, "da7a")
    key = json.loads((tmp_path / "autoattack.jsonl").read_text())["key"]
    assert (key["checkpoint_sha256"], key["test_sha256"], key["n"]) == ("c0ffee", "da7a", 60)
    assert (key["epsilon"], key["queries"], key["seed"]) == (EPSILON, 50, 0)
    assert (key["top_k"], key["architecture"]["activation"]) == (2, "relu")  # the same weights can be another network
    autoattack.open_journal(tmp_path, Ensemble(("square",), EPSILON, 50), network.bench, HEADER, "da7a")
    other = replace(HEADER, top_k=None)
    with pytest.raises(ValueError, match="top_k differ"):
        autoattack.open_journal(tmp_path, Ensemble(("square",), EPSILON, 50), network.bench, other, "da7a")
