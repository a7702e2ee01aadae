"""``palisade-serve keys``: make, list and revoke API keys."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from service.commands.usage import add_command, fail

if TYPE_CHECKING:
    from service.keys import Key

STATUS = "Exit status: 0 done, 1 the key file cannot be read or changed or has no such key, 2 wrong usage."
DEFAULT_EXPIRY = "365d"
COLUMNS = ("id", "name", "tier", "created", "expires", "state")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``palisade-serve``'s sub-parsers; ``run_command`` takes the parsed options and returns the status."""
    keys = add_command(
        commands,
        "keys",
        "make, list and revoke API keys",
        "Make, list and revoke API keys. A running service notices within a second when it is next asked with a key.",
        [
            'palisade-serve keys create --file keys.json --name "the mobile app" --tier standard',
            "palisade-serve keys list --file keys.json",
        ],
        STATUS,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--file", help="the key file (default: $PALISADE_KEYS_FILE)")
    shared.add_argument("--json", action="store_true", help="print JSON")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = add_command(
        actions,
        "create",
        "make a key and print it, once",
        "Make a key, and the key file if there is none yet. The key is printed once, on standard output; only its hash is "
        "stored, so it can't be shown again.",
        [
            "palisade-serve keys create --name trial --tier standard --expires 30d > trial.key",
            "palisade-serve predict --url http://127.0.0.1:8000 --key-file trial.key cat.png",
        ],
        STATUS,
        [shared],
    )
    create.add_argument("--name", required=True, help="whose it is or what it is for, up to 100 characters")
    create.add_argument("--tier", required=True, choices=("standard", "trusted"), help="whose limits and policy hold for it")
    create.add_argument(
        "--expires",
        default=DEFAULT_EXPIRY,
        help="days from now (90d), a date (2027-01-31: refused once that day begins in UTC), or never (default: %(default)s)",
    )
    create.set_defaults(run_command=_create)
    listing = add_command(
        actions,
        "list",
        "show all keys, without their secrets",
        "Show all keys, without their secrets.",
        ["palisade-serve keys list", "palisade-serve keys list --json | jq -r '.[] | select(.state == \"active\") | .name'"],
        STATUS,
        [shared],
    )
    listing.set_defaults(run_command=_list)
    revoke = add_command(
        actions,
        "revoke",
        "refuse a key from now on, for good",
        "Refuse a key from now on, for good. It stays in the list.",
        ["palisade-serve keys revoke 3kq7x2m4ab"],
        STATUS,
        [shared],
    )
    revoke.add_argument("id", metavar="ID", help="the key's id, or the whole key")
    revoke.set_defaults(run_command=_revoke)


def parse_expiry(text: str, now: datetime) -> datetime | None:
    """Parse ``90d``, ``2027-01-31`` or ``never`` (``None``).

    Raises:
        ValueError: It is none of them, or is not in the future.
    """
    if text == "never":
        return None
    try:
        if days := re.fullmatch(r"([0-9]{1,5})d", text):
            expires = now + timedelta(days=int(days[1]))
        elif re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            expires = datetime.fromisoformat(text).replace(tzinfo=UTC)
        else:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"'{text}' is not an expiry; write days as 90d, a date as 2027-01-31, or never") from None
    if expires <= now:
        raise ValueError(f"'{text}' has passed; give an expiry in the future, or never")
    return expires


def _create(options: argparse.Namespace) -> int:
    from service.keys import KeyFileError, create_key

    now = _now()
    try:
        expires = parse_expiry(options.expires, now)
    except ValueError as error:
        return fail(f"--expires: {error}", 2)
    path = _path(options)
    if path is None:
        return 2
    try:
        key, text = create_key(path, options.name, options.tier, expires, now)
    except KeyFileError as error:
        return fail(str(error), 1)
    except ValueError as error:
        return fail(f"--{error}", 2)
    if options.json:
        print(json.dumps({"key": text, **_public(key, now)}))
        return 0
    print(text, flush=True)  # alone on standard output, so that a script can take it from there
    until = f"until {_time(key.expires)}" if key.expires else "for ever"
    print(
        f"\nKey {key.id} ({key.name}, tier {key.tier}) is valid {until}. It is shown only this once: "
        "put it where you keep secrets.\n"
        "Send it with every request, say from a variable:\n"
        "  curl -H \"Authorization: Bearer $PALISADE_KEY\" -H 'Content-Type: image/png' --data-binary @image.png "
        "http://127.0.0.1:8000/v1/classify\n"
        f"A service uses it when its PALISADE_KEYS_FILE is {path.absolute()}.",
        file=sys.stderr,
    )
    return 0


def _list(options: argparse.Namespace) -> int:
    from service.keys import KeyFileError, read_keys

    path = _path(options)
    if path is None:
        return 2
    try:
        keys = read_keys(path)
    except KeyFileError as error:
        return fail(str(error), 1)
    now = _now()
    shown = [_public(key, now) for key in keys]
    print(json.dumps(shown, indent=2) if options.json else _table(shown))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from service.keys import KEY_ID, KEY_TEXT, KeyFileError, revoke_key

    whole = KEY_TEXT.fullmatch(options.id)
    if whole is None and KEY_ID.fullmatch(options.id) is None:
        # Not repeated: it may be a key with a slip in it.
        return fail(
            "ID: that is no key's id; ids have 10 characters of a-z and 2-7, and `palisade-serve keys list` shows them", 2
        )
    path = _path(options)
    if path is None:
        return 2
    now = _now()
    try:
        key = revoke_key(path, whole[1] if whole else options.id, now)
    except KeyFileError as error:
        return fail(str(error), 1)
    print(json.dumps(_public(key, now)) if options.json else f"key {key.id} ({key.name}) is revoked since {_time(key.revoked)}")
    return 0


def _path(options: argparse.Namespace) -> Path | None:
    file = options.file or os.environ.get("PALISADE_KEYS_FILE")
    if not file:
        fail("which key file? Give --file FILE or set PALISADE_KEYS_FILE", 2)
        return None
    return Path(file)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _public(key: Key, now: datetime) -> dict[str, str | None]:
    """Return what may be shown of a key: all but its hash."""
    return {
        "id": key.id,
        "name": key.name,
        "tier": key.tier,
        "created": _time(key.created),
        "expires": _time(key.expires),
        "revoked": _time(key.revoked),
        "state": key.state(now.timestamp()),
    }


def _table(shown: Sequence[dict[str, str | None]]) -> str:
    rows = [COLUMNS, *(tuple(key[column] or "never" for column in COLUMNS) for key in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
