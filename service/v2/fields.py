"""Fields: what a JSON object holds under a name, of exactly the type that the protocol gives it."""

from __future__ import annotations

from typing import Any, TypeVar

from service.problems import bad_input

T = TypeVar("T", str, int, bool, list[Any], dict[str, Any])

JSON_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number with a fraction",
    bool: "true or false",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def optional(holder: dict[str, Any], name: str, kind: type[T], where: str) -> T | None:
    """Return ``holder[name]``, or ``None`` when it is absent or null.

    Args:
        holder: A parsed JSON object.
        name: The field.
        kind: Its type; true is no integer and 1.0 is none either.
        where: Whose field it is, for the error.

    Raises:
        Problem: 400 for a value of another type.
    """
    value = holder.get(name)
    if value is None or type(value) is kind:
        return value
    raise bad_input(f"{where} '{name}' must be {JSON_TYPES[kind]}, not {JSON_TYPES[type(value)]}")


def required(holder: dict[str, Any], name: str, kind: type[T], where: str) -> T:
    """Return ``holder[name]``; raises ``Problem`` 400 when it is absent, null or of another type."""
    value = optional(holder, name, kind, where)
    if value is None:
        raise bad_input(f"{where} '{name}' is missing; it must be {JSON_TYPES[kind]}")
    return value


def objects(values: list[Any], where: str) -> list[dict[str, Any]]:
    """Return an array's values, each of which must be an object; raises ``Problem`` 400."""
    for value in values:
        if type(value) is not dict:
            raise bad_input(f"{where} must be an array of objects, not of {JSON_TYPES[type(value)]}")
    return values


def shown(text: str) -> str:
    """Return a caller's own word in quotes, cut short, for an error that repeats it."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
