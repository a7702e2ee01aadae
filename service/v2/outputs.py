"""Outputs: which tensors a request wants back, and in which form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.problems import bad_input
from service.v2.fields import objects, optional, required, shown

PROBABILITIES, CLASS_ID, TOLERATED = "probabilities", "class_id", "tolerated_partitions"


@dataclass(frozen=True)
class RequestedOutput:
    """One tensor of the reply.

    Attributes:
        name: ``probabilities``, ``class_id`` or ``tolerated_partitions``.
        binary: Whether it follows the reply's JSON as bytes.
        classes: With the classification extension, how many of the best classes are wanted as strings; 0 without it.
    """

    name: str
    binary: bool
    classes: int = 0


def requested_outputs(header: dict[str, Any], binary: bool, certified: bool) -> tuple[RequestedOutput, ...]:
    """Return the outputs that a request names; none when it leaves the choice to the service.

    Args:
        header: The request's JSON.
        binary: What holds for an output that does not say whether it is binary.
        certified: Whether the model has certificates, so that there is ``tolerated_partitions``.

    Raises:
        Problem: 400 for an unknown or repeated output or a parameter of the wrong type.
    """
    outputs: list[RequestedOutput] = []
    names = (PROBABILITIES, CLASS_ID, TOLERATED) if certified else (PROBABILITIES, CLASS_ID)
    for entry in objects(optional(header, "outputs", list, "the request's") or [], "the request's 'outputs'"):
        name = required(entry, "name", str, "an output's")
        if name not in names:
            known = ", ".join(f"'{each}'" for each in names[:-1])
            raise bad_input(f"there is no output {shown(name)}; the outputs are {known} and '{names[-1]}'")
        if any(output.name == name for output in outputs):
            raise bad_input(f"output '{name}' is named twice")
        outputs.append(_output(name, optional(entry, "parameters", dict, f"output '{name}':") or {}, binary))
    return tuple(outputs)


def _output(name: str, parameters: dict[str, Any], binary: bool) -> RequestedOutput:
    where = f"output '{name}': parameter"
    if parameters.get("shared_memory_region") is not None:
        raise bad_input(f"{where} 'shared_memory_region' is not supported; outputs come with the reply")
    own = optional(parameters, "binary_data", bool, where)
    classes = optional(parameters, "classification", int, where)
    if classes is not None and classes < 1:
        raise bad_input(f"{where} 'classification' is {classes}; it must be at least 1")
    if classes and name != PROBABILITIES:
        what = "a class already" if name == CLASS_ID else "no distribution"
        raise bad_input(f"{where} 'classification' is for '{PROBABILITIES}'; '{name}' is {what}")
    return RequestedOutput(name, binary if own is None else own, classes or 0)
