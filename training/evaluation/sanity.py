"""Sanity checks: is the measured robustness real, or do attacks fail because the network hides its gradients?

After Athalye, Carlini & Wagner 2018, "Obfuscated gradients give a false sense of security", section 3.1, and Carlini et al.
2019, "On evaluating adversarial robustness", section 4. Every check says when it is raised and what that means; both are
printed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from training.attack import LogProbs
from training.evaluation import autoattack
from training.evaluation.curves import Curves
from training.evaluation.significance import exceeds
from training.measure import Bench

TOLERANCE = 0.01
"""An attack is weaker than another when it breaks fewer images by more than this share of them, and one image besides."""
LARGE_EPSILON_SHARE = 0.02
"""At the largest radius no more than this share, nor than half of chance, may stay right."""
SQUARE_SHARE = 0.02
"""A black-box attack may break no more than this share after white-box attacks."""
SQUARE_QUERIES = 1000
AFTER_ENSEMBLE_SHARE = 0.002
"""The same at the end of AutoAttack, in the authors' judgement (their ``checks.py``)."""
ZERO_SHARE = 0.01
"""No more than this share of the images may have a gradient that is exactly zero."""
ROUNDING = 1e-4
"""What rounding may change in a probability."""
ALONE = 8
"""So many images are classified one by one too."""


class MaskedGradientsError(Exception):
    """A sanity check failed; raised after everything has been written."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: The check's name.
        passed: Whether it is content.
        figures: What it is judged by; rates in percent, counts in images.
        raised_if: When the check fails.
        meaning: What a failure means.
        informational: A failure is reported but does not count, as the network in question is not the deployed one.
    """

    check: str
    passed: bool
    figures: dict[str, float]
    raised_if: str
    meaning: str
    informational: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def failed(findings: list[dict[str, Any]]) -> list[str]:
    """Return the names of the checks that failed and count, of findings in JSON."""
    return [finding["check"] for finding in findings if not (finding["passed"] or finding["informational"])]


def more_steps(curves: Curves, fgsm: torch.Tensor) -> Finding:
    """Check that an attack gets no weaker with more steps, and that one step is no stronger than many.

    Args:
        curves: Of the same images.
        fgsm: ``(N,)``, which images are right after FGSM.
    """
    many = {steps: right for steps, right in curves.steps.items() if steps >= 10}
    weaker = any(_weaker(later, earlier) for earlier, later in itertools.combinations(many.values(), 2))
    single_step = any(_weaker(right, fgsm) for right in many.values())
    return Finding(
        "more_steps",
        passed=not (weaker or single_step),
        figures={"FGSM": _percent(fgsm), **{f"PGD-{steps}": _percent(right) for steps, right in curves.steps.items()}},
        raised_if="from 10 steps on, PGD with more steps leaves more images right than PGD with fewer, or than FGSM",
        meaning="gradients away from the image mislead: iterating does not help the attacker as it should, so that PGD "
        "overstates the robustness",
    )


def large_epsilon(curves: Curves, num_classes: int) -> Finding:
    """Check that an attack which may change everything breaks everything."""
    radius = max(curves.epsilon)
    right = curves.epsilon[radius]
    limit = min(LARGE_EPSILON_SHARE, 0.5 / num_classes)
    return Finding(
        "large_epsilon",
        passed=not exceeds(int(right.sum()), len(right), limit),
        figures={f"right at {radius}/255": _percent(right), "limit": 100 * limit},
        raised_if=f"at radius {radius}/255 significantly more than the limit (2 %, or half of chance) stays right",
        meaning="so large a change can make any image plain grey; if PGD finds nothing, it climbs the wrong way or not at all "
        "(or the network ignores its input)",
    )


def square(network: LogProbs, bench: Bench, survived: torch.Tensor, epsilon: float, queries: int) -> Finding:
    """Check that a black-box attack, which needs no gradients, breaks hardly any image that white-box attacks left right.

    Args:
        network: The network.
        bench: The images.
        survived: ``(N,)``, which of them are right after the white-box attack.
        epsilon: The attacks' radius.
        queries: Forward passes that the black-box attack may make per image (Andriushchenko et al. 2020, "Square attack").
    """
    rows = survived.nonzero().squeeze(1)
    survivors = replace(bench, split=bench.split.take(rows))
    broken = 0
    for images, labels in survivors.batches():
        right = autoattack.right_after("square", network, images, labels, epsilon, bench.seed, queries)
        broken += int((~right).sum())
    return Finding(
        "square",
        passed=not exceeds(broken, len(bench), SQUARE_SHARE),
        figures={"survivors": len(rows), "broken": broken, "queries": queries, "limit": SQUARE_SHARE * len(bench)},
        raised_if=f"Square breaks significantly more than {SQUARE_SHARE:.0%} of the images after PGD-50x2 has left them right",
        meaning="an attack without gradients finds what the attack with gradients misses, so the gradients are useless",
    )


def square_after_ensemble(after: Mapping[str, torch.Tensor]) -> Finding:
    """Check that within AutoAttack the black-box attack comes too late to matter, as the authors' own code warns.

    Args:
        after: What :func:`training.evaluation.autoattack.run` returns, with ``square`` in it.
    """
    *_, before, last = after.values()
    broken, limit = int(before.sum() - last.sum()), max(1, AFTER_ENSEMBLE_SHARE * len(last))
    return Finding(
        "square_after_ensemble",
        passed=broken <= limit,
        figures={"broken": broken, "limit": limit},
        raised_if=f"Square breaks more than {AFTER_ENSEMBLE_SHARE:.1%} of the images (and more than one) after the attacks by "
        "gradients of AutoAttack have left them right",
        meaning="an attack without gradients finds what the strongest attacks with gradients miss",
    )


def transfer(itself: torch.Tensor, transferred: Mapping[str, torch.Tensor]) -> Finding:
    """Check that attacking the mixture itself is no weaker than attacking one of its experts and transferring the images.

    Args:
        itself: ``(N,)``, which images the mixture gets right after PGD-20 through itself.
        transferred: By expert: which it gets right after PGD-20 through that expert alone.
    """
    return Finding(
        "transfer",
        passed=not any(_weaker(itself, right) for right in transferred.values()),
        figures={"through itself": _percent(itself), **{name: _percent(right) for name, right in transferred.items()}},
        raised_if="images crafted on a single expert break the mixture more often than images crafted on the mixture",
        meaning="the mixture's own gradients hide what a part's gradients show",
    )


def partial(full: torch.Tensor, gate_only: torch.Tensor, experts_only: torch.Tensor) -> Finding:
    """Check that attacking a part of the mixture is no stronger than attacking all of it.

    Args:
        full: ``(N,)``, which images are right after PGD-20 with gradients through gate and experts.
        gate_only: The same, with gradients through the gate only; the whole mixture answers.
        experts_only: The same, with gradients through the experts only.
    """
    return Finding(
        "partial",
        passed=not (_weaker(full, gate_only) or _weaker(full, experts_only)),
        figures={"full": _percent(full), "gate only": _percent(gate_only), "experts only": _percent(experts_only)},
        raised_if="PGD-20 through the gate alone or through the experts alone leaves fewer images right than through both",
        meaning="one part's gradients drown the other's: the attack on the whole overlooks a weakness of a part",
    )


def top_k(itself: Mapping[int, torch.Tensor], transferred: Mapping[int, torch.Tensor], deployed: int | None) -> Finding:
    """Check that attacking hard routing itself is no weaker than attacking the soft mixture and transferring the images.

    Args:
        itself: By ``k``: ``(N,)``, which images the top-k network gets right after PGD-20 through itself.
        transferred: By ``k``: which it gets right after PGD-20 through the soft mixture.
        deployed: The ``k`` that is deployed and decides; ``None`` if that is the soft mixture, and the check informs only.
    """
    counting = itself.keys() if deployed is None else {deployed}
    figures: dict[str, float] = {}
    for k in itself:
        figures |= {f"top {k}, through itself": _percent(itself[k]), f"top {k}, through soft": _percent(transferred[k])}
    return Finding(
        "top_k",
        passed=not any(_weaker(itself[k], transferred[k]) for k in counting),
        figures=figures,
        raised_if="images crafted on the soft mixture break the top-k network more often than images crafted on itself",
        meaning="hard selection of experts has no gradient, so attacks on it overlook that the choice can be changed; the "
        "robustness of a top-k network is what is left after both attacks",
        informational=deployed is None,
    )


def gradients(network: LogProbs, bench: Bench) -> Finding:
    """Check that the loss has finite gradients, in float32, that are not zero."""
    infinite = zero = 0
    for images, labels in bench.batches():
        loss = F.cross_entropy(network(images.requires_grad_(True)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        gradient = gradient.flatten(1)
        infinite += int((~gradient.isfinite()).any(dim=1).sum())
        zero += int((gradient == 0).all(dim=1).sum())
    return Finding(
        "gradients",
        passed=not infinite and not exceeds(zero, len(bench), ZERO_SHARE),
        figures={"not finite": infinite, "all zero": zero, "n": len(bench)},
        raised_if=f"a gradient holds NaN or infinity, or significantly more than {ZERO_SHARE:.0%} of them are zero everywhere",
        meaning="the network is saturated or not differentiable in float32: attacks by gradients have nothing to climb",
    )


@torch.no_grad()
def determinism(network: LogProbs, bench: Bench) -> Finding:
    """Check that an image's answer depends on nothing but the image."""
    images, _ = next(bench.batches())
    answers = network(images).softmax(dim=1)
    again = network(images).softmax(dim=1)
    backwards = network(images.flip(0)).softmax(dim=1).flip(0)
    alone = torch.cat([network(image).softmax(dim=1) for image in images[:ALONE].split(1)])
    repeat = _difference(again, answers)
    mates = max(_difference(backwards, answers), _difference(alone, answers[:ALONE]))
    return Finding(
        "determinism",
        passed=repeat <= ROUNDING and mates <= ROUNDING,
        figures={"repeated": repeat, "other batch-mates": mates, "limit": ROUNDING},
        raised_if="a probability changes by more than rounding when a batch is repeated, or when its images have other company",
        meaning="random or batch-dependent answers make an attack's gradients stale: attacks must average over them, and these "
        "do not",
    )


def _weaker(attack: torch.Tensor, reference: torch.Tensor) -> bool:
    """Tell whether ``attack`` leaves more images right than ``reference`` does, beyond the tolerance."""
    return int(attack.sum()) - int(reference.sum()) > TOLERANCE * len(attack) + 1


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two sets of probabilities; what is not a number differs by 1."""
    return (first - second).abs().nan_to_num(nan=1.0).max().item()


def _percent(right: torch.Tensor) -> float:
    return round(100 * right.float().mean().item(), 2)
