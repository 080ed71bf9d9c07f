"""What every succession must do, tried with each of them: nothing that was finalized is lost, nothing that was finished comes back."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

import luod_client
from conformance.specimens import SPECIMENS
from conformance.successions import SUCCESSIONS, Host, Succession
from luod_client import Code, Disconnected, Refusal
from luod_protocol.errors import ProtocolFault
from luod_protocol.fds import close_all
from things import find, let_go, memfd, pipe, preserve_pipe, same_file, state, watched_pipe

pytestmark = pytest.mark.slow

each_succession = pytest.mark.parametrize("succession", SUCCESSIONS, ids=lambda succession: succession.name)

LOST = (Disconnected, ProtocolFault)


def give_back(host: Host, name: str) -> None:
    """Claim and finish a session."""
    with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker, looker.claim(name) as claim:
        claim.finish()


def generation(host: Host) -> int:
    with luod_client.control(runtime_dir=host.runtime_dir) as control:
        return control.status().generation


@each_succession
def test_every_kind_comes_back_as_the_object_that_it_was(succession: Succession) -> None:
    specimens = [specimen for specimen in SPECIMENS if "huge" not in specimen.name]
    with succession.host() as host, ExitStack() as stack:
        fds = {specimen.name: stack.enter_context(specimen.make()) for specimen in specimens}
        with luod_client.serialize("all kinds", runtime_dir=host.runtime_dir, metadata=b"of the session") as session:
            session.preserve(fds, metadata={specimens[0].name: b"of an entry"}, needs={specimens[1].name: [specimens[0].name]})
            finalized = session.finalize()
        assert set(finalized.survives) >= succession.survives
        before = find(host.runtime_dir, "all kinds")
        for _ in range(2):
            host.succeed()
        assert find(host.runtime_dir, "all kinds") == before
        with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker:
            shown = looker.show("all kinds")
            assert shown.metadata == b"of the session"
            assert {entry.name: entry.kind for entry in shown.entries} == {specimen.name: specimen.kind for specimen in specimens}
            assert (shown.entries[0].metadata, shown.entries[1].needs) == (b"of an entry", (specimens[0].name,))
            with looker.claim("all kinds") as claim:
                back = claim.retrieve()
                for name, fd in back.items():
                    assert same_file(fd.fileno(), fds[name]), name
                close_all(back.values())
                claim.finish()


@each_succession
def test_many_sessions_and_a_large_one(succession: Succession) -> None:
    with succession.host() as host:
        for number in range(20):
            with luod_client.serialize(f"small {number}", runtime_dir=host.runtime_dir) as session, memfd(b"%d" % number) as fd:
                session.preserve({"ram": fd.fileno()})
                session.finalize()
        with luod_client.serialize("large", runtime_dir=host.runtime_dir) as session, ExitStack() as stack:
            session.preserve({f"ram {number}": stack.enter_context(memfd(b"%d" % number)).fileno() for number in range(600)})
            session.finalize()
        host.succeed()
        with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker:
            assert len(looker.list()) == 21
            for number in range(20):
                with looker.claim(f"small {number}") as claim:
                    with claim.retrieve()["ram"] as fd:
                        assert os.pread(fd.fileno(), 9, 0) == b"%d" % number
                    claim.finish()
            with looker.claim("large") as claim:
                back = claim.retrieve()
                assert [os.pread(back[f"ram {number}"].fileno(), 9, 0) for number in range(600)] == [b"%d" % each for each in range(600)]
                close_all(back.values())
                claim.finish()
        host.succeed()
        with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker:
            assert looker.list() == ()


@each_succession
def test_what_was_finished_or_discarded_stays_so_and_can_be_asked_again(succession: Succession) -> None:
    with succession.host() as host:
        (finished_pipe, finished), (discarded_pipe, discarded) = (preserve_pipe(host.runtime_dir, name) for name in ("done", "dropped"))
        with finished_pipe, discarded_pipe:
            give_back(host, "done")
            assert let_go(finished_pipe)
            with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker:
                looker.discard("dropped")
            assert let_go(discarded_pipe)
            for _ in range(2):
                host.succeed()
                with luod_client.deserialize(runtime_dir=host.runtime_dir) as looker:
                    assert looker.list() == ()
                    looker.finish(finished)
                    with pytest.raises(Refusal) as refused:
                        looker.finish(discarded)
                    assert refused.value.code is Code.SESSION_FINISHED


@each_succession
def test_an_open_session_goes_on_or_is_rolled_back_and_its_client_knows(succession: Succession) -> None:
    with (
        succession.host() as host,
        luod_client.serialize("open", runtime_dir=host.runtime_dir) as session,
        watched_pipe(session) as read,
        memfd() as fd,
    ):
        host.succeed()
        if succession.live:
            session.preserve({"ram": fd.fileno()})
            session.finalize()
            assert state(host.runtime_dir, "open") == "preserved"
            host.succeed()
            assert not let_go(read, 0)
            give_back(host, "open")
        else:
            with pytest.raises(LOST):
                session.preserve({"ram": fd.fileno()})
            assert state(host.runtime_dir, "open") == "gone"
        assert let_go(read)


@each_succession
def test_a_claim_goes_on_or_is_released_and_its_client_knows(succession: Succession) -> None:
    with succession.host() as host:
        read, _ = preserve_pipe(host.runtime_dir)
        with read, luod_client.deserialize(runtime_dir=host.runtime_dir) as looker, looker.claim("guest") as claim:
            host.succeed()
            if succession.live:
                claim.retrieve()["pipe"].close()
                claim.finish()
            else:
                with pytest.raises(LOST):
                    claim.retrieve()
                assert state(host.runtime_dir) == "preserved"
                assert not let_go(read, 0)
                give_back(host, "guest")
            assert let_go(read)


@each_succession
def test_who_has_retrieved_is_remembered(succession: Succession) -> None:
    with succession.host() as host:
        read, _ = preserve_pipe(host.runtime_dir)
        with read, luod_client.deserialize(runtime_dir=host.runtime_dir) as looker, looker.claim("guest") as claim:
            claim.retrieve()["pipe"].close()
            before = find(host.runtime_dir)
            assert before is not None
            assert before.retrieved_by
            claim.release()
            host.succeed()
            after = find(host.runtime_dir)
            assert after is not None
            assert after.retrieved_by == before.retrieved_by
        give_back(host, "guest")


@each_succession
def test_generations_are_counted_and_names_are_taken(succession: Succession) -> None:
    with succession.host() as host:
        read, session_id = preserve_pipe(host.runtime_dir)
        for following in (2, 3, 4):
            host.succeed()
            assert generation(host) == following
            with pytest.raises(Refusal) as refused:
                luod_client.serialize("guest", runtime_dir=host.runtime_dir)
            assert refused.value.code is Code.SESSION_EXISTS
        assert luod_client.finalize_again(session_id, runtime_dir=host.runtime_dir).session_id == session_id
        with read, pipe():
            give_back(host, "guest")
            assert let_go(read)
