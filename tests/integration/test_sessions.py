"""The life of a session, from open to its end, on a real daemon: what is kept, what is undone, and what can be asked again."""

from __future__ import annotations

import os
import signal

import pytest

import luod_client
from harness import Daemon, Talk, spawn_client, until
from luod_client import Code, Refusal
from luod_protocol.fds import OwnedFd, close_all
from things import eventfd, let_go, memfd, pipe, preserve_pipe, same_file, state, unix_pair, watched_pipe


def test_a_whole_life(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    with memfd(b"the guest's memory") as ram, eventfd(7) as irq, pipe() as (read, write):
        with luod_client.serialize("guest", metadata=b"how to start", runtime_dir=where) as session:
            kept = session.preserve({"ram": ram.fileno()}, metadata={"ram": b"at 0"})
            kept |= session.preserve({"irq": irq.fileno(), "console": write.fileno()}, needs={"irq": ["ram"]})
            assert {name: entry.kind for name, entry in kept.items()} == {"ram": "memfd", "irq": "eventfd", "console": "pipe"}
            session.preserve({"extra": read.fileno()})
            session.unpreserve("extra")
            assert state(where) == "open"
            finalized = session.finalize(require={"daemon-upgrade"}, seal={"ram": {"shrink", "grow"}})
            assert finalized.session_id == session.id
            assert finalized.survives == ("daemon-upgrade",)
        assert state(where) == "preserved"

        with luod_client.deserialize(runtime_dir=where) as looker:
            shown = looker.show("guest")
            by_id = looker.show(session_id=session.id)
            assert (by_id.info, by_id.metadata, by_id.entries) == (shown.info, shown.metadata, shown.entries)
            assert [entry.name for entry in shown.entries] == ["ram", "irq", "console"]
            assert shown.entries[0].metadata == b"at 0"
            assert shown.entries[0].facts["seals"] == "shrink,grow"
            assert shown.entries[1].needs == ("ram",)
            with looker.claim("guest") as claim:
                assert state(where) == "claimed"
                assert claim.metadata == b"how to start"
                assert list(claim.entries.values()) == list(shown.entries)
                wanted: list[tuple[str, ...]] = [("console",), ("ram",), ("irq", "ram"), ("ram",), ()]
                for names in wanted:
                    got = claim.retrieve(*names)
                    try:
                        assert set(got) == set(names or ("ram", "irq", "console"))
                        originals = {"ram": ram, "irq": irq, "console": write}
                        assert all(same_file(got[name].fileno(), originals[name].fileno()) for name in got if name != "irq")
                        assert all(not os.get_inheritable(fd.fileno()) for fd in got.values())
                    finally:
                        close_all(got.values())
                claim.release()
            assert state(where) == "preserved"
            with looker.claim(session_id=session.id) as claim:
                with claim.retrieve("irq")["irq"] as again:
                    assert os.eventfd_read(again.fileno()) == 7
                with claim.retrieve("ram")["ram"] as again:
                    assert os.pread(again.fileno(), 100, 0) == b"the guest's memory"
                    with pytest.raises(PermissionError):
                        os.ftruncate(again.fileno(), 0)
                claim.finish()
            assert looker.list() == ()


def test_a_session_that_fills_several_packets(daemon: Daemon) -> None:
    number = 600
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        fds = {f"ram-{index}": memfd(str(index).encode()) for index in range(number)}
        try:
            kept = session.preserve({name: fd.fileno() for name, fd in fds.items()})
        finally:
            close_all(fds.values())
        assert list(kept) == list(fds)
        session.finalize()
    assert daemon.status().preserved_fds == number
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("guest") as claim:
        for names in ((), tuple(fds)[::-7], ("ram-599", "ram-0", "ram-253")):
            got = claim.retrieve(*names)
            try:
                assert {name: os.pread(fd.fileno(), 10, 0).decode() for name, fd in got.items()} == {
                    name: name.removeprefix("ram-") for name in names or fds
                }
            finally:
                close_all(got.values())
        claim.finish()


def test_an_empty_session(daemon: Daemon) -> None:
    with luod_client.serialize("guest", metadata=b"only this", runtime_dir=daemon.runtime_dir) as session:
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("guest") as claim:
        assert (claim.metadata, claim.entries, claim.retrieve()) == (b"only this", {}, {})
        claim.finish()


def test_a_monitor_sees_the_whole_life(daemon: Daemon) -> None:
    with luod_client.control(runtime_dir=daemon.runtime_dir) as control:
        events = control.monitor()
        read, session_id = preserve_pipe(daemon.runtime_dir)
        with read, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            with looker.claim("guest") as claim:
                close_all(claim.retrieve().values())
            with looker.claim("guest") as claim:
                claim.finish()
        expected = ["opened", "finalized", "claimed", "retrieved", "released", "claimed", "finished"]
        seen = [next(events) for _ in expected]
        assert [event.event for event in seen] == expected
        assert {(event.session, event.session_id, event.owner, event.lost) for event in seen} == {("guest", session_id, os.geteuid(), 0)}


# ------------------------------------------------------------------------------------------------------------- rollback


def test_cancel_and_unpreserve_release_before_they_are_answered(daemon: Daemon) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        with watched_pipe(session, "first") as first, watched_pipe(session, "second") as second:
            assert not let_go(first, 0)
            session.unpreserve("first")
            assert let_go(first, 0)
            assert not let_go(second, 0)
            session.cancel()
            assert let_go(second, 0)
        with pytest.raises(Refusal) as refused:
            session.finalize()
    assert refused.value.code is Code.OUT_OF_ORDER
    assert state(daemon.runtime_dir) == "gone"


def test_close_rolls_back(daemon: Daemon) -> None:
    here, there = unix_pair()
    with here, there, luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"socket": there.fileno()})
        there.close()
        with watched_pipe(session) as read:
            assert not let_go(read, 0)
            assert not let_go(here, 0)
            session.close()
            assert let_go(read)
            assert let_go(here)
    until(lambda: state(daemon.runtime_dir) == "gone", "the session to be rolled back")
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.cancel()


def _hold_open(talk: Talk, where: str, write: int) -> None:
    import os

    import luod_client

    with luod_client.serialize("guest", runtime_dir=where) as session:
        session.preserve({"pipe": write})
        os.close(write)
        talk.tell("preserved")
        talk.hear()


def test_sigkill_rolls_back(daemon: Daemon) -> None:
    with pipe() as (read, write), spawn_client(_hold_open, daemon.runtime_dir, write.fileno(), pass_fds=[write.fileno()]) as client:
        write.close()
        assert client.hear() == "preserved"
        assert not let_go(read, 0)
        client.kill()
        assert let_go(read)
    until(lambda: state(daemon.runtime_dir) == "gone", "the session to be rolled back")


def test_a_session_lasts_beyond_a_stopped_client(daemon: Daemon) -> None:
    with pipe() as (read, write), spawn_client(_hold_open, daemon.runtime_dir, write.fileno(), pass_fds=[write.fileno()]) as client:
        write.close()
        client.hear()
        client.signal(signal.SIGSTOP)
        other, _ = preserve_pipe(daemon.runtime_dir, "other")
        with other, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            looker.discard("other")
            assert let_go(other, 0)
        assert state(daemon.runtime_dir) == "open"
        assert not let_go(read, 0)
        client.kill()
        assert let_go(read)


def test_both_ends_of_one_thing(daemon: Daemon) -> None:
    with pipe() as (read, write), luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        os.write(write.fileno(), b"on the way")
        session.preserve({"read": read.fileno(), "write": write.fileno(), "again": read.fileno()})
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("guest") as claim:
        got: dict[str, OwnedFd] = claim.retrieve()
        try:
            assert os.read(got["again"].fileno(), 100) == b"on the way"
        finally:
            close_all(got.values())
        claim.finish()
