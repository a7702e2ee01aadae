"""API keys: one JSON file of their hashes, changed by the command line and read again by the service when it changes.

A key reads ``palisade_<id>_<secret>``. The id is public and may be logged; the secret has 256 random bits, so one round of
SHA-256 is enough to store it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger(__name__)

KeyTier = Literal["standard", "trusted"]
KeyState = Literal["active", "expired", "revoked"]

KEY_TEXT = re.compile(r"palisade_([a-z2-7]{10})_[0-9A-Za-z]{43}")
"""A whole key; its length is fixed, so nothing longer is ever hashed."""
KEY_ID = re.compile(r"[a-z2-7]{10}")

_ID_LETTERS = string.ascii_lowercase + "234567"
_SECRET_LETTERS = string.digits + string.ascii_letters  # 43 of 62 letters: 256.03 bits
_NOBODY = "0" * 64  # what an unknown key's hash is compared with
_RECHECK_S = 1.0

_Version = tuple[int, int, int, int, int]  # device, inode, size, times of change: what tells one state of a file from another


class KeyFileError(Exception):
    """A key file that cannot be read, understood or changed; says which file and which field, and never what is secret."""


def _printable(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be printable, without spaces around it")
    return text


class Key(BaseModel):
    """One key, without its secret.

    Attributes:
        id: Public name.
        name: What the operator calls it.
        tier: Whose limits and policy hold for it.
        created: When.
        expires: From when on it is refused; ``None`` means never.
        revoked: When it was revoked; ``None`` if it was not.
        sha256: Hash of the whole key; left out where a key is printed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    id: str = Field(pattern=f"^{KEY_ID.pattern}$")
    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)]
    tier: KeyTier
    created: AwareDatetime
    expires: AwareDatetime | None
    revoked: AwareDatetime | None
    sha256: str = Field(pattern="^[0-9a-f]{64}$", repr=False)

    def state(self, now: float) -> KeyState:
        """Return what the key is at ``now``, in Unix seconds."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires.timestamp() else "active"


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    format: Literal[1]
    keys: tuple[Key, ...]


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return a file's keys in the order in which they were made.

    Raises:
        KeyFileError: There is no such file, or a field of it is missing, unknown, given twice or wrong.
    """
    return _read(path)[0]


def create_key(path: Path, name: str, tier: KeyTier, expires: datetime | None, now: datetime) -> tuple[Key, str]:
    """Make a key, add it to a file, which is made if there is none, and return it with its text, which is kept nowhere.

    Raises:
        KeyFileError: The file cannot be read or changed; it is as it was.
        ValueError: The name is empty, longer than 100 characters or not printable.
    """
    with _changing(path) as file:
        keys = read_keys(file) if file.exists() else ()
        taken = {key.id for key in keys}
        key_id = next(made for made in iter(_random_id, "") if made not in taken)
        text = f"palisade_{key_id}_{''.join(secrets.choice(_SECRET_LETTERS) for _ in range(43))}"
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        try:
            key = Key(id=key_id, name=name, tier=tier, created=now, expires=expires, revoked=None, sha256=sha256)
        except ValidationError as error:
            raise ValueError(_first(error)) from None
        _write(file, (*keys, key))
        return key, text


def revoke_key(path: Path, key_id: str, now: datetime) -> Key:
    """Revoke a key for good and return it; one that was revoked before stays as it is.

    Raises:
        KeyFileError: The file cannot be read or changed, or has no such key.
    """
    with _changing(path) as file:
        keys = read_keys(file)
        old = next((key for key in keys if key.id == key_id), None)
        if old is None:
            raise KeyFileError(f"key file {path} has no key {key_id!r}; list its keys to see their ids")
        if old.revoked is not None:
            return old
        new = old.model_copy(update={"revoked": now})
        _write(file, [new if key is old else key for key in keys])
        return new


class KeyStore:
    """Finds keys for a running service, and notices within a second of use that their file has changed.

    A file that has become bad or has gone leaves the keys as they were read last, so that neither a slip of the editor nor a
    volume that is being swapped locks everybody out; the log has one error then. Not for several threads.

    Args:
        path: The key file, or a symbolic link to it.
        clock: Unix seconds.

    Raises:
        KeyFileError: The file cannot be read or understood now.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._complaint = ""
        self._checked = clock()
        keys, version = _read(path)
        self._version: _Version | None = version  # None when the last attempt to read failed
        self._keys = {key.id: key for key in keys}

    def find(self, presented: str) -> Key | None:
        """Return the key whose whole text this is, whatever its state, or ``None``.

        Takes the same steps for an id that exists and one that does not, and compares hashes in constant time.
        """
        match = KEY_TEXT.fullmatch(presented)
        if match is None:
            return None
        self._refresh()
        key = self._keys.get(match[1])
        expected = _NOBODY if key is None else key.sha256
        same = hmac.compare_digest(hashlib.sha256(presented.encode()).hexdigest(), expected)
        return key if same else None

    def state(self, key: Key) -> KeyState:
        """Return what a key is now."""
        return key.state(self._clock())

    def _refresh(self) -> None:
        now = self._clock()
        if 0 <= now - self._checked < _RECHECK_S:  # negative when the clock was set back
            return
        self._checked = now
        try:
            if _version(os.stat(self._path)) == self._version:
                return
            # A new version counts as seen even if it turns out bad: it is parsed and complained of once.
            content, self._version = _load(self._path)
            keys = _parse(content, self._path)
        except OSError as error:
            self._version = None
            self._complain(f"key file {self._path} cannot be read: {error.strerror}")
        except KeyFileError as error:
            self._complain(str(error))
        else:
            self._keys = {key.id: key for key in keys}
            self._complaint = ""
            log.info("key file %s was read again: %d keys", self._path, len(keys))

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            log.error("%s; the keys that were read before stay valid, and revocations are not noticed", complaint)
            self._complaint = complaint


def _random_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(10))


def _read(path: Path) -> tuple[tuple[Key, ...], _Version]:
    try:
        content, version = _load(path)
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be read: {error.strerror}") from None
    return _parse(content, path), version


def _load(path: Path) -> tuple[bytes, _Version]:
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"key file {path} is not a regular file")
        return file.read(), _version(status)


def _version(status: os.stat_result) -> _Version:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _parse(content: bytes, path: Path) -> tuple[Key, ...]:
    try:
        keys = _KeyFile.model_validate_json(content).keys
        json.loads(content, object_pairs_hook=_unique)
    except ValidationError as error:
        raise KeyFileError(f"key file {path}: {_first(error)}") from None
    except ValueError as error:
        raise KeyFileError(f"key file {path}: {error}") from None
    seen: set[str] = set()
    for number, key in enumerate(keys):
        if key.id in seen:
            raise KeyFileError(f"key file {path}: keys[{number}].id: {key.id} comes twice")
        seen.add(key.id)
    return keys


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(members)
    if len(fields) < len(members):
        raise ValueError(f"a field is given twice among {', '.join(fields)}")
    return fields


def _first(error: ValidationError) -> str:
    """Say what the first problem is and where; never the value, which may be a secret in the wrong place."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    return f"{field}: {problem['msg']}" if field else problem["msg"]


@contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Hold the lock of a key file, so that its changes come one after another, and yield the file behind symbolic links."""
    try:
        file = Path(os.path.realpath(path))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(file.with_name(f".{file.name}.lock"), flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(lock)
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be changed: {error.strerror} ({error.filename})") from None


def _write(file: Path, keys: Sequence[Key]) -> None:
    """Replace a file in one step; a reader sees the old one or the new one, even after a crash."""
    text = json.dumps({"format": 1, "keys": [key.model_dump(mode="json") for key in keys]}, indent=2, ensure_ascii=False)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as target:
            _keep_access(file, target.fileno())
            target.write(text + "\n")
            target.flush()
            os.fsync(target.fileno())
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


def _keep_access(old: Path, new: int) -> None:
    """Give the new file the old one's owner and mode: else the service could lose sight of a key that root revokes."""
    if not old.exists():
        return
    status = old.stat()
    try:
        os.fchown(new, status.st_uid, status.st_gid)
    except PermissionError:
        raise KeyFileError(f"key file {old} belongs to another user: change it as that user or as root") from None
    os.fchmod(new, stat.S_IMODE(status.st_mode))
