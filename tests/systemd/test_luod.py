"""luod as the service that is shipped, under a real systemd. What befalls it at random moments is in tests/soak."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from contextlib import contextmanager

import pytest

import luod_client
from luod_client import Code, Refusal
from luod_protocol.errors import ProtocolFault
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import DaemonStatus
from processes import Talk, spawn_client, until
from systemd_rig import SOCKETS, Manager
from things import find, let_go, memfd, pipe, preserve_pipe

pytestmark = pytest.mark.usefixtures("require_systemd")

SERVICE = "luod.service"


@contextmanager
def running(settings: str = "") -> Generator[Manager]:
    """A systemd in which luod runs; `settings` are more lines for its unit."""
    with Manager(settings={SERVICE: settings} if settings else {}) as manager:
        manager.ctl("start", SERVICE)
        yield manager
        trouble = re.search(r"Traceback|Exception ignored|never awaited", manager.said(SERVICE))
        assert trouble is None, manager.said(SERVICE)


def stored(manager: Manager) -> int:
    """How many fds systemd has stored."""
    return int(manager.show(SERVICE, "NFileDescriptorStore")["NFileDescriptorStore"])


def preserve_memfd(manager: Manager, name: str, content: bytes, require: tuple[str, ...] = ("daemon-crash",)) -> bytes:
    """A preserved session with one memfd. Returns its id."""
    with luod_client.serialize(name, runtime_dir=manager.runtime_dir) as session, memfd(content) as fd:
        session.preserve({"ram": fd.fileno()})
        session.finalize(require=require)
        return session.id


def take_back(manager: Manager, name: str) -> bytes:
    """Claim, read and finish a session with one memfd."""
    with luod_client.deserialize(runtime_dir=manager.runtime_dir) as looker, looker.claim(name) as claim:
        with claim.retrieve()["ram"] as fd:
            content = os.pread(fd.fileno(), 1 << 20, 0)
        claim.finish()
        return content


def status(manager: Manager) -> DaemonStatus:
    with luod_client.control(runtime_dir=manager.runtime_dir) as control:
        return control.status()


def test_the_first_client_starts_it(systemd_luod: Manager) -> None:
    manager = systemd_luod
    manager.ctl("start", *SOCKETS)
    assert manager.show(SERVICE, "ActiveState") == {"ActiveState": "inactive"}
    preserve_memfd(manager, "guest", b"content")
    assert manager.show(SERVICE, "ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"}
    assert take_back(manager, "guest") == b"content"


def test_what_lies_in_the_store_is_what_luod_counts() -> None:
    with running() as manager:
        for count in range(4):
            assert stored(manager) == status(manager).stored_fds == count + 1, "a box each, and the ledger"
            preserve_memfd(manager, f"guest {count}", b"")
        for count in (3, 2, 1, 0):
            take_back(manager, f"guest {count}")
            assert stored(manager) == status(manager).stored_fds == count + 1


def test_finished_means_that_systemd_has_let_go_too() -> None:
    with running() as manager:
        read, _ = preserve_pipe(manager.runtime_dir)
        with read, luod_client.deserialize(runtime_dir=manager.runtime_dir) as looker:
            with looker.claim("guest") as claim:
                assert not let_go(read, 0)
                claim.finish()
            assert let_go(read)


def test_a_full_store_refuses_and_says_so() -> None:
    with running("[Service]\nFileDescriptorStoreMax=4\n") as manager:
        # The ledger has one place, and the witness needs one for a moment.
        for name in ("one", "two"):
            preserve_memfd(manager, name, name.encode())
        with luod_client.serialize("three", runtime_dir=manager.runtime_dir) as session, memfd(b"three") as fd:
            session.preserve({"ram": fd.fileno()})
            with pytest.raises(Refusal, match=r"can't be kept over a crash.*(full|room for 4).*still open") as refused:
                session.finalize()
            assert refused.value.code is Code.LIMIT_REACHED
            assert stored(manager) == 3
            take_back(manager, "one")
            session.finalize(require={"daemon-crash"})
        manager.kill(SERVICE)
        assert [take_back(manager, name) for name in ("two", "three")] == [b"two", b"three"]


def test_a_unit_without_a_store_promises_no_more_than_it_can() -> None:
    with running("[Service]\nFileDescriptorStoreMax=0\n") as manager:
        with luod_client.control(runtime_dir=manager.runtime_dir) as control:
            reasons = control.capabilities().survives
            assert "FileDescriptorStoreMax=" in reasons["daemon-crash"]
            assert reasons["daemon-upgrade"] == ""
        with luod_client.serialize("guest", runtime_dir=manager.runtime_dir) as session, memfd(b"content") as fd:
            session.preserve({"ram": fd.fileno()})
            with pytest.raises(Refusal, match="FileDescriptorStoreMax=") as refused:
                session.finalize(require={"daemon-crash"})
            assert refused.value.code is Code.CANNOT_SURVIVE
            assert session.finalize().survives == ("daemon-upgrade",)
        manager.ctl("reload", SERVICE)
        assert take_back(manager, "guest") == b"content"


def test_a_hung_luod_is_ended_by_the_watchdog_and_nothing_is_lost() -> None:
    with running("[Service]\nWatchdogSec=500ms\nTimeoutAbortSec=1s\n") as manager:
        preserve_memfd(manager, "guest", b"content")
        manager.ctl("reload", SERVICE)
        # The successor is watched as well, and gives signs of life: it lives longer than the watchdog's time.
        pid = manager.main_pid(SERVICE)
        seen = [manager.show(SERVICE, "WatchdogTimestampMonotonic")]
        until(lambda: len(seen) > 4 or void_append(seen, manager.show(SERVICE, "WatchdogTimestampMonotonic")), "signs of life")
        assert manager.main_pid(SERVICE) == pid
        os.kill(pid, signal.SIGSTOP)
        manager.until_shows(SERVICE, NRestarts="1", SubState="running")
        assert take_back(manager, "guest") == b"content"


def void_append(seen: list[dict[str, str]], value: dict[str, str]) -> bool:
    """Note a value that is new."""
    if value != seen[-1]:
        seen.append(value)
    return False


def test_a_reload_that_fails_leaves_all_as_it_was() -> None:
    with running() as manager:
        preserve_memfd(manager, "guest", b"content")
        pid = manager.main_pid(SERVICE)
        config = f"{manager.root}/etc/luod/luod.toml"
        with open(config, encoding="utf-8") as file:
            good = file.read()
        with open(config, "w", encoding="utf-8") as file:
            file.write("[limits]\nmax_sesions = 3\n")
        with pytest.raises(AssertionError):
            manager.ctl("reload", SERVICE)
        assert manager.main_pid(SERVICE) == pid
        assert status(manager).generation == 1
        with open(config, "w", encoding="utf-8") as file:
            file.write(good)
        manager.ctl("reload", SERVICE)
        assert status(manager).generation == 2
        assert take_back(manager, "guest") == b"content"


def test_a_takeover_from_outside_of_the_unit_is_refused() -> None:
    with running() as manager:
        preserve_memfd(manager, "guest", b"content")
        luod = manager.user("luod")
        with pytest.raises(AssertionError, match="systemctl reload luod"):
            manager.run("luod", "--runtime-dir", "/run/luod", "--takeover", user=luod)
        assert status(manager).generation == 1
        assert take_back(manager, "guest") == b"content"


def as_owner(talk: Talk, where: str) -> None:
    import os

    import luod_client

    name = talk.hear()
    with luod_client.serialize(name, runtime_dir=where) as session:
        fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        session.preserve({"ram": fd})
        session.finalize()
        os.close(fd)
    with luod_client.deserialize(runtime_dir=where) as looker:
        with looker.claim(name) as claim:
            claim.retrieve()["ram"].close()
        talk.tell(
            [(each.session, each.owner, [(held.pid == os.getpid(), held.alive) for held in each.retrieved_by]) for each in looker.list()]
        )
    talk.hear()


def test_two_users_are_told_apart_and_their_processes_are_seen() -> None:
    """In the sandbox: /proc of other users, and uids as they are."""
    with running() as manager:
        alice, bob = manager.user("alice"), manager.user("bob")
        with (
            spawn_client(as_owner, "/run/luod", user=alice, within=manager.inside) as first,
            spawn_client(as_owner, "/run/luod", user=bob, within=manager.inside) as second,
        ):
            for client, uid in ((first, alice.uid), (second, bob.uid)):
                client.tell("mine")
                assert client.hear() == [("mine", uid, [(True, True)])]
            with luod_client.deserialize(runtime_dir=manager.runtime_dir) as looker:
                assert sorted(each.owner for each in looker.list()) == sorted([alice.uid, bob.uid])
                with pytest.raises(Refusal) as refused:
                    looker.claim("mine", owner=bob.uid)
                assert refused.value.code is Code.STILL_HELD
        manager.kill(SERVICE)
        with luod_client.deserialize(runtime_dir=manager.runtime_dir) as looker:
            for each in looker.list():
                assert not any(held.alive for held in each.retrieved_by)
                looker.discard("mine", owner=each.owner)


def test_an_old_luod_that_dies_before_systemd_has_confirmed_its_successor() -> None:
    """systemd reads what the dead one had sent before it sees the death, and keeps the successor."""
    with running() as manager:
        preserve_memfd(manager, "guest", b"content")
        old = manager.main_pid(SERVICE)
        os.kill(manager.pid, signal.SIGSTOP)  # PID 1: it confirms nothing
        try:
            with luod_client.control(runtime_dir=manager.runtime_dir) as control:
                upgraded = control.upgrade()
            assert (upgraded.generation, status(manager).generation) == (2, 2)
            with luod_client.serialize("late", runtime_dir=manager.runtime_dir) as session, memfd() as fd:
                session.preserve({"ram": fd.fileno()})
            os.kill(old, signal.SIGKILL)
        finally:
            os.kill(manager.pid, signal.SIGCONT)
        manager.until_shows(SERVICE, MainPID=str(upgraded.pid), SubState="running", NRestarts="0")
        assert len(manager.pids(SERVICE)) == 1
        assert find(manager.runtime_dir, "late") is None
        preserve_memfd(manager, "later", b"stored by the successor")
        assert stored(manager) == status(manager).stored_fds == 3
        manager.kill(SERVICE)
        assert take_back(manager, "guest") == b"content"
        assert take_back(manager, "later") == b"stored by the successor"
        manager.ctl("reload", SERVICE)


def test_systemd_that_does_not_answer_holds_nothing_up_but_what_needs_it() -> None:
    with running() as manager:
        preserve_memfd(manager, "before", b"content")
        os.kill(manager.pid, signal.SIGSTOP)
        try:
            with (
                luod_client.serialize("guest", runtime_dir=manager.runtime_dir) as session,
                luod_client.deserialize(runtime_dir=manager.runtime_dir) as looker,
                memfd(b"ram") as fd,
            ):
                session.preserve({"ram": fd.fileno()})
                with looker.claim("before") as claim, claim.retrieve()["ram"] as ram:
                    assert os.pread(ram.fileno(), 9, 0) == b"content"
                    claim.release()
                assert [each.session for each in looker.list()] == ["before", "guest"]
                os.kill(manager.pid, signal.SIGCONT)
                session.finalize(require={"daemon-crash"})
        finally:
            os.kill(manager.pid, signal.SIGCONT)
        assert take_back(manager, "guest") == b"ram"
        assert take_back(manager, "before") == b"content"


def test_a_stop_says_what_becomes_of_sessions() -> None:
    with running() as manager:
        read, _ = preserve_pipe(manager.runtime_dir)
        with read:
            manager.ctl("stop", *SOCKETS, SERVICE)
            manager.ctl("start", SERVICE)
            version = int(manager.run("systemctl", "--version").split()[1].split(".")[0])
            if version >= 254:  # FileDescriptorStorePreserve=yes
                assert not let_go(read, 0)
                assert find(manager.runtime_dir) is not None
            else:
                assert let_go(read)
                assert find(manager.runtime_dir) is None


def test_clients_know_that_luod_was_killed() -> None:
    with (
        running() as manager,
        luod_client.serialize("open", runtime_dir=manager.runtime_dir) as session,
        pipe() as (read, write),
    ):
        session.preserve({"pipe": write.fileno()})
        write.close()
        manager.kill(SERVICE)
        with pytest.raises((luod_client.Disconnected, ProtocolFault)):
            session.finalize()
        with OwnedFd(read.take()) as end:
            assert let_go(end)
        with pytest.raises(Refusal) as refused:
            luod_client.finalize_again(session.id, runtime_dir=manager.runtime_dir)
        assert refused.value.code is Code.NO_SUCH_SESSION


def test_a_unit_that_does_not_listen_refuses_upgrades() -> None:
    """systemd would end the unit with its main process, and the successor with it."""
    with running("[Service]\nType=exec\nNotifyAccess=none\nWatchdogSec=0\nFileDescriptorStoreMax=0\n") as manager:
        until(lambda: os.path.exists(f"{manager.runtime_dir}/control"), "luod")
        preserve_memfd(manager, "guest", b"content", require=("daemon-upgrade",))
        with (
            luod_client.control(runtime_dir=manager.runtime_dir) as control,
            pytest.raises(Refusal, match="Type=notify and NotifyAccess=main") as refused,
        ):
            control.upgrade()
        assert refused.value.code is Code.UPGRADE_FAILED
        assert status(manager).manager == ""
        assert take_back(manager, "guest") == b"content"
