"""A supervised luod that can't tell its supervisor to keep a session, or can't see whether that has.

The client is told why, nothing is kept by half, and it works when it is tried again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import luod_client
from harness import Client, Talk, User, folder_for, spawn_client, until
from integration.test_supervised import serving, supervised
from luod_client import Code, Refusal
from luod_protocol.fds import OwnedFd
from things import let_go, state, watched_pipe

IN_FLIGHT = 300
"""fds that another process of luod's uid has in flight."""


def _neighbour(talk: Talk, many: int) -> None:
    """Has so many fds in flight until it is told `land`; sets others' RLIMIT_NOFILE, as root can't do everywhere."""
    import os
    import resource
    import socket

    null = os.open(os.devnull, os.O_RDONLY)
    pairs = [socket.socketpair() for _ in range(many // 100)]
    for ours, _ in pairs:
        socket.send_fds(ours, [b"x"], [null] * 100)
    os.close(null)
    talk.tell("in flight")
    while True:
        said = talk.hear()
        if said == "land":
            for pair in pairs:
                for each in pair:
                    each.close()
            talk.tell("landed")
        else:
            pid, descriptors = said
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors or hard, hard))
            talk.tell("limited")


@contextmanager
def limited(neighbour: Client, pid: int, descriptors: int) -> Generator[None]:
    """A process whose RLIMIT_NOFILE is lower meanwhile; the neighbour sees to it."""
    neighbour.tell((pid, descriptors))
    assert neighbour.hear() == "limited"
    yield
    neighbour.tell((pid, 0))
    assert neighbour.hear() == "limited"


def leaving(pid: int, free: int) -> int:
    """The RLIMIT_NOFILE at which a process has so many descriptors left."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = free
    while limit - sum(fd < limit for fd in used) < free:
        limit += 1
    return limit


def descriptors(pid: int) -> int:
    """How many a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def kept_over_a_crash(where: str, pid: int, said: Path, end: OwnedFd) -> None:
    """The session is there when luod was killed, once, and nowhere when it is finished."""
    os.kill(pid, signal.SIGKILL)
    serving(said, 2)
    with luod_client.deserialize(runtime_dir=where) as looker:
        assert [(each.session, each.state) for each in looker.list()] == [("guest", "preserved")]
        assert not let_go(end, 0)
        with looker.claim("guest") as claim:
            claim.retrieve("pipe")["pipe"].close()
            claim.finish()
    assert let_go(end)


def refused(session: luod_client.Session) -> str:
    """Why finalize is refused; the session must be open as before."""
    with pytest.raises(Refusal) as caught:
        session.finalize()
    assert caught.value.code is Code.SYSTEM_ERROR
    assert "can't be kept over a crash" in caught.value.message
    assert "it is still open, try again" in caught.value.message
    return caught.value.message


def stored(where: str) -> int:
    """How many fds luod says it has in the store."""
    with luod_client.control(runtime_dir=where) as control:
        return control.status().stored_fds


@pytest.mark.slow
def test_no_descriptor_is_left_to_see_whether_it_is_kept() -> None:
    with folder_for() as where, supervised(where) as (supervisor, said), spawn_client(_neighbour, 0) as neighbour:
        pid = serving(said, 1)
        assert neighbour.hear() == "in flight"
        with luod_client.serialize("guest", runtime_dir=where) as session, watched_pipe(session) as end:
            before = descriptors(supervisor.pid)
            # Asked on this connection: luod would still have another one for a moment.
            assert session.status().stored_fds == 1, "the ledger"
            # Two for the box, one of which it keeps; then there is one for the pipe, which needs two.
            with limited(neighbour, pid, leaving(pid, 2)):
                assert "luod can't make a pipe to ask the service manager with: Too many open files" in refused(session)
                assert not let_go(end, 0)
            until(lambda: descriptors(supervisor.pid) == before, "the supervisor keeps what was refused")
            assert (state(where), stored(where)) == ("open", 1)
            session.finalize(require={"daemon-crash"})
            until(lambda: descriptors(supervisor.pid) == before + 1, "the supervisor has the box, and no more")
            assert stored(where) == 2
            kept_over_a_crash(where, pid, said, end)


@pytest.mark.root
@pytest.mark.slow
def test_no_more_of_luods_uid_may_be_in_flight() -> None:
    # A uid of nobody else's: what is in flight is counted for the uid.
    user = User(uid=61_000 + os.getpid() % 4000, gid=60_001)
    with folder_for(user) as where, supervised(where, user=user) as (supervisor, said):
        pid = serving(said, 1)
        with (
            spawn_client(_neighbour, IN_FLIGHT, user=user) as neighbour,
            luod_client.serialize("guest", runtime_dir=where) as session,
            watched_pipe(session) as end,
        ):
            assert neighbour.hear() == "in flight"
            before = descriptors(supervisor.pid)
            # Just as many as there may be: the box still comes, and then there is one too many.
            with limited(neighbour, pid, IN_FLIGHT):
                assert "Too many references" in refused(session)
                assert not let_go(end, 0)
                assert (descriptors(supervisor.pid), state(where), stored(where)) == (before, "open", 1)
                neighbour.tell("land")
                assert neighbour.hear() == "landed"
                session.finalize(require={"daemon-crash"})
            until(lambda: descriptors(supervisor.pid) == before + 1, "the supervisor has the box, and no more")
            assert stored(where) == 2
            kept_over_a_crash(where, pid, said, end)
