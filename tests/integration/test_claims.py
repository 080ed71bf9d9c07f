"""Taking a session back: the exclusive right to it, what stays with whom, and when luod has let go."""

from __future__ import annotations

import os

import pytest

import luod_client
from harness import Daemon, Talk, spawn_client, until
from luod_client import Code, Refusal
from luod_protocol.fds import close_all
from things import find, let_go, memfd, pipe, preserve_pipe, state, unix_pair


def _claim_and_wait(talk: Talk, where: str, finish: bool) -> None:
    import luod_client
    from luod_protocol.fds import close_all

    with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("guest") as claim:
        fds = claim.retrieve()
        talk.tell("claimed")
        talk.hear()
        if finish:
            claim.finish()
    talk.tell("left")
    try:
        talk.hear()
    finally:
        close_all(fds.values())


def test_a_claim_ends_with_its_claimer(daemon: Daemon) -> None:
    read, _ = preserve_pipe(daemon.runtime_dir)
    with read, spawn_client(_claim_and_wait, daemon.runtime_dir, False) as claimer:
        assert claimer.hear() == "claimed"
        info = find(daemon.runtime_dir)
        assert info is not None
        assert (info.state, info.claimed_by) == ("claimed", claimer.pid)
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            for force in (False, True):
                with pytest.raises(Refusal, match=str(claimer.pid)) as refused:
                    looker.claim("guest", force=force)
                assert refused.value.code is Code.SESSION_CLAIMED
                with pytest.raises(Refusal) as refused:
                    looker.discard("guest", force=force)
                assert refused.value.code is Code.SESSION_CLAIMED
            claimer.kill()
            until(lambda: state(daemon.runtime_dir) == "preserved", "the claim to be released")
            assert not let_go(read, 0)
            with looker.claim("guest") as claim:
                with claim.retrieve()["pipe"] as write:
                    os.write(write.fileno(), b"lost nothing")
                claim.finish()
        assert os.read(read.fileno(), 100) == b"lost nothing"
        assert let_go(read, 0)


def test_retrieved_fds_outlive_the_connection_and_list_says_who_has_them(daemon: Daemon) -> None:
    read, _ = preserve_pipe(daemon.runtime_dir)
    with read, spawn_client(_claim_and_wait, daemon.runtime_dir, False) as holder:
        holder.hear()
        holder.tell()
        assert holder.hear() == "left"
        until(lambda: state(daemon.runtime_dir) == "preserved", "the claim to be released")
        info = find(daemon.runtime_dir)
        assert info is not None
        assert [(each.pid, each.alive) for each in info.retrieved_by] == [(holder.pid, True)]
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            for attempt in (looker.claim, looker.discard):
                with pytest.raises(Refusal, match=str(holder.pid)) as refused:
                    attempt("guest")
                assert refused.value.code is Code.STILL_HELD
            looker.claim("guest", force=True).release()
            holder.kill()
            info = find(daemon.runtime_dir)
            assert info is not None
            assert [(each.pid, each.alive) for each in info.retrieved_by] == [(holder.pid, False)]
            with looker.claim("guest") as claim:
                claim.finish()
        assert let_go(read, 0)


def test_what_was_retrieved_stays_usable_after_the_connection(daemon: Daemon) -> None:
    read, _ = preserve_pipe(daemon.runtime_dir)
    with read:
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("guest") as claim:
            write = claim.retrieve()["pipe"]
        with write:
            os.write(write.fileno(), b"still here")
            assert os.read(read.fileno(), 100) == b"still here"
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            looker.discard("guest")  # this process itself is no other holder
        assert let_go(read, 0)


def test_last_close_is_the_clients_after_finish(daemon: Daemon) -> None:
    here, there = unix_pair()
    with here, there, pipe() as (read, write), luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"pipe": write.fileno(), "socket": there.fileno()})
        write.close()
        there.close()
        session.finalize()
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("guest") as claim:
            got = claim.retrieve()
            try:
                claim.finish()
                assert not let_go(read, 0)
                assert not let_go(here, 0)
                got["pipe"].close()
                assert let_go(read, 0)
                assert not let_go(here, 0)
                got["socket"].close()
                assert let_go(here, 0)
            finally:
                close_all(got.values())


def test_finish_and_discard_release_before_they_are_answered(daemon: Daemon) -> None:
    first, _ = preserve_pipe(daemon.runtime_dir, "first")
    second, _ = preserve_pipe(daemon.runtime_dir, "second")
    with first, second, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        with looker.claim("first") as claim:
            assert not let_go(first, 0)
            claim.finish()
            assert let_go(first, 0)
        assert not let_go(second, 0)
        looker.discard("second")
        assert let_go(second, 0)


def test_an_open_session_can_be_seen_but_not_had(daemon: Daemon) -> None:
    with luod_client.serialize("guest", runtime_dir=daemon.runtime_dir) as session, memfd() as ram:
        session.preserve({"ram": ram.fileno()})
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
            shown = looker.show("guest")
            assert (shown.info.state, shown.info.entries, shown.info.survives) == ("open", 1, ())
            for attempt in (looker.claim, looker.discard):
                with pytest.raises(Refusal, match="still open") as refused:
                    attempt("guest", force=True)
                assert refused.value.code is Code.OUT_OF_ORDER
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        looker.discard("guest")


def test_retrieve_of_what_is_not_there_takes_nothing(daemon: Daemon) -> None:
    read, _ = preserve_pipe(daemon.runtime_dir)
    with read, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim("guest") as claim:
        with pytest.raises(Refusal, match="nonesuch") as refused:
            claim.retrieve("pipe", "nonesuch")
        assert (refused.value.code, refused.value.entry) == (Code.NO_SUCH_ENTRY, "nonesuch")
        info = find(daemon.runtime_dir)
        assert info is not None
        assert info.retrieved_by == ()
        claim.finish()
        assert let_go(read, 0)
