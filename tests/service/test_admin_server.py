"""Who gets in: the Unix socket's file, the key of the port, and starts that are refused."""

from __future__ import annotations

import contextlib
import socket
import stat
from pathlib import Path

import pytest

from service.admin_server import AdminKeyError, AdminServer, check_unix_socket, open_unix_socket, read_admin_key
from service.settings import Settings
from tests.service.test_cli import Failures

KEY = "0123456789abcdef0123456789abcdef"


def test_the_socket_is_its_owners_alone_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    open_unix_socket(path).close()
    assert path.exists(), "as a service leaves it that was killed"
    with open_unix_socket(path):
        assert stat.filemode(path.stat().st_mode) == "srw-------"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with open_unix_socket(path) as first:
        with pytest.raises(OSError, match=r"admin.sock cannot be opened: another service listens there"):
            open_unix_socket(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.accept()[0].close()


def test_a_service_that_stops_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    first = AdminServer(Settings(admin_socket=str(path)))
    path.rename(tmp_path / "old")  # as if it had stopped listening, and another had taken the place
    second = AdminServer(Settings(admin_socket=str(path)))
    first.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    second.close()
    assert not path.exists()


def test_a_service_that_listens_and_takes_nobody_is_left_alone_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.admin_server.PROBE_S", 0.01)
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as waiting:
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(2):
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(OSError, match="another service listens there"):
            open_unix_socket(path)
        assert path.is_socket()


def test_where_no_socket_could_be_is_told_without_opening_one(tmp_path: Path) -> None:
    check_unix_socket(tmp_path / "admin.sock")
    assert list(tmp_path.iterdir()) == []
    with open_unix_socket(tmp_path / "live"):
        check_unix_socket(tmp_path / "live")
    (tmp_path / "notes").write_text("precious")
    for bad in ("notes", "missing/admin.sock", "x" * 108):
        with pytest.raises(OSError, match="cannot be opened") as told:
            check_unix_socket(tmp_path / bad)
        with pytest.raises(OSError, match="cannot be opened"):
            open_unix_socket(tmp_path / bad)
        assert bad in str(told.value)


def test_a_key_stands_alone_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    path.write_text(f"\n{KEY}\n")
    assert read_admin_key(path) == KEY.encode()
    for bad in ("", KEY[:-1], KEY + " " + KEY, KEY + "\n" + KEY, KEY + "\N{EURO SIGN}"):
        path.write_text(bad)
        with pytest.raises(AdminKeyError, match="32 characters or more"):
            read_admin_key(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def failures(checkpoint: Path, directory: Path) -> Failures:
    (directory / "notes").write_text("precious")
    (directory / "key").write_text(KEY)
    free = {"checkpoint": str(checkpoint), "port": "0", "metrics_port": "0"}
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        commands = {
            "no key": {"admin_port": "0"},
            "no key file": {"admin_port": "0", "admin_key_file": str(directory / "missing")},
            "the http port": {"port": "7999", "admin_port": "7999", "admin_key_file": str(directory / "key")},
            "busy": {"admin_port": port, "admin_key_file": str(directory / "key"), "admin_socket": str(directory / "s")},
            "a file": {"admin_socket": str(directory / "notes")},
            "no folder": {"admin_socket": str(directory / "missing" / "admin.sock")},
        }
        return Failures(directory, {name: {**free, **settings} for name, settings in commands.items()})


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("no key", 2, "PALISADE_ADMIN_KEY_FILE"),
        ("the http port", 2, "7999"),
        ("no key file", 1, "missing: the admin key cannot be read: No such file"),
        ("busy", 1, "the admin port 127.0.0.1:"),
        ("a file", 1, "notes cannot be opened: there is a file of that name that is no socket"),
        ("no folder", 1, "admin.sock cannot be opened: No such file"),
    ],
)
def test_a_door_that_cannot_be_opened_or_guarded_stops_the_start(
    failures: Failures, name: str, status: int, words: str
) -> None:
    assert failures.status(name) == status
    assert words in failures.the_line(name)


def test_a_start_that_fails_leaves_nothing_behind_and_takes_nothing_away(failures: Failures, directory: Path) -> None:
    assert failures.status("busy") == 1
    assert (directory / "notes").read_text() == "precious"
    assert not (directory / "s").exists()
