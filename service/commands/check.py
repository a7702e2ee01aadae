"""``palisade-serve check``: say what would run, and what is wrong, without serving."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

from service.commands.run import unknown_variables
from service.commands.usage import add_command, printable

if TYPE_CHECKING:
    from service.settings import Settings

ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers; ``run_command`` takes the parsed options and returns the status."""
    command = add_command(
        commands,
        "check",
        "validate settings, keys and checkpoint, and show what would run",
        "Validate the PALISADE_* settings and the key files, load the checkpoint and classify a blank image with it, reach for "
        "the limiter's store if it is not memory, and show what `palisade-serve run` would do. Opens no port.",
        [
            "palisade-serve check",
            "PALISADE_CHECKPOINT=new.safetensors palisade-serve check && systemctl restart palisade",
            "palisade-serve check --json | jq .tiers.anonymous",
        ],
        "Exit status: 0 it would run, 1 something cannot be used, 2 wrong usage or settings.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run_command=_run)


def _run(options: argparse.Namespace) -> int:
    from service.settings import read_settings

    said = StringIO()
    with redirect_stderr(said):
        settings = read_settings()
    if settings is None:
        problems = [line.removeprefix("palisade-serve: ") for line in said.getvalue().splitlines()]
        return _report(options, {}, problems, 2)
    problems, found = [], _plain(settings)
    for look in (_look_at_keys, _look_at_admin_key, _look_at_admin_socket, _look_at_store, _look_at_engine):
        try:
            found |= look(settings)
        except _CannotRunError as error:
            problems.append(str(error))
    if settings.port and settings.port == settings.metrics_port and _overlap(settings.host, settings.metrics_host):
        problems.append(f"PALISADE_PORT and PALISADE_METRICS_PORT are both {settings.port}: give two")
    return _report(options, found, problems, 1 if problems else 0)


class _CannotRunError(Exception):
    """Something that the service needs cannot be used."""


def _plain(settings: Settings) -> dict[str, Any]:
    """Return what the settings alone tell."""
    warnings = [f"{name} is set but is no setting: see docs/operations.md" for name in unknown_variables()]
    if settings.limits == "off":
        warnings.append("PALISADE_LIMITS=off: quotas are off, anybody may query without end")
    tiers = {}
    for name, policy in settings.policies().items():
        windows = [f"{window.quota}/{window.name}" for window in policy.windows]
        tiers[name] = {"limits": windows, **{key: value for key, value in policy.describe().items() if key != "tier"}}
    return {
        "warnings": warnings,
        "ports": {
            "http": _address(settings.host, settings.port),
            "metrics": _address(settings.metrics_host, settings.metrics_port),
            "admin": [
                *([settings.admin_socket] if settings.admin_socket else []),
                *([] if settings.admin_port is None else [_address("127.0.0.1", settings.admin_port)]),
            ],
        },
        "frontends": settings.frontends,
        "anonymous": settings.anonymous,
        "tiers": tiers,
    }


def _look_at_keys(settings: Settings) -> dict[str, Any]:
    import time
    from pathlib import Path

    from service.keys import KeyFileError, read_keys

    if not settings.keys_file:
        return {"keys": None}
    try:
        keys = read_keys(Path(settings.keys_file))
    except KeyFileError as error:
        raise _CannotRunError(str(error)) from error
    now = time.time()
    return {"keys": {"file": settings.keys_file, **Counter(key.state(now) for key in keys)}}


def _look_at_admin_key(settings: Settings) -> dict[str, Any]:
    from pathlib import Path

    from service.admin_server import AdminKeyError, read_admin_key

    if settings.admin_port is not None:
        try:
            read_admin_key(Path(settings.admin_key_file))
        except AdminKeyError as error:
            raise _CannotRunError(str(error)) from error
    return {}


def _look_at_admin_socket(settings: Settings) -> dict[str, Any]:
    from pathlib import Path

    from service.admin_server import check_unix_socket

    if settings.admin_socket:
        try:
            check_unix_socket(Path(settings.admin_socket))
        except OSError as error:
            raise _CannotRunError(str(error)) from error
    return {}


def _look_at_store(settings: Settings) -> dict[str, Any]:
    url = settings.limiter_store.get_secret_value()
    if url == "memory://" or settings.limits == "off":
        return {"store": "memory"}
    import asyncio
    from urllib.parse import urlsplit

    try:
        from service.quota_store import Store
    except ModuleNotFoundError as error:
        raise _CannotRunError(
            f"PALISADE_LIMITER_STORE needs the extra `redis`: pip install 'palisade[redis]' ({error})"
        ) from error

    async def is_up() -> bool:
        store = Store(url, settings.limiter_timeout_ms / 1000, lambda _: None)
        await store.start()
        await asyncio.sleep(0)  # what it keeps running must have begun before it can end
        store.stop()
        return store.is_up

    address = f"{urlsplit(url).hostname}:{urlsplit(url).port or 6379}"  # without the password that the URL may hold
    if not asyncio.run(is_up()):
        raise _CannotRunError(
            f"PALISADE_LIMITER_STORE: the store at {address} cannot be used; the line about it on standard error says why"
        )
    return {"store": address}


def _look_at_engine(settings: Settings) -> dict[str, Any]:
    import numpy as np

    from model.checkpoint import CheckpointError
    from service.fast_path import fast_path_of

    try:
        fast_path = fast_path_of(settings)
        shape = fast_path.header.architecture
        fast_path.predict(np.zeros((1, 3, shape.height, shape.input_width), np.uint8))
    except (CheckpointError, ValueError, RuntimeError, OSError) as error:  # RuntimeError: no memory on the device, say
        raise _CannotRunError(str(error)) from error
    return {
        "checkpoint": {
            "name": settings.checkpoint,
            "version": fast_path.version,
            "classes": len(fast_path.header.class_names),
            "height": shape.height,
            "width": shape.input_width,
        },
        "engine": {
            "device": fast_path.device,
            "precision": fast_path.precision,
            "plan": fast_path.description,
            "batches_at_a_time": fast_path.lanes,
        },
    }


def _overlap(one: str, other: str) -> bool:
    return one == other or one in ANY_HOST or other in ANY_HOST


def _address(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port or 'any free port'}"


def _report(options: argparse.Namespace, found: dict[str, Any], problems: list[str], status: int) -> int:
    if options.json:
        print(json.dumps({"ok": not problems, "problems": problems, **found}))
        return status
    for name, text in _rows(found):
        print(f"{name:18s}{printable(text)}")
    for warning in found.get("warnings", ()):
        print(printable(f"palisade-serve: warning: {warning}"), file=sys.stderr)
    for problem in problems:
        print(printable(f"palisade-serve: {problem}"), file=sys.stderr)
    return status


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the report as names and texts."""
    rows = []
    if checkpoint := found.get("checkpoint"):
        size = f"{checkpoint['height']} x {checkpoint['width']} pixels"
        rows.append(
            ("checkpoint", f"{checkpoint['name']}, version {checkpoint['version']}, {checkpoint['classes']} classes, {size}")
        )
        engine = found["engine"]
        rows.append(("engine", f"{engine['device']}, {engine['precision']}: {engine['plan']}"))
    if ports := found.get("ports"):
        front = f"{found['frontends']} front ends and an engine process" if found["frontends"] > 1 else "one process"
        rows += [
            ("HTTP", f"{ports['http']}, {front}"),
            ("metrics", ports["metrics"]),
            ("admin", " and ".join(ports["admin"]) or "off"),
        ]
    if "keys" in found:
        keys = found["keys"]
        counts = ", ".join(f"{count} {state}" for state, count in keys.items() if state != "file") if keys else ""
        rows.append(("keys", f"{keys['file']}: {counts or 'none'}" if keys else "no key file"))
    if "store" in found:
        rows.append(("quotas are kept", f"in {found['store']}"))
    for tier, policy in found.get("tiers", {}).items():
        limits = "; ".join(policy["limits"]) or "no limit"
        shown = ", ".join(
            f"{name} {value}" for name, value in policy.items() if name != "limits" and value not in (None, False)
        )
        refused = " (refused: PALISADE_ANONYMOUS=off)" if tier == "anonymous" and found["anonymous"] == "off" else ""
        rows.append((f"tier {tier}", f"{limits}; {shown}{refused}"))
    return rows
