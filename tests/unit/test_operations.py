"""The client against a peer that loses answers, gives wrong ones, or refuses; and the operations by hand, where the kernel would."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

import pytest

import luod_client
from luod_client import Claim, Session
from luod_client.operations import Conversation, NotPassed, Send
from luod_protocol import messages as m
from luod_protocol.connection import ServerConnection
from luod_protocol.errors import Code, Disconnected, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.limits import MAX_PACKET_BYTES
from luod_protocol.messages import Endpoint
from luod_protocol.wire import Packet
from scripted import SESSION_ID, Peer, entry, info, scripted, status, welcome


@pytest.fixture
def memfd() -> Generator[int]:
    with OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC)) as fd:
        yield fd.fileno()


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def copies(fd: int) -> int:
    """How many descriptors of this process refer to the same inode."""
    inode = os.stat(fd).st_ino
    found = 0
    for name in open_fds():
        with suppress(FileNotFoundError):
            found += os.stat(f"/proc/self/fd/{name}").st_ino == inode
    return found


def preserved(request: m.Preserve) -> m.Preserved:
    return m.Preserved(seq=request.seq, entries=tuple(entry(spec.name) for spec in request.entries))


# ------------------------------------------------------------------------------------------------------------- batches


def test_preserve_sends_batches_of_253_two_at_a_time(tmp_path: Path, memfd: int) -> None:
    sizes: list[int] = []

    def script(peer: Peer) -> None:
        peer.opened()
        # A client that waits for each answer would stall here.
        requests = [peer.taken(m.Preserve), peer.taken(m.Preserve)]
        while requests:
            request = requests.pop(0)
            sizes.append(len(request.entries))
            peer.say(preserved(request))
            if len(sizes) == 1:
                requests.append(peer.taken(m.Preserve))
        peer.gone()

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        kept = session.preserve({f"entry-{number}": memfd for number in range(600)})
        session.close()
    assert sizes == [253, 253, 94]
    assert list(kept) == [f"entry-{number}" for number in range(600)]


def test_batches_fit_a_packet_each(tmp_path: Path, memfd: int) -> None:
    sizes: list[int] = []

    def script(peer: Peer) -> None:
        peer.opened()
        while sum(sizes) < 9:
            data = peer.sock.recv(MAX_PACKET_BYTES + 1)
            assert len(data) <= MAX_PACKET_BYTES
            request = ServerConnection(Endpoint.SERIALIZE, version=1, state=peer.state).receive(data, data.count(b"metadata"))
            assert isinstance(request, m.Preserve), "the batch went as bulk"
            sizes.append(len(request.entries))
            peer.say(preserved(request))

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        names = [f"{number}" for number in range(9)]
        kept = session.preserve(dict.fromkeys(names, memfd), metadata=dict.fromkeys(names, bytes(20_000)))
    assert sizes == [3, 3, 3]
    assert set(kept) == set(names)


def test_an_entry_too_large_for_a_packet_goes_alone_as_bulk(tmp_path: Path, memfd: int) -> None:
    requests: list[m.Preserve] = []

    def script(peer: Peer) -> None:
        peer.opened()
        for _ in range(2):
            requests.append(peer.taken(m.Preserve))
            peer.say(preserved(requests[-1]))

    needs = [f"{number:0255}" for number in range(300)]
    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        session.preserve({"small": memfd, "large": memfd}, needs={"large": needs})
    assert [[spec.name for spec in request.entries] for request in requests] == [["small"], ["large"]]
    assert requests[1].entries[0].needs == tuple(needs)


def test_retrieve_asks_in_batches_also_for_the_longest_names(tmp_path: Path, memfd: int) -> None:
    names = [f"{number:0255}" for number in range(300)]
    sizes: list[int] = []

    def script(peer: Peer) -> None:
        peer.claimed(*names)
        while sum(sizes) < len(names):
            request = peer.taken(m.Retrieve)
            sizes.append(len(request.names))
            peer.say(m.Retrieved(seq=request.seq, names=request.names), [memfd] * len(request.names))
        peer.say(m.Released(seq=peer.taken(m.Release).seq))

    with (
        scripted(tmp_path, Endpoint.DESERIALIZE, script) as where,
        luod_client.deserialize(runtime_dir=where) as connection,
        connection.claim("guest") as claim,
    ):
        fds = claim.retrieve()
        assert list(fds) == names
        for fd in fds.values():
            fd.close()
    assert sizes == [253, 47]


def test_a_refused_batch_takes_the_others_back(tmp_path: Path, memfd: int) -> None:
    taken_back: list[str] = []

    def script(peer: Peer) -> None:
        peer.opened()
        first, second = peer.taken(m.Preserve), peer.taken(m.Preserve)
        peer.say(preserved(first))
        third = peer.taken(m.Preserve)
        peer.say(m.Refused(seq=second.seq, code=Code.ENTRY_EXISTS, errno=errno.EEXIST, message="there is one", entry="300"))
        peer.say(preserved(third))
        request = peer.taken(m.Unpreserve)
        taken_back.extend(request.names)
        peer.say(m.Unpreserved(seq=request.seq))
        peer.say(status(peer.taken(m.Status).seq))

    names = [str(number) for number in range(600)]
    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        with pytest.raises(Refusal, match="there is one") as caught:
            session.preserve(dict.fromkeys(names, memfd))
        session.status()
    assert caught.value.entry == "300"
    assert taken_back == names[:253] + names[506:]


def test_a_refused_batch_of_retrieve_closes_what_came(tmp_path: Path, memfd: int) -> None:
    names = [str(number) for number in range(300)]

    def script(peer: Peer) -> None:
        peer.claimed(*names)
        first, second = peer.taken(m.Retrieve), peer.taken(m.Retrieve)
        peer.say(m.Retrieved(seq=first.seq, names=first.names), [memfd] * len(first.names))
        peer.say(m.Refused(seq=second.seq, code=Code.NO_SUCH_ENTRY, errno=errno.ENOENT, message="no", entry="299"))
        peer.say(m.Released(seq=peer.taken(m.Release).seq))
        peer.gone()

    with scripted(tmp_path, Endpoint.DESERIALIZE, script) as where, luod_client.deserialize(runtime_dir=where) as connection:
        with connection.claim("guest") as claim:
            with pytest.raises(Refusal):
                claim.retrieve()
            assert copies(memfd) == 1
        connection.close()


# -------------------------------------------------------------------------------------------- what the kernel refuses


def test_a_closed_fd_is_named_and_the_session_goes_on(tmp_path: Path, memfd: int) -> None:
    def script(peer: Peer) -> None:
        peer.opened()
        peer.say(preserved(peer.taken(m.Preserve)))

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        with pytest.raises(Refusal, match=r"'closed'.*not open in this process") as caught:
            session.preserve({"good": memfd, "closed": 1_000_000})
        assert caught.value.entry == "closed"
        assert list(session.preserve({"good": memfd})) == ["good"]


def test_an_io_uring_is_named(tmp_path: Path, memfd: int) -> None:
    ring = ctypes.CDLL(None, use_errno=True).syscall(425, 1, ctypes.byref(ctypes.create_string_buffer(120)))
    if ring < 0:
        # Forbidden on this machine: what the kernel would say goes into the operation by hand.
        assert ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
        talk, _ = opened_by_hand()
        steps = talk.preserve({"good": memfd, "ring": memfd}, {}, {})
        next(steps)
        with pytest.raises(Refusal, match=r"'ring'.*io_uring"):
            steps.throw(NotPassed(errno.EINVAL, "Invalid argument", 1, "anon_inode:[io_uring]"))
        return

    def script(peer: Peer) -> None:
        peer.opened()
        peer.gone()

    with (
        OwnedFd(ring),
        scripted(tmp_path, Endpoint.SERIALIZE, script) as where,
        luod_client.serialize("s", runtime_dir=where) as session,
    ):
        before = open_fds()
        with pytest.raises(Refusal, match=r"'ring': its fd is an io_uring, .*set up another") as caught:
            session.preserve({"good": memfd, "ring": ring})
        assert caught.value.code is Code.KIND_NOT_SUPPORTED
        assert open_fds() == before


def opened_by_hand() -> tuple[Conversation, ServerConnection]:
    """A conversation with an open session, and the other side of it."""
    talk, server = Conversation(Endpoint.SERIALIZE), ServerConnection(Endpoint.SERIALIZE)
    steps = talk.open("s", SESSION_ID, b"", None, notices=False)
    assert isinstance(next(steps), Send)
    assert isinstance(steps.send(None), Send)
    assert steps.send(None) is None
    assert steps.send(Packet(server.send(welcome(1)), [])) is None
    with pytest.raises(StopIteration):
        steps.send(Packet(server.send(m.Opened(seq=2, session_id=SESSION_ID)), []))
    return talk, server


def test_too_many_in_flight_is_tried_again_when_luod_has_taken_its_part(memfd: int) -> None:
    talk, server = opened_by_hand()
    steps = talk.preserve({str(number): memfd for number in range(300)}, {}, {})
    first = next(steps)
    second = steps.send(None)
    assert isinstance(first, Send)
    assert isinstance(second, Send)
    assert steps.throw(OSError(errno.ETOOMANYREFS, "Too many references")) is None, "it must wait for the first answer"
    again = steps.send(Packet(server.send(m.Preserved(seq=3, entries=(entry("0"),))), []))
    assert again == second
    assert steps.send(None) is None
    with pytest.raises(StopIteration) as done:
        steps.send(Packet(server.send(m.Preserved(seq=4, entries=(entry("299"),))), []))
    assert set(done.value.value) == {"0", "299"}


def test_too_many_in_flight_with_nothing_under_way_is_a_refusal_that_says_to_try_again(memfd: int) -> None:
    talk, _ = opened_by_hand()
    steps = talk.preserve({"ram": memfd}, {}, {})
    next(steps)
    with pytest.raises(Refusal, match="tried again") as caught:
        steps.throw(OSError(errno.ETOOMANYREFS, "Too many references"))
    assert caught.value.code is Code.LIMIT_REACHED


# ------------------------------------------------------------------------------------------------------- lost answers

LOST: list[tuple[Callable[[Session], object], type[m.Request], str]] = [
    (lambda s: s.finalize(), m.Finalize, "preserved is unknown.*show.*{id}.*does no harm"),
    (lambda s: s.preserve({"ram": 0}), m.Preserve, "nothing is preserved"),
    (lambda s: s.unpreserve("ram"), m.Unpreserve, "nothing is preserved"),
    (lambda s: s.cancel(), m.Cancel, "nothing is preserved"),
    (lambda s: s.status(), m.Status, "Ask again"),
]


@pytest.mark.parametrize(("ask", "kind", "words"), LOST, ids=[kind.type for _, kind, _ in LOST])
def test_a_lost_answer_says_what_is_unknown(tmp_path: Path, ask: Callable[[Session], object], kind: type[m.Request], words: str) -> None:
    def script(peer: Peer) -> None:
        peer.opened()
        peer.taken(kind)

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        with pytest.raises(Disconnected, match=words.format(id=session.id.hex())):
            ask(session)
        with pytest.raises(Disconnected, match="open another"):
            session.status()


LOST_TO_CLAIMER: list[tuple[Callable[[Claim], object], type[m.Request], str]] = [
    (lambda c: c.finish(), m.Finish, f"let go.*unknown.*show.*{SESSION_ID.hex()}.*does no harm"),
    (lambda c: c.retrieve("ram"), m.Retrieve, "stays preserved"),
    (lambda c: c.release(), m.Release, "stays preserved"),
]


@pytest.mark.parametrize(("ask", "kind", "words"), LOST_TO_CLAIMER, ids=[kind.type for _, kind, _ in LOST_TO_CLAIMER])
def test_a_lost_answer_to_a_claimer_says_what_is_unknown(
    tmp_path: Path, ask: Callable[[Claim], object], kind: type[m.Request], words: str
) -> None:
    def script(peer: Peer) -> None:
        peer.claimed("ram")
        peer.taken(kind)

    with (
        scripted(tmp_path, Endpoint.DESERIALIZE, script) as where,
        luod_client.deserialize(runtime_dir=where) as connection,
        connection.claim("guest") as claim,
        pytest.raises(Disconnected, match=words),
    ):
        ask(claim)


def test_a_lost_answer_to_upgrade_points_to_the_generation(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.taken(m.Upgrade)

    with (
        scripted(tmp_path, Endpoint.CONTROL, script) as where,
        luod_client.control(runtime_dir=where) as connection,
        pytest.raises(Disconnected, match="generation"),
    ):
        connection.upgrade()


def test_finalize_again_asks_without_a_session(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        request = peer.taken(m.Finalize)
        assert request.session_id == SESSION_ID
        peer.say(m.Finalized(seq=request.seq, session_id=SESSION_ID, survives=("daemon-upgrade",), entry_survives={}))

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where:
        assert luod_client.finalize_again(SESSION_ID, runtime_dir=where).survives == ("daemon-upgrade",)


# ------------------------------------------------------------------------------------------- faults and wrong answers


def test_the_reason_is_found_although_the_connection_was_reset(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.take()
        peer.say(m.Fault(code=FaultCode.NO_COMMON_VERSION, errno=errno.EPROTONOSUPPORT, message="too old"))
        # Closed with `open` unread: the client's recvmsg(2) says ECONNRESET before it gives the fault.
        peer.unread()

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, pytest.raises(ProtocolFault, match="too old") as caught:
        luod_client.serialize("s", runtime_dir=where)
    assert caught.value.code is FaultCode.NO_COMMON_VERSION


def test_the_reason_is_found_although_sending_fails(tmp_path: Path) -> None:
    closed = threading.Event()

    def script(peer: Peer) -> None:
        peer.greet()
        peer.say(m.Fault(code=FaultCode.TOO_SLOW, errno=errno.ETIMEDOUT, message="you are slow"))
        peer.sock.close()
        closed.set()

    with scripted(tmp_path, Endpoint.DESERIALIZE, script) as where, luod_client.deserialize(runtime_dir=where) as connection:
        assert closed.wait(10)
        with pytest.raises(ProtocolFault, match="you are slow"):
            connection.list()


@pytest.mark.parametrize("reply", [welcome(2), status(3)], ids=["type", "seq"])
def test_a_wrong_answer_ends_the_connection(tmp_path: Path, reply: m.Reply) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.taken(m.Status)
        peer.say(reply)
        peer.gone()

    with scripted(tmp_path, Endpoint.DESERIALIZE, script) as where, luod_client.deserialize(runtime_dir=where) as connection:
        with pytest.raises(ProtocolFault):
            connection.status()
        with pytest.raises(Disconnected):
            connection.status()


def test_fds_of_other_entries_are_closed(tmp_path: Path, memfd: int) -> None:
    def script(peer: Peer) -> None:
        peer.claimed("ram", "disk")
        peer.say(m.Retrieved(seq=peer.taken(m.Retrieve).seq, names=("disk",)), [memfd])
        peer.gone()

    with (
        scripted(tmp_path, Endpoint.DESERIALIZE, script) as where,
        luod_client.deserialize(runtime_dir=where) as connection,
        connection.claim("guest") as claim,
        pytest.raises(ProtocolFault, match="other entries"),
    ):
        claim.retrieve("ram")
    assert copies(memfd) == 1


# ------------------------------------------------------------------------------------------------ the client's own no


NEVER_SENT: dict[str, tuple[Callable[[Session], object], Code]] = {
    "not text": (lambda s: s.unpreserve("\udcff"), Code.BAD_REQUEST),
    "metadata for no fd": (lambda s: s.preserve({"ram": 0}, metadata={"rma": b"x"}), Code.BAD_REQUEST),
    "needs of no fd": (lambda s: s.preserve({"ram": 0}, needs={"rma": ()}), Code.BAD_REQUEST),
    "too large": (lambda s: s.preserve({"ram": 0}, metadata={"ram": bytes(17 << 20)}), Code.TOO_LARGE),
}


@pytest.mark.parametrize(("ask", "code"), NEVER_SENT.values(), ids=NEVER_SENT)
def test_what_can_not_be_sent_is_refused_and_the_session_goes_on(tmp_path: Path, ask: Callable[[Session], object], code: Code) -> None:
    def script(peer: Peer) -> None:
        peer.opened()
        peer.say(status(peer.taken(m.Status).seq))

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        with pytest.raises(Refusal) as caught:
            ask(session)
        assert caught.value.code is code
        session.status()


def test_a_refused_open_leaves_no_fd(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.say(m.Refused(seq=peer.taken(m.Open).seq, code=Code.SESSION_EXISTS, errno=errno.EEXIST, message="it exists"))
        peer.gone()

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, pytest.raises(Refusal, match="it exists"):
        luod_client.serialize("s", runtime_dir=where)


def test_after_finalize_the_connection_has_done_its_work(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.opened()
        request = peer.taken(m.Finalize)
        peer.say(m.Finalized(seq=request.seq, session_id=request.session_id, survives=(), entry_survives={}))
        peer.gone()

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, luod_client.serialize("s", runtime_dir=where) as session:
        session.finalize()
        with pytest.raises(Refusal, match="open another"):
            session.finalize()


@pytest.mark.parametrize("finish", [True, False])
def test_leaving_a_claim_releases_it_unless_finished(tmp_path: Path, finish: bool) -> None:
    def script(peer: Peer) -> None:
        peer.claimed()
        if finish:
            peer.say(m.Finished(seq=peer.taken(m.Finish).seq, session_id=SESSION_ID))
        else:
            peer.say(m.Released(seq=peer.taken(m.Release).seq))
        request = peer.taken(m.Show)
        peer.say(m.Shown(seq=request.seq, info=info(), metadata=b"", entries=()))

    with scripted(tmp_path, Endpoint.DESERIALIZE, script) as where, luod_client.deserialize(runtime_dir=where) as connection:
        with connection.claim("guest") as claim:
            if finish:
                claim.finish()
        connection.show("guest")


def test_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(luod_client.NoDaemon, match="start `luod"):
        luod_client.deserialize(runtime_dir=str(tmp_path))
    with scripted(tmp_path, Endpoint.DESERIALIZE, Peer.greet) as where:
        luod_client.deserialize(runtime_dir=where).close()
    with pytest.raises(luod_client.NoDaemon, match="refused"):
        luod_client.deserialize(runtime_dir=str(tmp_path))


def test_a_path_too_long_for_a_socket_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="too long"):
        luod_client.deserialize(runtime_dir=str(tmp_path / ("x" * 120)))
