"""The key file and the keys found in it, with a fake clock."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.keys import Key, KeyFileError, KeyStore, create_key, read_keys, revoke_key
from tests.service.conftest import PATIENCE_S, ROOT

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
SECRET_LENGTH = 43


class FakeClock:
    """Unix seconds that move only when a test says so."""

    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def make(path: Path, name: str = "lab", expires: datetime | None = None) -> tuple[Key, str]:
    return create_key(path, name, "standard", expires, NOW)


def secret_of(text: str) -> str:
    return text.rpartition("_")[2]


def test_a_key_has_a_public_id_and_a_secret_of_256_bits_that_is_stored_nowhere(path: Path) -> None:
    key, text = create_key(path, "lab", "trusted", NOW + timedelta(days=1), NOW)
    assert re.fullmatch(rf"palisade_{key.id}_[0-9A-Za-z]{{{SECRET_LENGTH}}}", text)
    assert re.fullmatch(r"[a-z2-7]{8,12}", key.id)
    assert 62**SECRET_LENGTH > 2**256
    assert json.loads(path.read_bytes()) == {
        "format": 1,
        "keys": [
            {
                "id": key.id,
                "name": "lab",
                "tier": "trusted",
                "created": "2026-05-01T12:00:00Z",
                "expires": "2026-05-02T12:00:00Z",
                "revoked": None,
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
        ],
    }
    assert not any(secret_of(text) in file.read_text() for file in path.parent.iterdir())


def test_what_was_made_is_what_is_read_in_order(path: Path) -> None:
    made = [make(path, name)[0] for name in ("first", "zweite Gruppe", "troisième")]
    assert read_keys(path) == tuple(made)
    assert len({key.id for key in made}) == 3


def test_only_the_owner_may_read_a_new_file(path: Path) -> None:
    make(path)
    assert [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()] == [0o600, 0o600]  # the file and its lock


def test_a_changed_file_keeps_its_mode_so_that_the_service_can_still_read_it(path: Path) -> None:
    key, _ = make(path)
    path.chmod(0o640)
    revoke_key(path, key.id, NOW)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change a file of another user and leave it its own")
def test_a_file_that_root_changes_still_belongs_to_the_service(path: Path) -> None:
    key, _ = make(path)
    os.chown(path, 4711, 4712)
    revoke_key(path, key.id, NOW)
    assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)


def test_a_change_through_a_symbolic_link_changes_the_file_and_leaves_the_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    make(path)
    link.symlink_to(path.name)
    make(link)
    assert link.is_symlink()
    assert len(read_keys(path)) == 2


def test_revoking_twice_keeps_the_first_time(path: Path) -> None:
    other, _ = make(path)
    key, _ = make(path)
    revoke_key(path, key.id, NOW)
    assert revoke_key(path, key.id, NOW + timedelta(days=1)).revoked == NOW
    assert read_keys(path) == (other, key.model_copy(update={"revoked": NOW}))


def test_revoking_an_id_that_is_not_there_names_it_and_the_file(path: Path) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match=r"keys\.json has no key 'abcdefghij'"):
        revoke_key(path, "abcdefghij", NOW)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", " ", " lab", "a\nb", "a\x1b[31m", "x" * 101, "\u202eabc", "\udc80"])
def test_a_name_that_would_garble_a_terminal_or_a_log_is_refused(path: Path, name: str) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^name: [^\n]+$"):
        make(path, name)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match=r"keys\.json cannot be changed: No space left on device"):
        make(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"nowhere/keys\.json cannot be changed: No such file or directory"):
        make(tmp_path / "nowhere" / "keys.json")


MAKE_MANY = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from service.keys import create_key
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    print(create_key(Path(sys.argv[1]), f"key {number}", "standard", None, datetime.now(UTC))[0].id)
"""


def test_processes_that_make_keys_at_once_lose_none_and_readers_never_see_half_a_file(path: Path) -> None:
    make(path)
    command = [sys.executable, "-c", MAKE_MANY, str(path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    makers: list[Any] = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for maker in makers:
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        maker.stdin.write("go\n")
        maker.stdin.flush()
    while any(maker.poll() is None for maker in makers):
        read_keys(path)
    made = [key_id for maker in makers for key_id in maker.communicate(timeout=PATIENCE_S)[0].split()]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert len(made) == 100
    assert {key.id for key in read_keys(path)} > set(made)
    assert len(read_keys(path)) == 101


GOOD: dict[str, Any] = {
    "id": "abcdefghij",
    "name": "lab",
    "tier": "standard",
    "created": "2026-05-01T12:00:00Z",
    "expires": None,
    "revoked": None,
    "sha256": "ab" * 32,
}
MISPLACED = f"palisade_abcdefghij_{'S3cret' * 7}x"  # a whole key where it does not belong


def file_with(**changes: Any) -> str:
    fields = {name: value for name, value in {**GOOD, **changes}.items() if value != "left out"}
    return json.dumps({"format": 1, "keys": [{**GOOD, "id": "zzzzzzzzzz"}, fields]})


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("", "Invalid JSON"),
        ("not json", "Invalid JSON"),
        (file_with()[:-5], "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ("[]", "object"),
        ('{"keys": []}', "format"),
        ('{"format": 2, "keys": []}', "format"),
        ('{"format": "1", "keys": []}', "format"),
        ('{"format": 1}', "keys"),
        ('{"format": 1, "keys": [], "more": 1}', "more"),
        ('{"format": 1, "keys": [], "keys": []}', "keys"),
        (json.dumps({"format": 1, "keys": [GOOD, GOOD]}), "keys[1].id: abcdefghij"),
        (file_with().replace('"revoked": null', '"revoked": "2026-05-01T12:00:00Z", "revoked": null', 1), "revoked"),
        (file_with(id="ABCDEFGHIJ"), "keys[1].id"),
        (file_with(id="abcdefghij\n"), "keys[1].id"),
        (file_with(id=MISPLACED), "keys[1].id"),
        (file_with(name=7), "keys[1].name"),
        (file_with(name=""), "keys[1].name"),
        (file_with(name="a\x1bb"), "keys[1].name"),
        (file_with(tier="anonymous"), "keys[1].tier"),
        (file_with(tier=MISPLACED), "keys[1].tier"),
        (file_with(created=1777636800), "keys[1].created"),
        (file_with(created="2026-05-01T12:00:00"), "keys[1].created"),  # in which time zone?
        (file_with(expires="never"), "keys[1].expires"),
        (file_with(expires="left out"), "keys[1].expires"),
        (file_with(revoked=False), "keys[1].revoked"),
        (file_with(revoked="left out"), "keys[1].revoked"),
        (file_with(sha256="AB" * 32), "keys[1].sha256"),
        (file_with(sha256=MISPLACED), "keys[1].sha256"),
        (file_with(secret=MISPLACED), "keys[1].secret"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_field_and_never_a_value(path: Path, content: str, field: str) -> None:
    path.write_text(content)
    with pytest.raises(KeyFileError) as refusal:
        read_keys(path)
    message = str(refusal.value)
    assert message.startswith(f"key file {path}: ")
    assert field in message
    assert "\n" not in message
    for error in (refusal.value, refusal.value.__cause__, refusal.value.__context__):  # what a traceback would show
        assert "S3cret" not in str(error)
        assert "abab" not in str(error)


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(file_with().encode("utf-16"))
    with pytest.raises(KeyFileError, match="Invalid JSON"):
        read_keys(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "loop"])
def test_what_is_no_file_stops_the_start_and_never_waits(path: Path, clock: FakeClock, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    with pytest.raises(KeyFileError, match=f"key file {path} "):
        KeyStore(path, clock)


def test_a_key_is_found_by_its_whole_text_alone(path: Path, clock: FakeClock) -> None:
    (one, text), (two, other) = make(path), make(path)
    store = KeyStore(path, clock)
    assert store.find(text) == one
    assert store.find(other) == two
    mixed = f"palisade_{one.id}_{secret_of(other)}"
    for wrong in (mixed, text[:-1], text + "x", text + "\n", " " + text, text.upper(), text.lower(), one.id, one.sha256, ""):
        assert store.find(wrong) is None


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyStore, str]:
    """A store with one key, and the key's text."""
    path = tmp_path_factory.mktemp("kept") / "keys.json"
    _, text = make(path)
    return KeyStore(path, FakeClock()), text


@given(presented=st.one_of(st.text(), st.from_regex(r"palisade_[a-z2-7]{10}_[0-9A-Za-z]{43}", fullmatch=True)))
def test_whatever_else_is_presented_is_no_key_and_no_error(kept: tuple[KeyStore, str], presented: str) -> None:
    store, _ = kept
    assert store.find(presented) is None
    assert store.find(presented * 10_000) is None


@given(place=st.integers(0, 62), letter=st.characters())
def test_a_key_with_one_wrong_character_is_no_key(kept: tuple[KeyStore, str], place: int, letter: str) -> None:
    store, text = kept
    changed = text[:place] + letter + text[place + 1 :]
    assert (store.find(changed) is not None) == (changed == text)


def test_an_unknown_id_takes_the_same_steps_as_a_known_one(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, text = make(path)
    store = KeyStore(path, clock)
    compared: list[tuple[str, int]] = []
    compare = hmac.compare_digest

    def watched(a: Any, b: Any) -> bool:
        compared.append((a, len(b)))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    wrong = f"palisade_{key.id}_{'x' * SECRET_LENGTH}"
    unknown = f"palisade_{'a' * 10}_{'x' * SECRET_LENGTH}"
    for presented in (text, wrong, unknown):
        store.find(presented)
    assert compared == [(hashlib.sha256(presented.encode()).hexdigest(), 64) for presented in (text, wrong, unknown)]


def test_a_change_is_noticed_a_second_after_the_last_look_and_not_looked_for_before(path: Path, clock: FakeClock) -> None:
    key, text = make(path)
    store = KeyStore(path, clock)
    revoke_key(path, key.id, NOW)
    _, fresh = make(path)
    clock.now += 0.9
    found = store.find(text)
    assert found is not None
    assert store.state(found) == "active"
    assert store.find(fresh) is None  # guessing keys does not make the service read its disk for each guess
    clock.now += 0.1
    found = store.find(text)
    assert found is not None
    assert store.state(found) == "revoked"
    assert store.find(fresh) is not None


def test_a_clock_that_was_set_back_does_not_hide_a_change(path: Path, clock: FakeClock) -> None:
    _, text = make(path)
    store = KeyStore(path, clock)
    path.write_text('{"format": 1, "keys": []}')
    clock.now -= 86400
    assert store.find(text) is None


def test_a_file_of_the_same_size_and_date_put_in_its_place_is_noticed(path: Path, clock: FakeClock) -> None:
    _, text = make(path, "old")
    store = KeyStore(path, clock)
    copy = path.with_name("copy")
    copy.write_text(path.read_text().replace('"old"', '"new"'))
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    copy.replace(path)
    clock.now += 1
    found = store.find(text)
    assert found is not None
    assert found.name == "new"


def test_a_key_expires_when_its_time_has_come(path: Path, clock: FakeClock) -> None:
    _, text = make(path, expires=NOW + timedelta(days=90))
    store = KeyStore(path, clock)
    key = store.find(text)
    assert key is not None
    clock.now += 90 * 86400 - 0.001
    assert store.state(key) == "active"
    clock.now += 0.001
    assert store.state(key) == "expired"
    revoke_key(path, key.id, NOW)
    key = store.find(text)
    assert key is not None
    assert store.state(key) == "revoked"


def test_a_mounted_secret_that_is_swapped_is_read_again(tmp_path: Path, clock: FakeClock) -> None:
    """As the kubelet does: a dated folder for each version, and one link that moves from one to the next."""
    for version in ("..2026_1", "..2026_2"):
        (tmp_path / version).mkdir()
    _, old = make(tmp_path / "..2026_1" / "keys.json")
    _, new = make(tmp_path / "..2026_2" / "keys.json")
    (tmp_path / "..data").symlink_to("..2026_1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    store = KeyStore(tmp_path / "keys.json", clock)
    assert store.find(old) is not None
    (tmp_path / "..data_tmp").symlink_to("..2026_2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    clock.now += 1
    assert store.find(old) is None
    assert store.find(new) is not None


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("harm", ["bad", "gone", "folder"])
def test_a_file_that_went_bad_keeps_the_keys_and_says_so_once_until_it_is_good_again(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    caplog.set_level(logging.DEBUG)
    _, text = make(path)
    store = KeyStore(path, clock)
    good = path.with_name("good")
    for round_ in (1, 2):
        path.rename(good)
        if harm == "bad":
            path.write_text(file_with(tier=MISPLACED))
        elif harm == "folder":
            path.mkdir()
        for _ in range(3):
            clock.now += 1
            assert store.find(text) is not None
        assert len(errors(caplog)) == round_
        assert str(path) in errors(caplog)[-1]
        if harm == "folder":
            path.rmdir()
        good.replace(path)
        make(path)
        clock.now += 1
        assert store.find(text) is not None
        assert len(errors(caplog)) == round_
    path.write_text('{"format": 1, "keys": []}')
    clock.now += 1
    assert store.find(text) is None
    assert "S3cret" not in caplog.text
    assert "abab" not in caplog.text


def test_each_time_that_the_file_goes_is_said_even_if_the_very_same_comes_back(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    link = path.with_name("link")
    _, text = make(path)
    link.symlink_to(path.name)
    store = KeyStore(link, clock)
    for round_ in (1, 2):
        link.unlink()
        clock.now += 1
        assert store.find(text) is not None
        link.symlink_to(path.name)
        clock.now += 1
        assert store.find(text) is not None
        assert len(errors(caplog)) == round_


@pytest.fixture
def watched_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_no_secret_is_logged_or_shown(
    path: Path, clock: FakeClock, watched_log: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    key, text = make(path)
    store = KeyStore(path, clock)
    store.find(text)
    revoke_key(path, key.id, NOW)
    clock.now += 1
    found = store.find(text)
    written = "".join(capfd.readouterr())
    shown = [repr(key), str(key), f"{[found]}", repr(store), watched_log.text, written]
    assert key.id in shown[0]  # so that there is something to be left out of
    for place in shown:
        assert secret_of(text) not in place
        assert key.sha256 not in place
