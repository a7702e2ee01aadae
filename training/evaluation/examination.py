"""What level ``standard`` adds: stronger attacks, transfer, hard routing, curves, the gate's figures and the sanity checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from model.mixture import Mixture
from training.attack import LogProbs
from training.evaluation import curves, sanity
from training.evaluation.levels import EPSILON, PGD_20, STANDARD, TOP_K
from training.evaluation.networks import routed, through_experts_only, through_gate_only
from training.evaluation.routing import routing_figures
from training.evaluation.sanity import Finding
from training.evaluation.significance import Correct, interval
from training.measure import Bench

Remember = Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]


def forget(what: str, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Measure: where nothing is written, nothing is remembered."""
    del what
    return measure()


@dataclass
class Examination:
    """Examines a mixture more closely than level ``quick`` does.

    Attributes:
        mixture: The mixture, as it is deployed.
        networks: What is compared, by name.
        rivals: Which of the networks are attacked as the mixture is: the uniform average, the single expert that was best on
            held-out images, and other checkpoints.
        bench: The images.
        correct: What is known already, from level ``quick``; filled up.
        remember: Returns what was measured under a name before a kill, or measures it.
    """

    mixture: Mixture
    networks: dict[str, LogProbs]
    rivals: Sequence[str]
    bench: Bench
    correct: Correct
    remember: Remember

    def run(self) -> dict[str, Any]:
        """Measure everything and return what is not in ``correct``, as JSON values."""
        attacked = self.bench.attacked(self.mixture, PGD_20)  # (N, 3, H, W)
        self._attack(attacked)
        self._attack_top_k()
        transferred = self._transfer()
        part = self.bench.first(curves.IMAGES)
        curve = curves.measure_curves(self.mixture, part, self.correct["mixture"])
        gate, diversity = {}, {}
        for name, images in (("clean", None), ("PGD-20", attacked)):
            gate[name], diversity[name] = routing_figures(self.mixture, self.bench, images)
        return {
            "transfer": {name: interval(right) for name, right in transferred.items()},
            "curves": curve.to_json(),
            **({} if self._votes else {"gate": gate}),  # in a vote all weights are alike
            "diversity": diversity,
            "sanity": [finding.to_json() for finding in self._check(part, curve, attacked, transferred)],
        }

    def _attack(self, attacked: torch.Tensor) -> None:
        """Run the level's attacks on the mixture and its rivals."""
        clean = self.correct["mixture"]["clean"]
        self.correct["mixture"]["PGD-20"] = clean & self.bench.judge(self.mixture, attacked)
        names = ("mixture", *self.rivals)
        wanted = [(name, attack) for name in names for attack in STANDARD if attack not in self.correct[name]]
        for name, attack in tqdm(wanted, desc="attack", unit="run", dynamic_ncols=True):
            measure = partial(self.bench.correct, self.networks[name], STANDARD[attack])
            self.correct[name][attack] = self.remember(f"{name}, {STANDARD[attack]}", measure)

    def _attack_top_k(self) -> None:
        """Attack hard routing through itself."""
        for k in tqdm(self._top_ks(), desc="top k", unit="network", dynamic_ncols=True):
            network = routed(self.mixture, k)
            self.correct[f"top {k}"] = {
                "clean": self.bench.judge(network),
                "PGD-20": self.remember(f"top {k}, {PGD_20}", partial(self.bench.correct, network, PGD_20)),
            }

    @property
    def _votes(self) -> bool:
        return self.mixture.architecture.votes

    def _top_ks(self) -> list[int]:
        """Return how many experts hard routing is tried with; none in a vote, which nobody is left out of."""
        if self._votes:
            return []
        deployed = {self.mixture.top_k} if self.mixture.top_k else set()
        return sorted(k for k in {*TOP_K, *deployed} if k < self.mixture.architecture.num_experts)

    def _transfer(self) -> dict[str, torch.Tensor]:
        """Return, by expert, which images that were crafted on it the mixture gets right."""
        experts = [name for name in self.networks if name.startswith("expert ")]
        return {
            name: self.remember(
                f"from {name}, {PGD_20}", partial(self.bench.correct, self.mixture, PGD_20, crafted_on=self.networks[name])
            )
            for name in tqdm(experts, desc="transfer", unit="expert", dynamic_ncols=True)
        }

    def _check(
        self, part: Bench, curve: curves.Curves, attacked: torch.Tensor, transferred: dict[str, torch.Tensor]
    ) -> list[Finding]:
        """Run the sanity checks on the first images; what is measured already is not measured again."""
        n, known = len(part), self.correct["mixture"]
        checks: list[Callable[[], Finding]] = [
            lambda: sanity.more_steps(curve, known["FGSM"][:n]),
            lambda: sanity.large_epsilon(curve, self.mixture.architecture.num_classes),
            lambda: sanity.square(self.mixture, part, known["PGD-50x2"][:n], EPSILON, sanity.SQUARE_QUERIES),
            lambda: sanity.transfer(known["PGD-20"], transferred),
        ]
        if not self._votes:
            checks += [lambda: self._check_partial(part), lambda: self._check_top_k(part, attacked[:n])]
        checks += [lambda: sanity.gradients(self.mixture, part), lambda: sanity.determinism(self.mixture, part)]
        return [check() for check in tqdm(checks, desc="sanity checks", unit="check", dynamic_ncols=True)]

    def _check_partial(self, part: Bench) -> Finding:
        return sanity.partial(
            self.correct["mixture"]["PGD-20"][: len(part)],
            part.correct(self.mixture, PGD_20, crafted_on=through_gate_only(self.mixture)),
            part.correct(self.mixture, PGD_20, crafted_on=through_experts_only(self.mixture)),
        )

    def _check_top_k(self, part: Bench, attacked: torch.Tensor) -> Finding:
        deployed = self.mixture.top_k if self.mixture.top_k in self._top_ks() else None
        if deployed is not None:
            attacked = part.attacked(routed(self.mixture, None), PGD_20)
        itself = {k: self.correct[f"top {k}"]["PGD-20"][: len(part)] for k in self._top_ks()}
        transferred = {k: part.judge(routed(self.mixture, k), attacked) for k in itself}
        return sanity.top_k(itself, transferred, deployed)
