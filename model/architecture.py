"""What a mixture is made of: the few numbers that fix every tensor's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Activation = Literal["relu", "silu"]
Aggregation = Literal["gate", "vote"]

BLOCKS_PER_STAGE = (2, 2, 2, 2)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Block:
    """One residual block of an expert: two 3x3 convolutions beside a shortcut.

    Attributes:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Stride of the first convolution and of the shortcut.
    """

    inputs: int
    outputs: int
    stride: int

    @property
    def projects(self) -> bool:
        """Whether the shortcut is a 1x1 convolution, since it can't pass its input on as it is."""
        return self.stride != 1 or self.inputs != self.outputs


@dataclass(frozen=True)
class Architecture:
    """Shape of a mixture of experts.

    Attributes:
        width: Channels of the first stage of every expert (64 in preset ``full``, 16 in ``compact``).
        num_classes: Number of classes ``C``.
        num_experts: Number of experts ``E``.
        gate_width: Channels of the gate's first convolution.
        height: Input height ``H`` in pixels.
        input_width: Input width ``W`` in pixels.
        mean: Per-channel mean that the model subtracts from images in ``[0, 1]``.
        std: Per-channel standard deviation that the model divides by.
        activation: The experts' activation, ``relu`` or ``silu``.
        aggregation: How the experts' answers become one: ``gate`` weighs them, ``vote`` counts them and has no gate, so that
            ``gate_width`` has no meaning.
    """

    width: int
    num_classes: int = 10
    num_experts: int = 9
    gate_width: int = 16
    height: int = 32
    input_width: int = 32
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = CIFAR10_STD
    activation: Activation = "relu"
    aggregation: Aggregation = "gate"

    def __post_init__(self) -> None:
        for name in ("width", "gate_width"):
            _require_int(name, getattr(self, name), 1, 1024)
        _require_int("num_experts", self.num_experts, 1, 64)
        _require_int("num_classes", self.num_classes, 2, 100_000)
        _require_int("height", self.height, 8, 1024)
        _require_int("input_width", self.input_width, 8, 1024)
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, (tuple, list)) and all(_is_number(v) for v in value)
            if not numbers or len(value) != 3:
                raise ValueError(f"{name} must be three numbers, not {value!r}")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if min(self.std) < 1e-6:
            raise ValueError(f"std must be at least 1e-6 in every channel, not {self.std!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, not {self.activation!r}")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation must be one of {', '.join(get_args(Aggregation))}, not {self.aggregation!r}")

    @property
    def votes(self) -> bool:
        """Whether the experts vote."""
        return self.aggregation == "vote"

    def blocks(self) -> list[Block]:
        """Return an expert's residual blocks in order: stage ``s`` has ``width * 2**s`` channels and halves the image."""
        made: list[Block] = []
        for stage, count in enumerate(BLOCKS_PER_STAGE):
            for place in range(count):
                inputs = made[-1].outputs if made else self.width
                made.append(Block(inputs, self.width * 2**stage, 2 if stage > 0 and place == 0 else 1))
        return made

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; ``aggregation`` only of a vote, as before there was any."""
        values = asdict(self)
        if not self.votes:
            del values["aggregation"]
        return values

    @classmethod
    def from_json(cls, values: object) -> Architecture:
        """Build from :meth:`to_json`'s output; unknown, missing or ill-typed fields raise ``ValueError``."""
        if not isinstance(values, dict):
            raise ValueError(f"must be an object, not {type(values).__name__}")
        names = {field.name for field in fields(cls)}
        needed = names - {"aggregation"}
        if not needed <= values.keys() <= names:
            missing, unknown = sorted(needed - values.keys()), sorted(values.keys() - names)
            raise ValueError(f"has missing fields {missing} and unknown fields {unknown}")
        return cls(**values)


def _is_number(value: object) -> bool:
    """Tell whether a value is a finite number of a size that pixel statistics have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


PRESETS = {"full": Architecture(width=64), "compact": Architecture(width=16)}
