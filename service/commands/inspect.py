"""``palisade-serve inspect``: the model card of a checkpoint, from its own header."""

from __future__ import annotations

import argparse
import json
from math import prod
from typing import TYPE_CHECKING, Any

from service.commands.usage import add_command, fail, printable

if TYPE_CHECKING:
    from pathlib import Path

    from model.checkpoint import Header

CERTIFICATE = (
    "each expert was trained on its own part of the data: an answer that leads by more than 2 r votes would be the same "
    "whatever r training samples had been inserted, removed or relabelled (docs/training.md, Partition mode)"
)
NO_CERTIFICATE = "none: the header does not say that each expert was trained on its own part of the data"
STATISTICS = ("running_mean", "running_var")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers; ``run_command`` takes the parsed options and returns the status."""
    command = add_command(
        commands,
        "inspect",
        "show what a checkpoint is: architecture, recipe, data, measured metrics",
        "Print a checkpoint's model card from its header: architecture, classes, recipe, training data, what was measured and "
        "how. All tensors are read, and their digest is compared with the header's, unless --no-verify is given.",
        ["palisade-serve inspect", "palisade-serve inspect joint.checkpoint --json | jq .metrics.accuracy.mixture"],
        "Exit status: 0 shown and verified, 1 the checkpoint cannot be used, 2 wrong usage.",
    )
    command.add_argument(
        "checkpoint", nargs="?", default="compact", metavar="CHECKPOINT", help="path, or 'compact' (default: compact)"
    )
    command.add_argument("--no-verify", action="store_true", help="read the header alone, without the tensors")
    command.add_argument("--json", action="store_true", help="print JSON, with the whole recipe")
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from model.checkpoint import CheckpointError, read_header, read_weights, resolve

    try:
        path = resolve(options.checkpoint)
        header = read_header(path) if options.no_verify else read_weights(path)[0]
    except CheckpointError as error:
        return fail(str(error), 1)
    card = _card(path, header, not options.no_verify)
    print(json.dumps(card) if options.json else "\n".join(_lines(card)))
    return 0


def _card(path: Path, header: Header, verified: bool) -> dict[str, Any]:
    from model.tensors import stored_shapes

    shapes = stored_shapes(header.architecture)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "version": header.weights_sha256[:12],
        "weights_sha256": header.weights_sha256,
        "verified": verified,
        "architecture": header.architecture.to_json(),
        "parameters": sum(prod(shape) for name, shape in shapes.items() if not name.endswith(STATISTICS)),
        "top_k": header.top_k,
        "certified": header.is_certified,
        "class_names": list(header.class_names),
        "recipe": header.recipe,
        "data": header.data,
        "metrics": header.metrics,
    }


def _lines(card: dict[str, Any]) -> list[str]:
    """Return the card as text. A header may hold anything, so that what is missing or odd is left out or shown as it is."""
    shape = card["architecture"]
    checked = "the tensors hash to it" if card["verified"] else "not verified"
    votes = shape.get("aggregation") == "vote"
    how = "who vote" if votes else f"a gate of width {shape['gate_width']}"
    experts = f"{shape['num_experts']} ResNet-18 experts of width {shape['width']}, {how}"
    run = card["top_k"] or shape["num_experts"]
    rows = [
        ("checkpoint", f"{card['path']}, {card['bytes'] / 2**20:.1f} MiB"),
        ("digest", f"{card['weights_sha256']} ({checked})"),
        ("version", card["version"]),
        ("architecture", f"{experts}; {card['parameters']:,} parameters; {run} experts run for an image"),
        *([("certificate", CERTIFICATE if card["certified"] else NO_CERTIFICATE)] if votes else []),
        ("input", f"{shape['height']} x {shape['input_width']} pixels, RGB"),
        ("classes", f"{len(card['class_names'])}: {', '.join(card['class_names'])}"),
        ("recipe", _short(card["recipe"])),
        ("data", _short(card["data"])),
        *_metrics(card["metrics"]),
    ]
    return [f"{name:14s}{printable(text)}" for name, text in rows]


def _short(values: dict[str, Any]) -> str:
    """Return the plain members of a JSON object, and how many others there are."""
    plain = [f"{name} {value}" for name, value in values.items() if not isinstance(value, dict | list | None)]
    others = [name for name, value in values.items() if isinstance(value, dict | list)]
    if others:
        plain.append(f"{', '.join(others)} with --json")
    return "; ".join(plain) or "not told"


def _metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return one row of accuracies for the mixture and how they were measured."""
    mixture = metrics.get("accuracy", {})
    mixture = mixture.get("mixture", {}) if isinstance(mixture, dict) else {}
    rows = []
    for attack, found in mixture.items() if isinstance(mixture, dict) else ():
        try:
            accuracy = f"{found['percent']:.1f} % right (95 % interval {found['low']:.1f} to {found['high']:.1f})"
        except (KeyError, TypeError, ValueError):
            accuracy = json.dumps(found)
        settings = metrics.get("attacks", {}).get(attack) if isinstance(metrics.get("attacks"), dict) else None
        how = ", ".join(f"{name} {_number(value)}" for name, value in settings.items()) if isinstance(settings, dict) else ""
        rows.append((attack, f"{accuracy}{'; ' + how if how else ''}"))
    how_measured = {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
    return [("measured", _short(how_measured) if how_measured else "nothing"), *rows]


def _number(value: Any) -> str:
    """Return a setting of an attack; sizes of perturbations are whole levels of a byte as a rule."""
    if not isinstance(value, float):
        return str(value)
    levels = round(255 * value)
    return f"{levels}/255" if 0 < value < 1 and abs(255 * value - levels) < 1e-6 else f"{value:.4g}"
