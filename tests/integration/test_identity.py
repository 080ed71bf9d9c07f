"""Names and ids: what can be asked again when an answer was lost, and what a session can be called."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

import luod_client
from harness import Daemon
from luod_client import Code, Refusal
from things import memfd, preserve_pipe


def _refusal(attempt: Callable[[], object]) -> Code:
    with pytest.raises(Refusal) as refused:
        attempt()
    return refused.value.code


def test_finalize_again(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    with luod_client.serialize("guest", runtime_dir=where) as session:
        assert _refusal(lambda: luod_client.finalize_again(session.id, runtime_dir=where)) is Code.OUT_OF_ORDER
        first = session.finalize()
    again = luod_client.finalize_again(session.id, runtime_dir=where)
    assert (again.session_id, again.survives) == (session.id, first.survives)
    with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("guest") as claim:
        assert luod_client.finalize_again(session.id, runtime_dir=where).session_id == session.id
        claim.finish()
    assert _refusal(lambda: luod_client.finalize_again(session.id, runtime_dir=where)) is Code.SESSION_FINISHED
    assert _refusal(lambda: luod_client.finalize_again(secrets.token_bytes(16), runtime_dir=where)) is Code.NO_SUCH_SESSION
    assert _refusal(lambda: luod_client.finalize_again(b"short", runtime_dir=where)) is Code.BAD_REQUEST


def test_finish_again(daemon: Daemon) -> None:
    read, session_id = preserve_pipe(daemon.runtime_dir)
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, read:
        assert _refusal(lambda: looker.finish(session_id)) is Code.OUT_OF_ORDER
        looker.claim("guest").finish()
        assert looker.finish(session_id).session_id == session_id
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        assert looker.finish(session_id).session_id == session_id
        assert _refusal(lambda: looker.finish(secrets.token_bytes(16))) is Code.NO_SUCH_SESSION
        assert _refusal(lambda: looker.finish(b"")) is Code.BAD_REQUEST


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "discarded"])
def test_an_ended_session_is_told_from_one_that_never_was(daemon: Daemon, finished: bool) -> None:
    read, session_id = preserve_pipe(daemon.runtime_dir)
    with read, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        if finished:
            looker.claim("guest").finish()
        else:
            looker.discard("guest")
            assert _refusal(lambda: looker.finish(session_id)) is Code.SESSION_FINISHED
        for attempt in (looker.show, looker.claim, looker.discard):
            with pytest.raises(Refusal, match="finished" if finished else "discarded") as refused:
                attempt(session_id=session_id)
            assert refused.value.code is Code.SESSION_FINISHED
            assert _refusal(lambda: attempt("guest")) is Code.NO_SUCH_SESSION  # noqa: B023  # called at once
    with pytest.raises(Refusal) as refused:
        luod_client.serialize("guest", session_id=session_id, runtime_dir=daemon.runtime_dir)
    assert refused.value.code is Code.SESSION_FINISHED
    read, _ = preserve_pipe(daemon.runtime_dir)  # the name is free again
    with read, luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        looker.discard("guest")


# ---------------------------------------------------------------------------------------------------------------- names


def test_a_session_name_is_unique_while_it_lasts(daemon: Daemon) -> None:
    where = daemon.runtime_dir
    with luod_client.serialize("guest", runtime_dir=where) as session:
        assert _refusal(lambda: luod_client.serialize("guest", runtime_dir=where)) is Code.SESSION_EXISTS
        assert _refusal(lambda: luod_client.serialize("other", session_id=session.id, runtime_dir=where)) is Code.SESSION_EXISTS
        session.finalize()
    with luod_client.deserialize(runtime_dir=where) as looker, looker.claim("guest") as claim:
        assert _refusal(lambda: luod_client.serialize("guest", runtime_dir=where)) is Code.SESSION_EXISTS
        claim.finish()
        with luod_client.serialize("guest", runtime_dir=where) as session:
            session.cancel()


def test_session_names_that_cannot_be(daemon: Daemon) -> None:
    for name in ("luod", "luod-7", "", "a:b", "a\nb", "a\x00", "a\x7f", "g\u00e4st", "n" * 256, "n" * 10_000):
        with pytest.raises(Refusal, match="session name") as refused:
            luod_client.serialize(name, runtime_dir=daemon.runtime_dir)
        assert refused.value.code is Code.BAD_NAME, name
        assert len(refused.value.message) < 300


def test_the_longest_and_oddest_names(daemon: Daemon) -> None:
    name = "".join(chr(each) for each in range(0x20, 0x7F) if each != ord(":")).ljust(255, "x")
    with luod_client.serialize(name, runtime_dir=daemon.runtime_dir) as session, memfd() as ram:
        session.preserve({name: ram.fileno(), "luod": ram.fileno()})
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker, looker.claim(name) as claim:
        assert list(claim.entries) == [name, "luod"]
        claim.finish()


def test_a_session_id_has_16_bytes(daemon: Daemon) -> None:
    for length in (0, 15, 17, 30_000):
        with pytest.raises(Refusal, match=f"has {length}") as refused:
            luod_client.serialize("guest", session_id=bytes(length), runtime_dir=daemon.runtime_dir)
        assert refused.value.code is Code.BAD_REQUEST


def test_a_session_is_named_by_name_or_by_id(daemon: Daemon) -> None:
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        for attempt in (looker.show, looker.claim, looker.discard):
            assert _refusal(attempt) is Code.BAD_REQUEST
            assert _refusal(lambda: attempt("guest", session_id=bytes(16))) is Code.BAD_REQUEST  # noqa: B023  # called at once
            assert _refusal(lambda: attempt(session_id=bytes(15))) is Code.BAD_REQUEST  # noqa: B023  # called at once
            assert _refusal(lambda: attempt(session_id=bytes(16))) is Code.NO_SUCH_SESSION  # noqa: B023  # called at once
        with pytest.raises(Refusal, match="guest") as refused:
            looker.claim("guest")
        assert refused.value.code is Code.NO_SUCH_SESSION
