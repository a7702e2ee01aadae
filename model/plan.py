"""The plan: which execution of the mixture runs a batch of which size. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from model.architecture import Architecture
from model.device import has_openvino, native_bfloat16
from model.tensors import stored_shapes

Kind = Literal["loop", "grouped", "compiled", "aotinductor", "graphs", "openvino"]
Precision = Literal["float32", "bfloat16", "int8"]

SMALL_BATCH = 4
"""Up to this many images a batch gains from all experts side by side in one OpenVINO graph; measured at width 16."""

SMALL_WEIGHTS_BYTES = 64 * 2**20
"""Below this, in float32, several differently arranged copies of the weights are held."""

_STACKED = re.compile(r"openvino-(float32|bfloat16|int8)-x([1-9][0-9]?)")
_PLAIN = re.compile(r"(loop|grouped|compiled|aotinductor|graphs)-(float32|bfloat16)")


@dataclass(frozen=True)
class ExecutionName:
    """What an execution's name says, as in ``loop-float32`` or ``openvino-bfloat16-x3``.

    Attributes:
        kind: Which program runs the network: torch expert by expert (``loop``), torch with the experts stacked into grouped
            convolutions (``grouped``), that compiled when it is loaded (``compiled``) or before (``aotinductor``), recorded
            CUDA graphs (``graphs``), or OpenVINO.
        precision: What the experts compute in.
        stack: Experts per grouped convolution; 0 if the kind does not let one choose.
    """

    kind: Kind
    precision: Precision
    stack: int = 0

    @classmethod
    def parse(cls, text: object) -> ExecutionName:
        """Return what a name says; raises ``ValueError`` for a name of none."""
        if isinstance(text, str):
            if found := _STACKED.fullmatch(text):
                return cls("openvino", _precision(found[1]), int(found[2]))
            if found := _PLAIN.fullmatch(text):
                (kind,) = (kind for kind in get_args(Kind) if kind == found[1])
                return cls(kind, _precision(found[2]))
        raise ValueError(f"{text!r} is no execution: give one such as loop-float32, grouped-bfloat16 or openvino-bfloat16-x3")

    def __str__(self) -> str:
        return f"{self.kind}-{self.precision}" + (f"-x{self.stack}" if self.stack else "")


@dataclass(frozen=True)
class Plan:
    """Which execution runs a batch, by its size.

    Attributes:
        parts: Pairs of a largest batch size, ascending, and the execution for batches up to it. The last one also runs every
            larger batch. All are of one precision, so that an image's answer hardly depends on the batch it came in.
    """

    parts: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a plan needs at least one execution")
        sizes = [size for size, _ in self.parts]
        if any(type(size) is not int or size < 1 for size in sizes) or sizes != sorted(set(sizes)):
            raise ValueError(f"a plan's batch sizes must be whole numbers from 1 that ascend, not {sizes}")
        precisions = {ExecutionName.parse(name).precision for _, name in self.parts}
        if len(precisions) > 1:
            raise ValueError(f"a plan's executions must be of one precision, not of {' and '.join(sorted(precisions))}")

    @classmethod
    def of(cls, parts: Sequence[tuple[int, str]]) -> Plan:
        """Return a plan in which neighbours that run the same execution are one."""
        return cls(
            tuple(part for part, after in zip(parts, [*parts[1:], None], strict=True) if after is None or part[1] != after[1])
        )

    @classmethod
    def from_json(cls, values: object) -> Plan:
        """Return the plan of :meth:`to_json`'s output; anything else raises ``ValueError``."""
        if not isinstance(values, list) or not all(
            isinstance(part, dict) and part.keys() == {"up_to", "execution"} for part in values
        ):
            raise ValueError(f"a plan must be a list of objects with the fields up_to and execution, not {str(values)[:100]}")
        return cls(tuple((part["up_to"], part["execution"]) for part in values))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the parts as plain JSON values."""
        return [{"up_to": size, "execution": name} for size, name in self.parts]

    @property
    def executions(self) -> tuple[str, ...]:
        """The names of the executions, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts))

    @property
    def precision(self) -> Precision:
        """What the experts compute in."""
        return ExecutionName.parse(self.parts[0][1]).precision

    def pick(self, batch: int) -> str:
        """Return the name of the execution for a batch of so many images."""
        return next((name for size, name in self.parts if batch <= size), self.parts[-1][1])

    def __str__(self) -> str:
        *parts, (_, last) = self.parts
        return ", ".join([*(f"{name} up to {size}" for size, name in parts), f"{last} beyond" if parts else last])


def default_plan(architecture: Architecture, device: str, precision: str = "auto", top_k: int | None = None) -> Plan:
    """Return the plan for a machine on which nothing was measured.

    Args:
        architecture: The mixture's shapes.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the hardware multiplies it natively.
        top_k: How many experts run per image; ``None`` means all. Fewer than all run one by one.

    Raises:
        ValueError: There is no such precision, or it needs measuring first, as int8 does.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision={precision}: only auto, float32 and bfloat16 run untuned")
    native, experts = native_bfloat16(device), architecture.num_experts
    if precision == "auto":
        precision = "bfloat16" if native else "float32"
    sparse = top_k is not None and top_k < experts
    if device != "cpu":
        return Plan(((1, f"{'loop' if sparse else 'graphs'}-{precision}"),))
    if not has_openvino() or (precision == "bfloat16" and not native):  # torch emulates it, slowly but as asked for
        return Plan(((1, f"loop-{precision}"),))
    if sparse:
        return Plan(((1, f"openvino-{precision}-x1"),))
    large = (SMALL_BATCH + 1, f"openvino-{precision}-x{min(3, experts)}")
    if 4 * sum(map(prod, stored_shapes(architecture).values())) >= SMALL_WEIGHTS_BYTES:
        return Plan((large,))
    return Plan.of([(SMALL_BATCH, f"openvino-{precision}-x{min(9, experts)}"), large])


def _precision(text: str) -> Precision:
    (precision,) = (precision for precision in get_args(Precision) if precision == text)
    return precision  # type: ignore[no-any-return]
