"""Who may do what: a session is its owner's and root's, control is luod's own user's and root's, and luod runs as anybody."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

import luod_client
from harness import ALICE, BOB, LIMIT_S, Client, Daemon, Talk, folder_for, spawn_client, start, until
from luod_client import Code, Refusal
from luod_protocol import messages as m
from luod_protocol.fds import close_all
from luod_protocol.messages import Endpoint
from processes import PYTHON
from puppets import ask, everybody_may_connect, puppet_of, refused
from raw import HELLO, SESSION_ID, STATUS, Raw
from things import eventfd, let_go, pipe, preserve_pipe, state

pytestmark = pytest.mark.root  # several uids


@pytest.fixture
def puppets(daemon: Daemon) -> Iterator[tuple[Client, Client]]:
    """Two users of a luod that root runs."""
    everybody_may_connect(daemon, "serialize", "deserialize")
    with puppet_of(daemon, ALICE) as alice, puppet_of(daemon, BOB) as bob:
        yield alice, bob


def test_two_users_do_not_see_each_other(daemon: Daemon, puppets: tuple[Client, Client]) -> None:
    alice, bob = puppets
    hers = ask(alice, "preserve", name="guest")
    never = secrets.token_bytes(16)
    for verb in ("show", "claim", "discard", "finish", "finalize"):
        text = refused(bob, Code.NO_SUCH_SESSION, verb, session_id=hers)
        assert text.replace(hers.hex(), never.hex()) == refused(bob, Code.NO_SUCH_SESSION, verb, session_id=never)
    for verb in ("show", "claim", "discard"):
        refused(bob, Code.NO_SUCH_SESSION, verb, session="guest")
        refused(bob, Code.NOT_PERMITTED, verb, session="guest", owner=ALICE.uid)
        refused(bob, Code.NOT_PERMITTED, verb, session="guest", owner=0)
    refused(bob, Code.NOT_PERMITTED, "list", owner=ALICE.uid)
    refused(bob, Code.NOT_PERMITTED, "preserve", name="other", owner=ALICE.uid)

    his = ask(bob, "preserve", name="guest")  # the same name, another session
    assert ask(alice, "list") == [("guest", ALICE.uid)]
    assert ask(bob, "list") == [("guest", BOB.uid)]
    assert ask(bob, "list", owner=BOB.uid) == [("guest", BOB.uid)]
    assert ask(bob, "show", session="guest") == BOB.uid
    assert ask(alice, "finalize", session_id=hers) == hers
    assert ask(alice, "claim", session="guest") == hers
    assert ask(alice, "finish", session_id=hers) == hers
    for verb in ("show", "claim", "discard", "finish", "finalize"):
        refused(bob, Code.NO_SUCH_SESSION, verb, session_id=hers)
    refused(alice, Code.SESSION_FINISHED, "show", session_id=hers)
    assert ask(bob, "discard", session_id=his) == his


def test_root_acts_for_others(daemon: Daemon, puppets: tuple[Client, Client]) -> None:
    alice, bob = puppets
    where = daemon.runtime_dir
    hers, his = ask(alice, "preserve", name="guest"), ask(bob, "preserve", name="guest")
    with luod_client.deserialize(runtime_dir=where) as looker:
        assert [(each.session, each.owner) for each in looker.list()] == [("guest", ALICE.uid), ("guest", BOB.uid)]
        assert [each.owner for each in looker.list(owner=BOB.uid)] == [BOB.uid]
        with pytest.raises(Refusal) as nothing:
            looker.show("guest")  # root's own
        assert nothing.value.code is Code.NO_SUCH_SESSION
        assert looker.show("guest", owner=ALICE.uid).info.session_id == hers
        assert looker.show(session_id=his).info.owner == BOB.uid
        with looker.claim("guest", owner=ALICE.uid) as claim:
            close_all(claim.retrieve().values())
            refused(alice, Code.SESSION_CLAIMED, "claim", session="guest")
            claim.finish()
        assert ask(alice, "finish", session_id=hers) == hers
        assert looker.discard(session_id=his).session_id == his
    with luod_client.serialize("from-root", owner=ALICE.uid, runtime_dir=where) as session, eventfd() as irq:
        session.preserve({"pipe": irq.fileno()})
        session.finalize()
    assert ask(bob, "list") == []
    refused(bob, Code.NO_SUCH_SESSION, "claim", session_id=session.id)
    assert ask(alice, "claim", session="from-root") == session.id


def test_sockets_are_closed_to_others(daemon: Daemon) -> None:
    with puppet_of(daemon, ALICE) as alice:
        for verb in ("preserve", "list", "status"):
            arguments = {"name": "guest"} if verb == "preserve" else {}
            assert "Permission denied" in refused(alice, Code.NOT_PERMITTED, verb, **arguments)


def test_control_is_closed_to_others_whatever_the_mode_of_its_socket(daemon: Daemon) -> None:
    everybody_may_connect(daemon, "control")
    with puppet_of(daemon, ALICE) as alice:
        for verb in ("status", "upgrade"):
            assert f"not for uid {ALICE.uid}" in refused(alice, Code.NOT_PERMITTED, verb)
    assert daemon.status().generation == 1


def test_a_connection_stays_whose_it_was(daemon: Daemon) -> None:
    """SO_PEERCRED is noted at connect: a connection that root made and gave away is root's."""
    read, session_id = preserve_pipe(daemon.runtime_dir)
    with read, Raw(daemon.runtime_dir, Endpoint.DESERIALIZE) as raw:
        with spawn_client(_use_given, raw.sock.fileno(), user=BOB, pass_fds=[raw.sock.fileno()]) as client:
            assert client.hear() == "sent"
        assert isinstance(raw.hear(), m.Claimed)
        assert isinstance(raw.ask({"type": "finish", "seq": 1, "session_id": session_id}), m.Finished)
        assert let_go(read, 0)


def _use_given(talk: Talk, number: int) -> None:
    import socket

    from luod_protocol.codec import pack

    with socket.socket(fileno=number) as sock:
        sock.send(pack({"type": "claim", "seq": 1, "session": "guest"}))
        talk.tell("sent")


# -------------------------------------------------------------------------------------------------- an ordinary user's luod


def test_an_ordinary_users_luod_with_upgrades() -> None:
    with Daemon(user=ALICE) as daemon, puppet_of(daemon, ALICE) as alice:
        hers = ask(alice, "preserve", name="guest")
        for generation in (2, 3):
            assert ask(alice, "upgrade") == generation
            assert daemon.status().generation == generation
            assert ask(alice, "list") == [("guest", ALICE.uid)]
        with puppet_of(daemon, BOB) as bob:
            refused(bob, Code.NOT_PERMITTED, "list")
        assert ask(alice, "claim", session="guest") == hers


def test_an_ordinary_users_luod_boxes_512_fds() -> None:
    with Daemon(user=ALICE) as daemon, eventfd() as irq:
        where = daemon.runtime_dir
        with luod_client.serialize("first", runtime_dir=where) as session:
            session.preserve({f"irq-{index}": irq.fileno() for index in range(500)})
            session.finalize()
        daemon.upgrade()
        with luod_client.serialize("second", runtime_dir=where) as session, pipe() as (read, write):
            session.preserve({f"irq-{index}": irq.fileno() for index in range(12)})
            session.preserve({"pipe": write.fileno()})
            write.close()
            with pytest.raises(Refusal, match=r"13 fds, luod holds 500 .* 512 is the limit.*RLIMIT_NOFILE") as limit:
                session.finalize()
            assert limit.value.code is Code.LIMIT_REACHED
            assert not let_go(read, 0)
            session.unpreserve("irq-0")
            session.finalize()
            assert daemon.status().preserved_fds == 512
            with luod_client.deserialize(runtime_dir=where) as looker:
                looker.discard("first")
                with looker.claim("second") as claim:
                    close_all(claim.retrieve().values())
                    claim.finish()
            assert let_go(read, 0)
        assert daemon.status().preserved_fds == 0


def test_roots_luod_boxes_more() -> None:
    with Daemon() as daemon, Raw(daemon.runtime_dir, greet=False) as raw:
        welcome = raw.ask(HELLO)
        assert isinstance(welcome, m.Welcome)
        assert welcome.limits.preserved_fds == 1_000_000


def test_fds_that_are_not_taken_out_of_the_socket_cost_others_nothing() -> None:
    """In-flight fds count against luod's uid, unix(7): a client that reads no answers must not use up that count."""
    with Daemon(user=ALICE) as daemon, pipe() as (read, write):
        where = daemon.runtime_dir
        with Raw(where) as raw:
            raw.open()
            raw.preserve(pipe=write.fileno())
            write.close()
            assert isinstance(raw.ask({"type": "finalize", "seq": 3, "session_id": SESSION_ID}), m.Finalized)
        with Raw(where, Endpoint.DESERIALIZE) as claimer:
            claimer.ask({"type": "claim", "seq": 1, "session": "guest"})
            sent = claimer.fill({"type": "retrieve", "seq": 2, "names": ["pipe"] * 253})
            assert sent > 20
            other, _ = preserve_pipe(where, "other")
            with other, luod_client.deserialize(runtime_dir=where) as looker, looker.claim("other") as claim:
                close_all(claim.retrieve().values())
                claim.finish()
                assert let_go(other, 0)
            assert {claimer.hear().type for _ in range(sent)} == {"retrieved"}
            assert isinstance(claimer.ask(STATUS), m.DaemonStatus)
        until(lambda: state(where) == "preserved", "the claim to be released")
        with luod_client.deserialize(runtime_dir=where) as looker:
            looker.discard("guest")
        assert let_go(read, 0)


def test_takeover_by_another_uid_is_refused() -> None:
    with Daemon(user=ALICE) as daemon, folder_for() as folder:
        command = [*PYTHON, "-m", "luod", "--runtime-dir", daemon.runtime_dir, "--takeover"]
        with open(f"{folder}/said", "w+b") as said, start(command, None, stderr=said.fileno()) as luod:
            assert luod.wait(LIMIT_S) == 1
            said.seek(0)
            text = said.read().decode()
        assert f"a successor runs as uid {ALICE.uid}" in text
        assert "Traceback" not in text
        assert daemon.status().generation == 1
