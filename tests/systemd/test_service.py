"""The shipped units under a real systemd, with a stand-in for luod: what luod builds on holds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from luod_protocol.fds import OwnedFd
from processes import readable, until
from systemd_rig import SOCKETS, Manager
from systemd_standin import SERVICE, service, standin, stored

pytestmark = pytest.mark.usefixtures("require_systemd")


@pytest.fixture
def started() -> Iterator[Manager]:
    with standin() as manager:
        manager.ctl("start", SERVICE)
        yield manager


LISTENING = {name: (f"/run/luod/{name}", True, True) for name in ("serialize", "deserialize", "control")}


def test_a_connection_starts_it_with_the_three_sockets() -> None:
    with standin() as manager:
        manager.ctl("start", *SOCKETS)
        assert manager.show(SERVICE, "ActiveState") == {"ActiveState": "inactive"}
        assert service(manager, "passed") == LISTENING
        assert manager.show(SERVICE, "ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"}


def test_who_may_connect(started: Manager) -> None:
    luod = started.user("luod")
    found = {name: os.stat(f"{started.runtime_dir}/{name}") for name in LISTENING}
    assert {name: oct(each.st_mode & 0o777) for name, each in found.items()} == {
        "serialize": "0o660",
        "deserialize": "0o660",
        "control": "0o600",
    }
    assert {(each.st_uid, each.st_gid) for each in found.values()} == {(luod.uid, luod.gid)}
    folder = os.stat(started.runtime_dir)
    assert (oct(folder.st_mode & 0o777), folder.st_uid, folder.st_gid) == ("0o755", luod.uid, luod.gid)


def test_the_store_outlives_a_kill(started: Manager) -> None:
    service(started, "store", "box", b"what must not be lost")
    started.kill(SERVICE)
    assert service(started, "passed") == {**LISTENING, "box": b"what must not be lost"}  # waits in the backlog
    assert started.show(SERVICE, "NRestarts", "NFileDescriptorStore") == {"NRestarts": "1", "NFileDescriptorStore": "1"}
    service(started, "unstore", "box")
    assert stored(started) == 0


def test_the_store_outlives_a_restart(started: Manager) -> None:
    service(started, "store", "box", b"content")
    before = started.main_pid(SERVICE)
    started.ctl("restart", SERVICE)
    assert started.main_pid(SERVICE) != before
    assert service(started, "passed") == {**LISTENING, "box": b"content"}


def test_the_store_outlives_a_new_systemd(started: Manager) -> None:
    service(started, "store", "box", b"content")
    started.ctl("daemon-reload")
    started.ctl("daemon-reexec")
    started.kill(SERVICE)
    assert service(started, "passed") == {**LISTENING, "box": b"content"}


def test_a_child_becomes_the_main_process_in_a_reload(started: Manager) -> None:
    service(started, "store", "box", b"content")
    pid, _ = service(started, "pid")
    started.ctl("reload", SERVICE)
    successor, _ = service(started, "pid")
    assert successor != pid
    expected = {"MainPID": str(successor), "SubState": "running", "NRestarts": "0", "NFileDescriptorStore": "1"}
    assert started.show(SERVICE, *expected) == expected
    until(lambda: service(started, "pid") == (successor, 1), "the successor is systemd's child")
    assert service(started, "passed") == {**LISTENING, "box": b"content"}
    # systemd watches it as it watched the first; what it was not told of is not lost either.
    started.kill(SERVICE)
    assert service(started, "passed") == {**LISTENING, "box": b"content"}
    assert service(started, "pid")[0] not in (pid, successor)


def test_the_successor_may_notify_after_a_reload(started: Manager) -> None:
    for name in ("first", "second"):
        started.ctl("reload", SERVICE)
        service(started, "store", name, name.encode())
    assert stored(started) == 2


def test_a_service_that_hangs_is_started_again_with_the_store(started: Manager) -> None:
    service(started, "store", "box", b"content")
    service(started, "be_well_within", 100_000)  # for this start of it; the next has the shipped time again
    with OwnedFd(os.pidfd_open(started.main_pid(SERVICE))) as pidfd:
        assert readable(pidfd.fileno())
    assert service(started, "passed")["box"] == b"content"
    assert started.show(SERVICE, "NRestarts", "WatchdogUSec") == {"NRestarts": "1", "WatchdogUSec": "30s"}


def test_what_a_full_store_is_sent_is_dropped() -> None:
    with standin("FileDescriptorStoreMax=2\n") as manager:
        manager.ctl("start", SERVICE)
        for name in ("a", "b", "c"):
            service(manager, "store", name, b"")
        assert stored(manager) == 2


def test_names_as_many_bytes_as_a_full_store_has_come_back(started: Manager) -> None:
    """All names are passed in one variable of at most MAX_ARG_STRLEN. Fewer and longer ones, since systemd compares each with each."""
    most = int(started.show(SERVICE, "FileDescriptorStoreMax")["FileDescriptorStoreMax"])
    count = sum(len(f":b{number}") for number in range(most)) // 200
    service(started, "store", "b" * 167, b"content", count)  # 200 bytes each, then a colon
    assert stored(started) == count
    started.kill(SERVICE)
    assert service(started, "count") == count + len(LISTENING)


@pytest.mark.slow
def test_a_program_that_is_missing_is_waited_for(started: Manager) -> None:
    """As in the middle of an installation that replaces it: neither the service nor a socket is given up, and clients wait."""
    service(started, "store", "box", b"content")
    good = started.folder / "units" / f"{SERVICE}.d" / "95-test.conf"
    started.drop_in(SERVICE, "[Service]\nExecStart=\nExecStart=/nowhere/luod\n")
    started.ctl("daemon-reload")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        started.kill(SERVICE)
        client.connect(f"{started.runtime_dir}/control")
        client.send(b"('passed',)")
        # More starts than systemd's default limits allow: 5 in 10 s for a service, 20 in 2 s for a socket.
        until(lambda: int(started.show(SERVICE, "NRestarts")["NRestarts"]) > 25, "it is started again and again")
        good.unlink()
        started.ctl("daemon-reload")
        assert readable(client.fileno())
        assert b"'box': b'content'" in client.recv(65536)
    for unit in SOCKETS:
        assert started.show(unit, "ActiveState") == {"ActiveState": "active"}


def test_isolate_leaves_it_alone(started: Manager) -> None:
    service(started, "store", "box", b"content")
    pid = started.main_pid(SERVICE)
    stub = started.folder / "units" / "rescue.target"
    stub.write_text(stub.read_text() + "AllowIsolate=yes\nRequires=sysinit.target\n")
    started.ctl("daemon-reload")
    started.ctl("isolate", "rescue.target")
    assert started.main_pid(SERVICE) == pid
    assert stored(started) == 1


def test_a_stop_leaves_the_sockets(started: Manager) -> None:
    started.ctl("stop", SERVICE)
    assert service(started, "passed") == LISTENING  # started by the connection
    started.ctl("stop", SERVICE, *SOCKETS)
    assert started.show(SERVICE, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert [name for name in LISTENING if os.path.exists(f"{started.runtime_dir}/{name}")] == []


def test_the_end_of_a_socket_costs_neither_the_service_nor_its_store(started: Manager) -> None:
    service(started, "store", "box", b"content")
    started.ctl("stop", "luod-serialize.socket")
    assert service(started, "passed")["box"] == b"content"
    assert stored(started) == 1
