"""Recipes: the line-ups, the draws and the settings."""

from __future__ import annotations

import json

import pytest
import torch

from training.recipe import RECIPES, ExpertRecipe, Recipe

COMPACT = RECIPES["compact"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["compact", "full", "paper"])
def test_every_mixture_has_one_benign_four_fgsm_and_four_pgd_experts(name: str) -> None:
    recipe = RECIPES[name]
    assert [expert.family for expert in recipe.experts] == ["benign", *["fgsm"] * 4, *["pgd"] * 4]
    assert recipe.architecture.num_experts == 9
    assert recipe.name == name


def test_the_wide_network_costs_what_the_full_mixture_does() -> None:
    """In images through one expert of the mixture, forward and backward: an attack's steps, and the training itself."""

    def passes(recipe: Recipe) -> float:
        each = (recipe.architecture.width / RECIPES["full"].architecture.width) ** 2  # operations go with its square
        steps = {"benign": 0.0, "fgsm": 1.0, "pgd": 3.5}
        alone = sum(1 + steps[expert.family] for expert in recipe.experts) * recipe.pretrain.epochs
        return each * (alone + recipe.joint.epochs * (1 + recipe.joint_steps) * len(recipe.experts))

    assert {len(RECIPES[name].experts) for name in ("single", "wide")} == {1}
    assert passes(RECIPES["wide"]) == pytest.approx(passes(RECIPES["full"]))


def test_the_papers_experts_draw_the_papers_radii_and_steps() -> None:
    experts = RECIPES["paper"].experts
    source = generator()
    for expert in experts[1:5]:
        attacks = [expert.draw(source) for _ in range(150)]
        assert {attack.epsilon for attack in attacks if attack} == {i / 100 for i in range(1, 10)}
        assert all(
            attack and attack.steps == 1 and attack.noise == 0 and attack.step_size == attack.epsilon for attack in attacks
        )
    for expert in experts[5:]:
        attacks = [expert.draw(source) for _ in range(100)]
        assert {attack.steps for attack in attacks if attack} == {10, 20, 30, 40, 50}
        assert all(attack and attack.project and attack.epsilon == attack.noise == 8 / 255 for attack in attacks)


def test_a_benign_expert_draws_no_attack() -> None:
    assert ExpertRecipe("benign").draw(generator()) is None


@pytest.mark.parametrize("index", [1, 5])
def test_the_seed_decides_the_draws(index: int) -> None:
    expert = COMPACT.experts[index]

    def draws(seed: int) -> list[object]:
        source = generator(seed)
        return [expert.draw(source) for _ in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len(set(draws(1))) > 1


def test_few_pgd_steps_are_long_enough_to_cross_the_ball() -> None:
    expert = ExpertRecipe("pgd", epsilons=(0.1,), steps=(1, 2, 10))
    source = generator()
    for _ in range(20):
        attack = expert.draw(source)
        assert attack is not None
        assert attack.steps * attack.step_size >= 0.1
        assert attack.step_size >= 0.025


def test_the_joint_attack_is_n_fgsm_or_pgd_by_its_steps() -> None:
    single = COMPACT.with_setting("joint_steps=0").draw_joint(generator())
    assert (single.steps, single.project, single.noise) == (1, False, 2 * single.epsilon)
    several = COMPACT.with_setting("joint_steps=3").draw_joint(generator())
    assert (several.steps, several.project, several.noise) == (3, True, several.epsilon)
    source, mixed = generator(), COMPACT.with_setting("joint_epsilons=[0.01, 0.02]")
    assert {mixed.draw_joint(source).epsilon for _ in range(30)} == {0.01, 0.02}


def read(recipe: Recipe, name: str) -> object:
    value: object = recipe
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("holdout=500", 500),
        ("joint.epochs=7", 7),
        ("pretrain.epochs=0.5", 0.5),
        ("loss.balance=0", 0),
        ("loss.experts=0.25", 0.25),
        ("architecture.width=4", 4),
        ("joint_epsilons=[0.01, 0.02]", (0.01, 0.02)),
        ('name="mine"', "mine"),
    ],
)
def test_a_setting_changes_that_and_nothing_else(assignment: str, value: object) -> None:
    changed, name = COMPACT.with_setting(assignment), assignment.partition("=")[0]
    assert read(changed, name) == value
    before, after = COMPACT.to_json(), changed.to_json()
    top = name.partition(".")[0]
    assert {key for key in before if before[key] != after[key]} == {top}
    if "." in name:
        assert {key for key in before[top] if before[top][key] != after[top][key]} == {name.partition(".")[2]}


@pytest.mark.parametrize(
    "assignment",
    [
        "nonsense=1",
        "joint.nonsense=1",
        "nonsense.epochs=1",
        "joint.epochs.x=1",
        "joint.epochs",
        "joint.epochs=",
        "=1",
        "",
        '__doc__="x"',
        "to_json=1",
        "holdout=many",
        "holdout=[1",
        'holdout="9"',
        "holdout=null",
        "holdout=1.5",
        "holdout=true",
        "joint.batch_size=2.5",
        "joint.epochs=NaN",
        "joint.epochs=[2]",
        "joint=3",
        "name=3",
        "experts=[1]",
        'joint_epsilons=["a"]',
        "joint_epsilons=0.1",
        "architecture.width=2.5",
        "architecture.width=0",
        "architecture.mean=[1, 2]",
    ],
)
def test_a_setting_that_does_not_fit_is_refused(assignment: str) -> None:
    with pytest.raises(ValueError, match=r".") as refusal:
        COMPACT.with_setting(assignment)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_plain_json(name: str) -> None:
    values = json.loads(json.dumps(RECIPES[name].to_json()))
    assert values["name"] == name
    assert len(values["experts"]) == RECIPES[name].architecture.num_experts
    assert values["architecture"]["width"] == RECIPES[name].architecture.width


def test_a_recipe_is_fitted_to_the_datas_classes_and_size() -> None:
    fitted = COMPACT.for_data(num_classes=7, height=8, width=24).architecture
    assert (fitted.num_classes, fitted.height, fitted.input_width) == (7, 8, 24)
    assert fitted.width == COMPACT.architecture.width


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.top_k=1", "at least 2"),
        ("joint.swa_from=2", "swa_from"),
        ("pretrain.cutmix=-1", "cutmix"),
        ("pretrain.mixup=-0.5", "mixup must not be negative .* -0.5"),
        ("joint.trim=1", r"trim must lie in \[0, 1\)"),
        ("joint.trim=-0.1", "trim"),
        ("joint.accumulate=0", "accumulate must be at least 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COMPACT.with_setting(setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gate_temperature=0", "gate_temperature must be above 0"),
        ("architecture.num_experts=8", "8 experts, the line-up 9"),
        ("bag=1.5", "bag is a share .* not 1.5"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COMPACT.with_setting(setting).for_data(10, 32, 32)


def test_losses_that_need_an_attack_with_a_start_of_its_own_say_so() -> None:
    with pytest.raises(ValueError, match="benign"):
        ExpertRecipe("benign", loss="trades")
    with pytest.raises(ValueError, match="set noise"):
        ExpertRecipe("fgsm", epsilons=(0.1,), noise=False, loss="trades")


def test_two_ways_to_mix_a_batch_are_not_combined() -> None:
    with pytest.raises(ValueError, match=r"cutmix 1\.0 and mixup 0\.5"):
        COMPACT.with_setting("joint.cutmix=1.0").with_setting("joint.mixup=0.5")
