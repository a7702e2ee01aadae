"""``palisade-serve admin``: see what a running service does, change its checkpoint, list and forgive suspects."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from service.commands.usage import add_command, fail, printable

if TYPE_CHECKING:
    import httpx

STATUS = (
    "Exit status: 0 done; 1 the service refused, failed or does not answer; 2 wrong usage, which includes not saying where "
    "the service is."
)
PATIENCE_S = 30.0
LOOPBACK = ("127.0.0.1", "localhost")
COLUMNS = ("caller", "detector", "since_s", "until_s", "images")


class _NoWayError(Exception):
    """There is no such socket, or the key file cannot be used; the message says which."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers."""
    admin = add_command(
        commands,
        "admin",
        "see what a running service does, change its checkpoint, list and forgive suspects",
        "Talk to a running service through its admin socket (PALISADE_ADMIN_SOCKET) or its admin port (PALISADE_ADMIN_PORT, "
        "with the key in PALISADE_ADMIN_KEY_FILE). With the service's own environment no option is needed.",
        [
            "palisade-serve admin status --socket /run/palisade/admin.sock",
            "palisade-serve admin reload /models/new.safetensors --url http://127.0.0.1:8003 --key-file admin.key",
        ],
        STATUS,
    )
    shared = argparse.ArgumentParser(add_help=False)
    where = shared.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="the admin socket (default: $PALISADE_ADMIN_SOCKET)")
    where.add_argument("--url", help="the admin port, as http://127.0.0.1:8003 (default: from $PALISADE_ADMIN_PORT)")
    shared.add_argument(
        "--key-file", metavar="FILE", help="file that holds the admin port's key (default: $PALISADE_ADMIN_KEY_FILE)"
    )
    shared.add_argument("--json", action="store_true", help="print the service's answer as JSON, errors too")
    actions = admin.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
        return add_command(actions, name, summary, description, [f"palisade-serve admin {example}"], STATUS, [shared])

    add("status", "show the model, the queue and the last reload", "Show what the service does.", "status").set_defaults(
        run_command=_status
    )
    reload = add(
        "reload",
        "answer with another checkpoint from now on",
        "Load a checkpoint beside the one in use and answer with it from then on. No request fails meanwhile, and a "
        "checkpoint that cannot be used changes nothing: the answer says why.",
        "reload new.safetensors",
    )
    reload.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="'compact' or a file (default: the one of the service's settings, whose file is read again)",
    )
    reload.set_defaults(run_command=_reload)
    suspects = "List the callers whom the service suspects of extraction or of an attack, the latest first."
    add("suspects", "list suspected callers", suspects, "suspects --json").set_defaults(run_command=_suspects)
    forgive = add(
        "forgive",
        "drop all suspicions of a caller",
        "Drop all suspicions of a caller; its queries from now on count anew.",
        "forgive 203.0.113.9",
    )
    forgive.add_argument("caller", metavar="CALLER", help="as `admin suspects` writes it: an address, or key: and its id")
    forgive.set_defaults(run_command=_forgive)


def _status(options: argparse.Namespace) -> int:
    return _ask(options, "GET", "/status", None, _describe)


def _reload(options: argparse.Namespace) -> int:
    from rich.console import Console

    from model.checkpoint import EMBEDDED

    body = {}
    if options.checkpoint is not None:
        # The service may have been started in another folder than this command.
        body["checkpoint"] = options.checkpoint if options.checkpoint in EMBEDDED else str(Path(options.checkpoint).absolute())

    def tell(answer: dict[str, Any]) -> str:
        same = " (as before)" if answer["version"] == answer["previous"] else f" (before: {answer['previous']})"
        return f"version {answer['version']} answers{same}, loaded from {answer['checkpoint']} in {answer['seconds']:.1f} s"

    with Console(stderr=True).status("loading and warming the checkpoint"):  # shown on a terminal only
        return _ask(options, "POST", "/reload", body, tell)


def _suspects(options: argparse.Namespace) -> int:
    return _ask(options, "GET", "/suspects", None, lambda answer: _table(answer["suspects"]) or "nobody is suspected")


def _forgive(options: argparse.Namespace) -> int:
    body = {"caller": options.caller}
    return _ask(options, "POST", "/suspects/forgive", body, lambda answer: f"{answer['caller']} is forgiven")


def _ask(options: argparse.Namespace, method: str, path: str, body: dict[str, str] | None, tell: Any) -> int:
    """Ask the service, print what it answers, and return the exit status.

    Args:
        options: Where it is, and how to print.
        method: Of the request.
        path: Of the request.
        body: Sent as JSON; ``None`` sends none.
        tell: Turns an answer into the text for a person.
    """
    import httpx

    try:
        client, where = _client(options)
    except ValueError as error:
        return fail(str(error), 2)
    except _NoWayError as error:
        return fail(str(error), 1)
    with client:
        try:
            reply = client.request(method, path, json=body)
        except UnicodeEncodeError:
            return fail(printable(f"{' '.join((body or {}).values())}: is not UTF-8, so the service cannot be told of it"), 2)
        except httpx.HTTPError as error:
            return fail(f"{where}: no service answers there ({error}): does it run, with its admin interface on?", 1)
        try:
            answer = reply.json()
        except ValueError:
            return fail(f"{where}: what answers there is no Palisade's admin interface (status {reply.status_code})", 1)
    if options.json:
        print(json.dumps(answer, indent=2))
        return 0 if reply.status_code == 200 else 1
    if reply.status_code != 200:
        detail = answer.get("detail") if isinstance(answer, dict) else None
        return fail(printable(str(detail or f"{where}: status {reply.status_code}")), 1)
    print("\n".join(map(printable, tell(answer).splitlines())))
    return 0


def _client(options: argparse.Namespace) -> tuple[httpx.Client, str]:
    """Return a client for the service, and where that is.

    Raises:
        ValueError: It is not said where the service is, or the place cannot be one.
        _NoWayError: There is no such socket, or the key file cannot be used.
    """
    import httpx

    # A reload takes as long as it takes; nothing may pass a proxy, which would learn the key.
    timeout = httpx.Timeout(PATIENCE_S, read=None)
    socket, url = options.socket, options.url
    if not (socket or url):
        socket, port = os.environ.get("PALISADE_ADMIN_SOCKET"), os.environ.get("PALISADE_ADMIN_PORT")
        url = f"http://127.0.0.1:{port}" if port and not socket else None
    if socket:
        if not Path(socket).is_socket():
            raise _NoWayError(f"{socket}: there is no such socket; a service opens it that runs with PALISADE_ADMIN_SOCKET")
        transport = httpx.HTTPTransport(uds=socket)
        return httpx.Client(transport=transport, base_url="http://palisade", timeout=timeout, trust_env=False), socket
    if not url:
        raise ValueError("where is the service? Give --socket PATH or --url URL, or set PALISADE_ADMIN_SOCKET")
    if not _is_loopback(url):
        raise ValueError(f"{url}: the admin port is on the service's own machine only; write it as http://127.0.0.1:8003")
    file = options.key_file or os.environ.get("PALISADE_ADMIN_KEY_FILE")
    if not file:
        raise ValueError(f"{url}: the admin port needs a key; give --key-file FILE or set PALISADE_ADMIN_KEY_FILE")
    from service.admin_server import AdminKeyError, read_admin_key

    try:
        headers = {b"Authorization": b"Bearer " + read_admin_key(Path(file))}
    except AdminKeyError as error:
        raise _NoWayError(str(error)) from error
    return httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False), url


def _is_loopback(url: str) -> bool:
    """Tell whether a URL is one of a port of this machine, with a path at most."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:  # no number, or one that is too large
        return False
    is_plain = url.isascii() and url.isprintable()  # httpx takes no other
    return is_plain and parts.scheme == "http" and parts.hostname in LOOPBACK and has_port


def _describe(status: dict[str, Any]) -> str:
    model, last = status["model"], status["last_reload"]
    numbers = {name.replace("_", " "): value for name, value in status["processes"].items()}
    processes = [f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in numbers.items()]
    lines = {
        "Palisade": f"{status['palisade']}, {'ready' if status['ready'] else 'not ready'}, up {_duration(status['uptime_s'])}",
        "model": f"version {model['version']}, from {model['path']}",
        "digest": model.get("weights_sha256", "not known: the engine is being started"),
        "runs": f"{model.get('precision')} on {model.get('device')}: {model.get('plan')}",
        "queue": f"{status['queue_images']} of {status['queue_places']} places held",
        "requests": f"{status['requests_in_flight']} in flight",
        "limits": status["limits"],
        "processes": ", ".join(processes),
        "reload": "going on now" if status["reloading"] else "none so far",
    }
    if last and not status["reloading"]:
        what = f"{last['outcome']} on {last['time']} after {last['seconds']:.1f} s: {last['checkpoint']}"
        lines["reload"] = f"{what}: {last['detail']}" if last["detail"] else what
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60 % 60, int(seconds) // 3600
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _table(suspects: list[dict[str, Any]]) -> str:
    if not suspects:
        return ""
    rows = [COLUMNS, *([_cell(suspect[column]) for column in COLUMNS] for suspect in suspects)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)
