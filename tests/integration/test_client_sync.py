"""The blocking client with a real luod."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest

import luod_client
from harness import Daemon
from luod_client import Code, Disconnected, NoDaemon, OwnedFd, Refusal
from luod_protocol.fds import close_all
from processes import ALICE, readable, spawn_client


@pytest.fixture
def memfd() -> Generator[int]:
    """A memfd with content."""
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.write(fd.fileno(), b"guest memory")
        yield fd.fileno()


@pytest.fixture
def pipe() -> Generator[tuple[OwnedFd, OwnedFd]]:
    """The two ends of a pipe: the read end says when nobody has the write end any more."""
    read_end, write_end = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    with read_end, write_end:
        yield read_end, write_end


def is_let_go(read_end: OwnedFd) -> bool:
    """Whether nobody has the write end of this pipe."""
    return readable(read_end.fileno(), 0)


def identity(fd: int) -> tuple[int, int]:
    """Which inode it is."""
    about = os.fstat(fd)
    return about.st_dev, about.st_ino


def test_fds_come_back_by_name_with_what_was_said_of_them(daemon: Daemon, memfd: int, pipe: tuple[OwnedFd, OwnedFd]) -> None:
    here, there = socket.socketpair()
    with here, there:
        fds = {"ram": memfd, "pipe": pipe[0].fileno(), "chat": there.fileno()}
        with luod_client.serialize("guest-7", metadata=b"for the next", runtime_dir=daemon.runtime_dir) as session:
            kept = session.preserve(fds, metadata={"ram": b"page size 4096"}, needs={"chat": ["ram", "pipe"]})
            assert {name: entry.kind for name, entry in kept.items()} == {"ram": "memfd", "pipe": "pipe", "chat": "socket"}
            assert "daemon-upgrade" in session.finalize().survives
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
            assert [info.session for info in connection.list()] == ["guest-7"]
            assert connection.show("guest-7").info.session_id == session.id
            assert connection.show(session_id=session.id).info.session == "guest-7"
            with connection.claim("guest-7") as claim:
                assert claim.metadata == b"for the next"
                assert claim.entries["ram"].metadata == b"page size 4096"
                assert set(claim.entries["chat"].needs) == {"ram", "pipe"}
                came = claim.retrieve()
                again = claim.retrieve("chat", "ram", "chat")
                assert list(came) == ["ram", "pipe", "chat"]
                assert list(again) == ["chat", "ram"]
                for name, fd in [*came.items(), *again.items()]:
                    assert identity(fd.fileno()) == identity(fds[name])
                    assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
                assert os.pread(came["ram"].fileno(), 100, 0) == b"guest memory"
                close_all([*came.values(), *again.values()])
                claim.finish()
            assert connection.list() == ()
            assert connection.finish(session.id).session_id == session.id


def test_leaving_without_finalize_rolls_back(daemon: Daemon, pipe: tuple[OwnedFd, OwnedFd]) -> None:
    read_end, write_end = pipe
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"pipe": write_end.fileno()})
        write_end.close()
        assert not is_let_go(read_end)
    assert readable(read_end.fileno()), "luod keeps the fd of a session that was rolled back"
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection, pytest.raises(Refusal) as caught:
        connection.show(session_id=session.id)
    assert caught.value.code is Code.NO_SUCH_SESSION


@pytest.mark.parametrize("how", ["unpreserve", "cancel"])
def test_luod_has_let_go_when_unpreserve_or_cancel_returns(daemon: Daemon, pipe: tuple[OwnedFd, OwnedFd], how: str) -> None:
    read_end, write_end = pipe
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"pipe": write_end.fileno()})
        write_end.close()
        if how == "cancel":
            session.cancel()
        else:
            session.unpreserve("pipe")
        assert is_let_go(read_end)


def test_luod_has_let_go_when_finish_returns_and_not_before(daemon: Daemon, pipe: tuple[OwnedFd, OwnedFd]) -> None:
    read_end, write_end = pipe
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"pipe": write_end.fileno()})
        write_end.close()
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        with connection.claim("guest"):
            pass  # released
        with connection.claim(session_id=session.id) as claim:
            assert not is_let_go(read_end)
            claim.finish()
            assert is_let_go(read_end)


def test_luod_has_let_go_when_discard_returns(daemon: Daemon, pipe: tuple[OwnedFd, OwnedFd]) -> None:
    read_end, write_end = pipe
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"pipe": write_end.fileno()})
        write_end.close()
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        connection.discard("guest")
        assert is_let_go(read_end)


def test_a_refused_finalize_leaves_the_session_open(daemon: Daemon, memfd: int) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"ram": memfd}, needs={"ram": ["disk"]})
        with pytest.raises(Refusal) as caught:
            session.finalize()
        assert (caught.value.code, caught.value.entry) == (Code.BAD_NEEDS, "ram")
        session.preserve({"disk": memfd})
        with pytest.raises(Refusal) as caught:
            session.finalize(require={"kexec"})
        assert caught.value.code is Code.CANNOT_SURVIVE
        session.finalize(require={"daemon-upgrade"})
        assert luod_client.finalize_again(session.id, runtime_dir=daemon.runtime_dir).session_id == session.id
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        connection.discard("guest")


def test_seals_are_added_at_finalize(daemon: Daemon, memfd: int) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"ram": memfd})
        assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == 0
        session.finalize(seal={"ram": {"write", "shrink"}})
        assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        connection.discard("guest")


def test_hundreds_of_entries_with_metadata(daemon: Daemon, memfd: int) -> None:
    names = [f"region-{number}" for number in range(500)]
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        kept = session.preserve(dict.fromkeys(names, memfd), metadata={name: name.encode() * 20 for name in names})
        assert list(kept) == names
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection, connection.claim("guest") as claim:
        assert {entry.metadata for entry in claim.entries.values()} == {name.encode() * 20 for name in names}
        fds = claim.retrieve(*reversed(names))
        assert list(fds) == names[::-1]
        assert {identity(fd.fileno()) for fd in fds.values()} == {identity(memfd)}
        close_all(fds.values())
        claim.finish()


def test_a_refused_entry_takes_the_other_batches_back(daemon: Daemon, memfd: int) -> None:
    names = [f"region-{number}" for number in range(500)]
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"region-300": memfd})
        with pytest.raises(Refusal) as caught:
            session.preserve(dict.fromkeys(names, memfd))
        assert (caught.value.code, caught.value.entry) == (Code.ENTRY_EXISTS, "region-300")
        session.unpreserve("region-300")
        session.preserve(dict.fromkeys(names, memfd))
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        assert connection.show("guest").info.entries == 500
        connection.discard("guest")


def test_what_was_not_there_is_refused_and_the_claim_goes_on(daemon: Daemon, memfd: int) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"ram": memfd})
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        with pytest.raises(Refusal) as caught:
            connection.claim("host")
        assert caught.value.code is Code.NO_SUCH_SESSION
        with connection.claim("guest") as claim:
            with pytest.raises(Refusal) as caught:
                claim.retrieve("ram", "rom")
            assert (caught.value.code, caught.value.entry) == (Code.NO_SUCH_ENTRY, "rom")
            claim.retrieve("ram")["ram"].close()
            claim.finish()


def test_somebody_else_has_it(daemon: Daemon, memfd: int) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"ram": memfd})
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as one, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as other:
        with one.claim("guest"):
            assert one.show("guest").info.claimed_by == os.getpid()
            with pytest.raises(Refusal) as caught:
                other.claim("guest")
            assert caught.value.code is Code.SESSION_CLAIMED
        with other.claim("guest") as claim:
            claim.finish()


def test_an_open_session_and_a_claim_go_on_over_an_upgrade(daemon: Daemon, memfd: int) -> None:
    with luod_client.serialize("first", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"ram": memfd})
        session.finalize()
    with (
        luod_client.serialize("second", runtime_dir=daemon.runtime_dir) as session,
        luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection,
        connection.claim("first") as claim,
    ):
        session.preserve({"one": memfd})
        upgraded = daemon.upgrade()
        assert upgraded.generation == 2
        assert upgraded.pid == session.status().pid
        session.preserve({"two": memfd})
        session.finalize()
        with claim.retrieve("ram")["ram"] as fd:
            assert os.pread(fd.fileno(), 100, 0) == b"guest memory"
        claim.finish()
        with connection.claim("second") as claim:
            assert set(claim.entries) == {"one", "two"}
            claim.finish()


def test_what_happens_is_monitored(daemon: Daemon, memfd: int) -> None:
    with luod_client.control(runtime_dir=daemon.runtime_dir) as watcher:
        events = watcher.monitor()
        with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
            session.preserve({"ram": memfd})
            session.finalize()
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection, connection.claim("guest") as claim:
            claim.retrieve()["ram"].close()
            claim.finish()
        seen = [next(events) for _ in range(5)]
    assert [event.event for event in seen] == ["opened", "finalized", "claimed", "retrieved", "finished"]
    assert {(event.session, event.session_id) for event in seen} == {("guest", session.id)}


def test_a_killed_luod_leaves_the_outcome_unknown(daemon: Daemon, memfd: int) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"ram": memfd})
        events = luod_client.control(runtime_dir=daemon.runtime_dir)
        with events:
            happening = events.monitor()
            daemon.kill(signal.SIGKILL)
            daemon.wait_gone()
            assert list(happening) == []
        with pytest.raises(Disconnected, match=f"unknown: `show` by its id {session.id.hex()}"):
            session.finalize()
        with pytest.raises(Disconnected):
            session.status()
    with pytest.raises(NoDaemon):
        luod_client.deserialize(runtime_dir=daemon.runtime_dir)


def test_every_endpoint_says_how_luod_is(daemon: Daemon) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        assert session.status().sessions_open == 1
        assert "memfd" in session.capabilities().kinds
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        assert connection.status().pid == daemon.pid
        assert connection.capabilities().survives["daemon-upgrade"] == ""
    with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
        assert (control.status().generation, control.list()) == (1, ())


def _runs_out_of_flight(talk: Any, runtime_dir: str) -> None:
    import os
    import resource
    import socket

    import luod_client
    from luod_protocol import wire

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, luod_client.serialize("guest", runtime_dir=runtime_dir) as session:
        memfd = os.memfd_create("ram")
        wire.send(here, b"in flight", [memfd] * 100)
        try:
            session.preserve({"ram": memfd})
        except luod_client.Refusal as refusal:
            talk.tell((refusal.code.value, refusal.message))
        else:
            talk.tell("it was passed")
        # The receiver hasn't room for them either: what is in flight ends with the socket.
        here.close()
        there.close()
        talk.tell(list(session.preserve({"ram": memfd})))
        os.close(memfd)


def test_too_many_fds_in_flight_can_be_tried_again() -> None:
    user = ALICE if os.geteuid() == 0 else None
    with Daemon(user=user) as daemon, spawn_client(_runs_out_of_flight, daemon.runtime_dir, user=user) as client:
        code, message = client.hear()
        assert code == Code.LIMIT_REACHED
        assert "ETOOMANYREFS" in message
        assert "can be tried again" in message
        assert client.hear() == ["ram"]


def test_nothing_of_it_imports_trio(daemon: Daemon) -> None:
    code = (
        "import sys, luod_client, luod_client.cli\n"
        "status = luod_client.cli.main(sys.argv[1:])\n"
        "sys.exit(status or [name for name in sys.modules if name.partition('.')[0] in ('trio', 'luod', 'tqdm')] or 0)"
    )
    for command in (["status"], ["list"], ["--json", "capabilities"]):
        done = subprocess.run([sys.executable, "-P", "-c", code, "--runtime-dir", daemon.runtime_dir, *command], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
