"""Recipes: everything that decides what a training run does, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from model.architecture import PRESETS as ARCHITECTURES
from model.architecture import Architecture
from training.attack import Attack

Family = Literal["benign", "fgsm", "pgd"]
ExpertLoss = Literal["cross_entropy", "trades", "mart"]
T = TypeVar("T")


@dataclass(frozen=True)
class ExpertRecipe:
    """How one expert is pre-trained.

    Attributes:
        family: ``benign`` sees clean images only; ``fgsm`` draws epsilon anew for every batch; ``pgd`` draws the number of
            steps anew for every batch.
        epsilons: What ``fgsm`` draws from, or the one radius of ``pgd``; ``[0, 1]`` pixel units.
        steps: What ``pgd`` draws from.
        noise: For ``fgsm``: start from noise of twice the radius and do not project (N-FGSM); otherwise plain FGSM.
        step_fraction: For ``pgd``: step size as a share of epsilon, never less than ``1.25 / steps``.
        loss: ``cross_entropy`` on the attacked images (PGD-AT, Madry et al. 2018), ``trades`` or ``mart``.
        beta: Weight of the second term of ``trades`` and ``mart``.
    """

    family: Family
    epsilons: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    noise: bool = True
    step_fraction: float = 0.25
    loss: ExpertLoss = "cross_entropy"
    beta: float = 6.0

    def __post_init__(self) -> None:
        if self.family == "benign" and self.loss != "cross_entropy":
            raise ValueError(f"a benign expert sees no attacked images, so it can't be trained with {self.loss}")
        if self.loss == "trades" and self.family == "fgsm" and not self.noise:
            raise ValueError("TRADES' attack needs a start away from the image, where its gradient is zero: set noise")

    def draw(self, generator: torch.Generator) -> Attack | None:
        """Return the next batch's attack; ``None`` means train on clean images."""
        if self.family == "benign":
            return None
        if self.family == "fgsm":
            epsilon = _choose(self.epsilons, generator)
            return Attack.noise_fgsm(epsilon) if self.noise else Attack.fgsm(epsilon)
        steps = _choose(self.steps, generator)
        step_size = self.epsilons[0] * max(self.step_fraction, 1.25 / steps)
        return Attack.pgd(self.epsilons[0], steps, step_size)


def _choose(values: tuple[T, ...], generator: torch.Generator) -> T:
    return values[int(torch.randint(len(values), (1,), generator=generator))]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains.

    Attributes:
        epochs: Passes over the training images; fractions are allowed.
        batch_size: Images per step.
        peak_lr: Highest learning rate of the one-cycle schedule.
        warmup: Share of the steps that climb linearly from 0 to the peak.
        final_lr: Learning rate of the last step, as a share of the peak; in between it falls linearly.
        weight_decay: L2 penalty on every parameter but the convolution kernels, which are held at a fixed norm.
        momentum: Nesterov momentum.
        ema_decay: Decay per step of the averaged weights that validation and export use; 0 turns averaging off.
        label_smoothing: Label smoothing of every cross-entropy (Szegedy et al. 2016, section 7).
        swa_from: Share of the steps after which the averaged weights are the plain mean of all since; 1 means never.
        optimiser: ``muon`` for the kernels and SGD for the rest, or ``sgd`` for everything.
        augmentation: ``crop`` (and flip), or ``idbh``, which is stronger.
        cutmix: CutMix's ``alpha``; 0 turns it off.
        mixup: Mixup's ``alpha``; 0 turns it off. Not together with ``cutmix``.
        trim: Share of each batch (of each worker's part of it, in whole samples) that gets no gradient: the samples with the
            highest loss, once the share :data:`training.stage.TRIM_FROM` of the steps is done; 0 turns it off.
        weight_perturbation: Size ``gamma`` of adversarial weight perturbation (AWP); 0 turns it off (and saves a pass).
        hold_statistics: Hold batch-norm statistics while attacking, that is attack the network in eval mode.
        accumulate: Parts in which each worker takes its share of a batch, to save memory.
        precision: What networks compute in while training; weights and losses are float32 either way.
    """

    epochs: float
    batch_size: int = 128
    peak_lr: float = 0.04
    warmup: float = 0.15
    final_lr: float = 0.0
    weight_decay: float = 5e-4
    momentum: float = 0.9
    ema_decay: float = 0.995
    label_smoothing: float = 0.0
    swa_from: float = 1.0
    optimiser: Literal["muon", "sgd"] = "muon"
    augmentation: Literal["crop", "idbh"] = "crop"
    cutmix: float = 0.0
    mixup: float = 0.0
    trim: float = 0.0
    weight_perturbation: float = 0.0
    hold_statistics: bool = True
    accumulate: int = 1
    precision: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs <= 0:
            raise ValueError(f"a schedule needs batch_size >= 1 and epochs > 0, not {self.batch_size} and {self.epochs}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, not {self.accumulate}")
        if not 0 <= self.swa_from <= 1 or min(self.cutmix, self.weight_perturbation) < 0:
            raise ValueError(
                "swa_from must lie in [0, 1], cutmix and weight_perturbation must not be negative; they are "
                f"{self.swa_from}, {self.cutmix} and {self.weight_perturbation}"
            )
        if self.mixup < 0 or not 0 <= self.trim < 1:
            raise ValueError(f"mixup must not be negative and trim must lie in [0, 1); they are {self.mixup} and {self.trim}")
        if self.mixup and self.cutmix:
            raise ValueError(
                f"cutmix {self.cutmix} and mixup {self.mixup} both mix the images of a batch: set one of them to 0"
            )


@dataclass(frozen=True)
class JointLoss:
    """Weights of the joint loss's terms; 0 turns a term off (and saves its forward pass).

    Attributes:
        adversarial: Cross-entropy of the mixture on attacked images.
        clean: Cross-entropy of the mixture on clean images.
        clean_share: Share of each batch that the clean term sees, to save time.
        experts: Mean cross-entropy of the single experts on the attacked images.
        balance: Load balancing, ``log E`` minus the entropy of the gate's mean weights over a batch.
        diversity: Log-determinant diversity of the experts' answers under attack (rewarded).
        top_k: Train with only the ``k`` heaviest experts of each image in the mixture, and deploy so; ``null`` trains softly.
            With a single expert the renormalised weight is always 1 and the gate would learn nothing, so at least 2.
    """

    adversarial: float = 1.0
    clean: float = 0.25
    clean_share: float = 0.25
    experts: float = 0.5
    balance: float = 0.1
    diversity: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 2:
            raise ValueError(f"loss.top_k must be at least 2 or null, not {self.top_k}: one expert's weight is always 1")


@dataclass(frozen=True)
class Recipe:
    """A whole run: the experts, nine of them in a mixture, then joint training.

    Attributes:
        name: The preset's name.
        architecture: The mixture's shapes.
        experts: One recipe per expert.
        pretrain: Schedule of each expert of the FGSM and PGD families.
        benign: Schedule of each benign expert.
        joint: Schedule of joint training.
        loss: Terms of the joint loss.
        joint_epsilons: Radii that the joint attack draws from for every batch.
        joint_steps: Steps of the joint attack; 0 means N-FGSM.
        gate_temperature: Divides the gate's logits in joint training; below 1 the gate sharpens faster.
        bag: Share of the training images that each expert sees before joint training, drawn for it alone; 0 means all.
        holdout: Training images that are kept aside for model selection.
        validation_images: How many of those a stage is judged on, on its way.
    """

    name: str
    architecture: Architecture
    experts: tuple[ExpertRecipe, ...]
    pretrain: Schedule
    benign: Schedule
    joint: Schedule
    loss: JointLoss = field(default_factory=JointLoss)
    joint_epsilons: tuple[float, ...] = (8 / 255,)
    joint_steps: int = 0
    gate_temperature: float = 1.0
    bag: float = 0.0
    holdout: int = 1000
    validation_images: int = 256

    def draw_joint(self, generator: torch.Generator) -> Attack:
        """Return the next batch's attack through gate and experts."""
        epsilon = _choose(self.joint_epsilons, generator)
        if self.joint_steps == 0:
            return Attack.noise_fgsm(epsilon)
        return Attack.pgd(epsilon, self.joint_steps, epsilon * max(0.25, 1.25 / self.joint_steps))

    def for_data(self, num_classes: int, height: int, width: int) -> Recipe:
        """Return the recipe with the architecture fitted to a dataset; ``ValueError`` if it contradicts itself."""
        if self.architecture.num_experts != len(self.experts):
            raise ValueError(f"the architecture has {self.architecture.num_experts} experts, the line-up {len(self.experts)}")
        if self.gate_temperature <= 0:
            raise ValueError(f"gate_temperature must be above 0, not {self.gate_temperature}")
        if not 0 <= self.bag <= 1:
            raise ValueError(f"bag is a share of the training images, from 0 to 1, not {self.bag}")
        fitted = replace(self.architecture, num_classes=num_classes, height=height, input_width=width)
        return replace(self, architecture=fitted)

    def with_setting(self, assignment: str) -> Recipe:
        """Return the recipe with one setting changed, given as ``name=value`` with a JSON value, as ``joint.epochs=2``.

        Raises:
            ValueError: The name or the value does not fit.
        """
        name, _, text = assignment.partition("=")
        section, _, leaf = name.rpartition(".")
        target = getattr(self, section, None) if section else self
        types = get_type_hints(type(target)) if is_dataclass(target) else {}
        if leaf not in types or not text:
            raise ValueError(f"'{assignment}' is not a setting; write for example joint.epochs=2 or holdout=500")
        before = getattr(target, leaf)
        if is_dataclass(before):
            raise ValueError(f"'{assignment}': set the parts of {name} one by one, as {name}.{fields(before)[0].name}=...")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(types[leaf], config=ConfigDict(strict=True, allow_inf_nan=False))
            value = adapter.validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise ValueError(f"'{assignment}': {problem}; it is {before!r:.100} now") from error
        changes: dict[str, Any] = {leaf: value}
        if section:
            changes = {section: replace(getattr(self, section), **changes)}
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**asdict(self), "architecture": self.architecture.to_json()}


def _nine(fgsm: ExpertRecipe, pgd: ExpertRecipe) -> tuple[ExpertRecipe, ...]:
    """Return the paper's line-up: one benign expert, four of the FGSM family, four of the PGD family."""
    return (ExpertRecipe("benign"), *[fgsm] * 4, *[pgd] * 4)


def _paper() -> Recipe:
    """Return the published procedure; radii, steps and line-up are the paper's, the rest is ours (not published)."""
    hundredths = tuple(i / 100 for i in range(1, 10))
    experts = _nine(
        ExpertRecipe("fgsm", epsilons=hundredths, noise=False),
        ExpertRecipe("pgd", epsilons=(8 / 255,), steps=(10, 20, 30, 40, 50)),
    )
    schedule = Schedule(epochs=30)
    joint = Schedule(epochs=15, peak_lr=0.02)
    return Recipe("paper", ARCHITECTURES["full"], experts, schedule, schedule, joint, joint_steps=10)


def _full() -> Recipe:
    """Return the improved recipe at the paper's size."""
    experts = _nine(
        ExpertRecipe("fgsm", epsilons=tuple(i / 255 for i in (6, 7, 8, 9, 10))),
        ExpertRecipe("pgd", epsilons=(8 / 255,), steps=(2, 3, 4, 5)),
    )
    joint = Schedule(epochs=15, peak_lr=0.02)
    return Recipe("full", ARCHITECTURES["full"], experts, Schedule(epochs=30), Schedule(epochs=30), joint, joint_steps=3)


def _alone(name: str, width: int, pretrain_epochs: float) -> Recipe:
    """Return a single adversarially trained network for comparison: a mixture of one, whose gate has nothing to decide."""
    expert = ExpertRecipe("pgd", epsilons=(8 / 255,), steps=(2, 3, 4, 5))
    schedule, joint = Schedule(epochs=pretrain_epochs), Schedule(epochs=15, peak_lr=0.02)
    architecture = replace(ARCHITECTURES["full"], width=width, num_experts=1)
    loss = JointLoss(experts=0.0, balance=0.0)  # the one would be the mixture's again, the other nothing
    return Recipe(name, architecture, (expert,), schedule, schedule, joint, loss, joint_steps=3)


def _compact() -> Recipe:
    """Return the recipe that two CPU cores finish in about two hours."""
    experts = _nine(
        ExpertRecipe("fgsm", epsilons=tuple(i / 255 for i in (5, 6, 7, 8))),
        ExpertRecipe("pgd", epsilons=(8 / 255,), steps=(1, 2)),
    )
    pretrain = Schedule(epochs=4, final_lr=0.1)
    benign = Schedule(epochs=4, final_lr=0.1)
    joint = Schedule(epochs=2, peak_lr=0.02)
    return Recipe("compact", ARCHITECTURES["compact"], experts, pretrain, benign, joint)


RECIPES = {
    "paper": _paper(),
    "full": _full(),
    "compact": _compact(),
    "single": _alone("single", 64, 30),
    # Three times the channels are nine times the operations, so that an image costs as much as all nine experts, and 20
    # passes of PGD with 2 to 5 steps as much as 30 of one benign expert, four N-FGSM and four PGD: 20 x 9 x 4.5 = 30 x 27.
    "wide": _alone("wide", 192, 20),
}
