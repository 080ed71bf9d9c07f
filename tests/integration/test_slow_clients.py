"""Clients that take no part: they say nothing, read nothing, or stop half-way. Each has a bounded wait, and the others don't notice."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager

import luod_client
from harness import LIMIT_S, Daemon, Talk, folder_for, readable, spawn_client, start, until
from luod_protocol import messages as m
from luod_protocol.errors import FaultCode
from luod_protocol.messages import Endpoint
from processes import PYTHON
from raw import SESSION_ID, STATUS, Raw
from things import let_go, pipe, preserve_pipe, state


def others_are_served(runtime_dir: str) -> None:
    """A whole session of another client."""
    read, _ = preserve_pipe(runtime_dir, "other")
    with read, luod_client.deserialize(runtime_dir=runtime_dir) as looker, looker.claim("other") as claim:
        with claim.retrieve()["pipe"]:
            claim.finish()
            assert not let_go(read, 0)
        assert let_go(read, 0)


@contextmanager
def impatient() -> Generator[str]:
    """A luod that waits for half a second where others wait for long. Yields its runtime directory."""
    program = "import luod.connection as c, luod.__main__ as main; c.HELLO_S = c.UNREAD_S = 0.5; raise SystemExit(main.main())"
    with folder_for() as folder, start([*PYTHON, "-c", program, "--runtime-dir", folder], None, stderr=subprocess.PIPE) as luod:
        try:
            assert luod.stderr is not None
            assert readable(luod.stderr.fileno())
            assert b"serves" in luod.stderr.readline()
            yield folder
            luod.terminate()
            said = luod.stderr.read().decode()
            assert "Traceback" not in said, said
            assert luod.wait(LIMIT_S) == 0
        finally:
            luod.kill()


def test_a_client_that_never_reads_its_answers(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir) as raw, pipe() as (read, write):
        raw.open()
        raw.preserve(pipe=write.fileno())
        write.close()
        sent = raw.fill(STATUS)
        assert sent > 100
        others_are_served(daemon.runtime_dir)
        assert not let_go(read, 0)
        assert {raw.hear().type for _ in range(sent)} == {"daemon-status"}
        assert isinstance(raw.ask({"type": "cancel", "seq": 1}), m.Cancelled)
        assert let_go(read, 0)


def test_a_client_that_never_reads_the_fds_it_asked_for(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir) as raw, pipe() as (read, write):
        raw.open()
        raw.preserve(pipe=write.fileno())
        write.close()
        raw.ask({"type": "finalize", "seq": 3, "session_id": SESSION_ID})
        with Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as claimer:
            claimer.ask({"type": "claim", "seq": 1, "session": "guest"})
            claimer.fill({"type": "retrieve", "seq": 2, "names": ["pipe"] * 100})
            others_are_served(daemon.runtime_dir)
        until(lambda: state(daemon.runtime_dir) == "preserved", "the claim to be released")
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            looker.discard("guest")
        assert let_go(read, 0)


def test_a_monitor_that_never_reads(daemon: Daemon) -> None:
    with Raw(daemon.runtime_dir, Endpoint.CONTROL) as monitor, Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as claimer:
        monitor.ask({"type": "monitor", "seq": 1})
        read, session_id = preserve_pipe(daemon.runtime_dir)
        rounds = 400
        for _ in range(rounds):
            assert isinstance(claimer.ask({"type": "claim", "seq": 1, "session": "guest"}), m.Claimed)
            assert isinstance(claimer.ask({"type": "release", "seq": 1}), m.Released)
        seen = [each for each in monitor.present() if isinstance(each, m.Event)]
        assert all(event.lost == 0 for event in seen)
        assert isinstance(claimer.ask({"type": "discard", "seq": 1, "session_id": session_id}), m.Discarded)
        last = monitor.hear()
        assert isinstance(last, m.Event)
        assert last.event == "discarded"
        assert len(seen) + last.lost == 2 + 2 * rounds
        assert last.lost > 0
        with read:
            assert let_go(read, 0)


def test_a_client_that_says_nothing() -> None:
    with impatient() as where, Raw(where, greet=False) as raw, Raw(where) as idle:
        others_are_served(where)
        assert "no hello within 0.5 s" in raw.faulted(FaultCode.TOO_SLOW)
        assert isinstance(idle.ask(STATUS), m.DaemonStatus)  # hello was all that it had to say


def test_an_answer_that_stays_unread() -> None:
    with impatient() as where, Raw(where) as raw, pipe() as (read, write):
        raw.open()
        raw.preserve(pipe=write.fileno())
        write.close()
        raw.fill(STATUS)
        others_are_served(where)
        assert let_go(read)
        assert {each.type for each in raw.rest()} == {"daemon-status"}
        assert state(where) == "gone"


def _flood(talk: Talk, where: str, write: int) -> None:
    import os

    import luod_client

    with luod_client.serialize("guest", runtime_dir=where) as session:
        session.preserve({"pipe": write})
        os.close(write)
        talk.tell("preserved")
        more, _ = os.pipe()
        while True:
            session.preserve({"more": more})
            session.unpreserve("more")


def test_a_client_that_stops_half_way(daemon: Daemon) -> None:
    with (
        pipe() as (read, write),
        spawn_client(_flood, daemon.runtime_dir, write.fileno(), pass_fds=[write.fileno()]) as client,
    ):
        write.close()
        client.hear()
        client.signal(signal.SIGSTOP)
        others_are_served(daemon.runtime_dir)
        assert state(daemon.runtime_dir) == "open"
        assert not let_go(read, 0)
        client.kill()
        assert let_go(read)
        others_are_served(daemon.runtime_dir)
