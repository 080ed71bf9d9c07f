"""A luod at its RLIMIT_NOFILE: it refuses what takes a descriptor, loses none, and goes on when there are some again."""

from __future__ import annotations

import itertools
import os
import resource
import socket
from collections.abc import Generator
from contextlib import contextmanager

from harness import Daemon, until
from luod_client import Code
from luod_protocol import messages as m
from luod_protocol.errors import FaultCode
from luod_protocol.messages import Endpoint
from raw import FINALIZE, SESSION_ID, STATUS, Raw, open_session, preserve_many
from things import eventfd, let_go, pipe


@contextmanager
def _descriptors_left(daemon: Daemon, connections: int, room: int) -> Generator[None]:
    """Lower the daemon's RLIMIT_NOFILE so far that it can open `room` more descriptors, while it has these connections."""
    until(lambda: daemon.status().connections == connections + 1, "the other connections to be gone")
    status = daemon.status()
    kept = status.staged_fds + status.sessions_preserved + status.sessions_claimed
    # Less than at the start: the connection of `status` itself.
    idle = daemon.baseline - 1 + connections + kept
    until(lambda: len(os.listdir(f"/proc/{status.pid}/fd")) == idle, "what luod is closing to be closed")
    held = {int(name) for name in os.listdir(f"/proc/{status.pid}/fd")}
    free = (number for number in itertools.count() if number not in held)
    limit = next(itertools.islice(free, room, None))
    before = resource.prlimit(status.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(status.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(status.pid, resource.RLIMIT_NOFILE, before)


def test_control_data_that_is_cut_off(daemon: Daemon) -> None:
    for room in (0, 1, 100):
        with pipe() as (read, write), open_session(daemon) as (raw, other), _descriptors_left(daemon, 1, room):
            raw.say(preserve_many(253), [write.fileno()] * 253)
            write.close()
            assert f"only {room} of the fds arrived" in raw.faulted(FaultCode.TRUNCATED)
            assert let_go(read)
            assert let_go(other)


def test_without_a_descriptor_left(daemon: Daemon) -> None:
    with open_session(daemon) as (raw, read), eventfd() as irq, Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as other:
        with _descriptors_left(daemon, 2, 0), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
            waiting.connect(f"{daemon.runtime_dir}/deserialize")  # into the backlog
            assert "luod" in raw.refused(STATUS, Code.SYSTEM_ERROR)
            assert isinstance(other.ask({"type": "list", "seq": 1}), m.Listed)
            assert isinstance(other.ask({"type": "capabilities", "seq": 1}), m.DaemonCapabilities)
            daemon.wait_stderr("can't accept on deserialize: Too many open files")
        with _descriptors_left(daemon, 2, 1):
            raw.refused(FINALIZE, Code.SYSTEM_ERROR)
        assert not let_go(read, 0)
        raw.preserve(irq=irq.fileno())
        assert isinstance(raw.ask(FINALIZE), m.Finalized)
        assert isinstance(other.ask({"type": "claim", "seq": 1, "session": "guest"}), m.Claimed)
        with _descriptors_left(daemon, 1, 1):  # a session that was finalized has ended its connection
            other.refused({"type": "retrieve", "seq": 2, "names": ["irq"]}, Code.SYSTEM_ERROR)
        assert isinstance(other.ask({"type": "retrieve", "seq": 2, "names": ["irq"]}), m.Retrieved)
        assert isinstance(other.ask({"type": "finish", "seq": 2, "session_id": SESSION_ID}), m.Finished)
        assert let_go(read, 0)


def test_a_long_answer_waits_for_a_descriptor(daemon: Daemon) -> None:
    """It travels in a memfd."""
    with Raw(daemon.runtime_dir) as raw, eventfd() as irq, Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as other:
        raw.open()
        for number in range(3):
            spec = m.EntrySpec(name=f"irq-{number}", metadata=b"x" * 30_000)
            assert isinstance(raw.ask(m.Preserve(seq=3, entries=(spec,)), [irq.fileno()]), m.Preserved)
        with _descriptors_left(daemon, 2, 0):
            other.say({"type": "show", "seq": 1, "session": "guest"})
            assert isinstance(raw.ask({"type": "capabilities", "seq": 1}), m.DaemonCapabilities)
            assert isinstance(raw.ask({"type": "capabilities", "seq": 1}), m.DaemonCapabilities)
            assert not list(other.present())
        shown = other.hear()
        assert isinstance(shown, m.Shown)
        assert len(shown.entries) == 3
