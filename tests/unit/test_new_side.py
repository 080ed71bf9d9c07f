"""A successor that is sent something that it can't use: it declines while the old daemon lives, and keeps the rest when that is dead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import trio

from entries import entry_of
from luod import manifest
from luod.handlers import kinds
from luod.manifest import Manifest
from luod.session import Session
from luod.store import Ended, Opaque, Store
from luod.succession.channel import Channel
from luod.succession.messages import (
    Box,
    Connection,
    Copied,
    Frozen,
    Gone,
    Handover,
    Offer,
    OpaqueBox,
    OpenSession,
    StagedEntries,
    UnreadFds,
    UnreadReply,
)
from luod.succession.new import Left, NewSide
from luod.succession.new_table import NewState
from luod.system import Process, System
from luod_protocol import box
from luod_protocol.fds import OwnedFd, close_all
from things import let_go, memfd, pipe


class Heir:
    """A server that only keeps what it is given."""

    def __init__(self) -> None:
        self.boot_id = System().boot_id
        self.store = Store()
        self.closed: list[tuple[int, int | None]] = []
        """What it was given to close: how many fds, and whose."""

    def adopt_session(self, session: Session) -> None:
        self.store.add(session)

    def adopt_opaque(self, opaque: Opaque) -> None:
        self.store.opaque.append(opaque)

    async def drop_session(self, ended: Ended) -> None:
        raise AssertionError(f"nothing has ended: {ended}")

    def note_retrieval(self, session_id: bytes, process: Process) -> None:
        raise AssertionError(f"nobody has retrieved: {session_id!r} {process}")

    def adopt_connection(self, live: Connection, fd: OwnedFd, unread: tuple[bytes, list[OwnedFd]] | None) -> None:
        raise AssertionError(f"nobody is connected: {live} {fd} {unread}")

    def forget_live(self) -> None:
        """Nothing is live."""

    def close_later(self, fds: Sequence[OwnedFd], owner: int | None) -> None:
        self.closed.append((len(fds), owner))
        close_all(fds)


@contextmanager
def boxed(name: str, *, another: bool = False) -> Generator[tuple[Handover, OwnedFd]]:
    """A session's box, and the message that brings it; with the fd of `another` object than the manifest says."""
    with memfd(name.encode()) as described, memfd(b"something else") as other:
        entry = entry_of(described.fileno(), "ram")
        description = Manifest(
            version=manifest.VERSIONS.high,
            session_id=name.encode().ljust(16),
            session=name,
            owner=0,
            metadata=b"",
            boot_id=System().boot_id,
            generation=1,
            opened_at=0.0,
            finalized_at=0.0,
            entries=(entry,),
        )
        with box.seal(manifest.encode(description), [(other if another else described).fileno()]) as sealed:
            yield Box(session_id=description.session_id, retrieved_by=(), stored=""), sealed


@contextmanager
def old_daemon(*, dead: bool) -> Generator[int]:
    """A process that stands for the old daemon: its pid. A dead one isn't reaped, so that there is a pidfd of it."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        if dead:
            process.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield process.pid


async def succeed(
    old: int, sent: Sequence[tuple[Handover, Sequence[int]]], heir: Heir, *, handover: int = 1, endpoints: tuple[str, ...] = ()
) -> NewSide:
    """Be sent all this by the process `old`, whose end of the socket is closed after it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sender = Channel(theirs)
    inherited: list[OwnedFd] = []

    def build(offer: Offer, lock: OwnedFd, listeners: Mapping[str, OwnedFd]) -> Heir:
        assert not listeners
        inherited.append(lock)
        return heir

    offer = Offer(luod="x", pid=old, handover=handover, generation=1, directory="", endpoints=endpoints, bound=(), ended=(), manager=None)
    with OwnedFd(os.pidfd_open(old)) as pidfd, OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as lock:
        sender.send_now(offer, [lock.fileno(), *[lock.fileno() for _ in endpoints], pidfd.fileno()])
    for message, fds in sent:
        sender.send_now(message, fds)
    sender.close()
    side = NewSide(channel=Channel(ours), kinds=kinds(), build=build)
    try:
        await side.run()
    finally:
        close_all(inherited)
        if side.predecessor is not None:
            side.predecessor.close()
        for session in heir.store:
            close_all(session.take_fds())
        close_all(each.box for each in heir.store.opaque)
    return side


@pytest.mark.parametrize("dead", [True, False])
async def test_one_wrong_box_among_good_ones(dead: bool, caplog: pytest.LogCaptureFixture) -> None:
    heir = Heir()
    with boxed("first") as first, boxed("wrong", another=True) as wrong, boxed("last") as last:
        sent = [(message, [sealed.fileno()]) for message, sealed in (first, wrong, last)]
        with old_daemon(dead=dead) as old:
            if dead:
                side = await succeed(old, [*sent, (Copied(), ())], heir)
                assert side.state is NewState.SERVING
                assert [session.name for session in heir.store] == ["first", "last"]
                assert "is another object" in caplog.text
            else:
                with pytest.raises(Left, match="is another object"):
                    await succeed(old, sent, heir)
                assert [session.name for session in heir.store] == ["first"]


@pytest.mark.parametrize("handover", [0, 2])
async def test_a_handover_of_a_version_that_is_not_known(handover: int) -> None:
    with old_daemon(dead=False) as old, pytest.raises(Left, match=f"luod x offers handover version {handover}, this luod speaks 1"):
        await succeed(old, [], Heir(), handover=handover)


async def test_an_endpoint_that_is_not_known() -> None:
    with old_daemon(dead=False) as old, pytest.raises(Left, match="luod x serves at 'migrate', which this luod doesn't"):
        await succeed(old, [], Heir(), endpoints=("control", "migrate"))


async def test_what_the_old_daemon_could_not_read_is_kept_whatever_it_is() -> None:
    heir = Heir()
    with ExitStack() as stack:
        sent: list[tuple[Handover, Sequence[int]]] = []
        for name in ("good", "wrong"):
            _, sealed = stack.enter_context(boxed(name, another=name == "wrong"))
            sent.append((OpaqueBox(stored=name), [sealed.fileno()]))
        sent.append((OpaqueBox(stored="no box"), [stack.enter_context(memfd()).fileno()]))
        sent.append((Copied(), ()))
        side = await succeed(stack.enter_context(old_daemon(dead=True)), sent, heir)
        assert side.state is NewState.SERVING
        good, wrong, no_box = heir.store.opaque
        assert good.manifest is not None
        assert (good.stored, good.fds, good.manifest.session, good.why) == ("good", 1, "good", "")
        assert (wrong.stored, wrong.fds, wrong.manifest) == ("wrong", 1, None)
        assert "is another object" in wrong.why
        assert (no_box.stored, no_box.fds, no_box.manifest) == ("no box", 0, None)


async def test_an_opaque_box_that_did_not_come() -> None:
    frozen = Frozen(since_us=1, connections=0, sessions=0, opaque=2, stored_others=())
    with old_daemon(dead=False) as old, boxed("one") as (_, sealed), pytest.raises(Left, match="1 of 2 opaque boxes came"):
        await succeed(old, [(OpaqueBox(stored=""), [sealed.fileno()]), (Copied(), ()), (frozen, ())], Heir())


async def test_a_connection_with_a_wire_version_that_is_not_known() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    live = Connection(
        endpoint="control",
        version=2,
        state="ready",
        client=Process(pid=77, start=1),
        session_id=b"",
        upgrade_seq=-1,
        lost=0,
    )
    with ours, theirs, old_daemon(dead=False) as old, pytest.raises(Left, match="process 77 speaks wire version 2, this luod 1"):
        await succeed(old, [(Copied(), ()), (live, [ours.fileno()])], Heir())


def half_of_a_session(read: int) -> list[tuple[Handover, Sequence[int]]]:
    """What is sent of an open session up to its connection, with this end of a pipe, and a reply that nobody has read."""
    entry = entry_of(read, "pipe")
    opened = OpenSession(session_id=bytes(16), name="half", owner=1001, metadata=b"", opened_at=0.0, entries=2)
    return [(opened, ()), (StagedEntries(entries=(entry,)), [read]), (UnreadReply(data=b""), ()), (UnreadFds(count=1), [read])]


@pytest.mark.parametrize("dead", [True, False])
async def test_half_of_an_open_session_is_closed_by_the_server_that_goes_on(dead: bool) -> None:
    """Closing what a client sent may never end; where this process ends it doesn't matter."""
    heir = Heir()
    with pipe() as (read, write), old_daemon(dead=dead) as old:
        sent = half_of_a_session(read.fileno())
        if dead:
            side = await succeed(old, [(Copied(), ()), *sent], heir)
            assert side.state is NewState.SERVING
            assert heir.closed == [(1, 1001), (1, None)]
        else:
            with pytest.raises(Left, match="the old daemon ended the handover"):
                await succeed(old, [(Copied(), ()), *sent], heir)
            assert not heir.closed
        read.close()
        assert let_go(write)


async def test_a_session_that_came_in_part_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    heir = Heir()
    live = Connection(
        endpoint="serialize", version=1, state="open", client=Process(pid=77, start=1), session_id=bytes(16), upgrade_seq=-1, lost=0
    )
    with pipe() as (read, write), old_daemon(dead=True) as old, boxed("whole") as (message, sealed):
        sent = [(message, [sealed.fileno()]), (Copied(), ()), *half_of_a_session(read.fileno()), (live, [read.fileno()])]
        side = await succeed(old, sent, heir)
        assert side.state is NewState.SERVING
        assert "came with 1 of 2 entries" in caplog.text
        assert heir.closed == [(1, 1001), (1, None), (1, None)]
        assert [session.name for session in heir.store] == ["whole"]
        read.close()
        assert let_go(write)


class Witness(Heir):
    """An heir whose predecessor closes the handover, for it is dying, while a session is dropped here."""

    def __init__(self, dying: Callable[[], None]) -> None:
        super().__init__()
        self._dying = dying

    async def drop_session(self, ended: Ended) -> None:
        self._dying()


async def test_an_old_daemon_that_dies_with_something_unread_is_dead_all_the_same() -> None:
    """A send says ECONNRESET then, once, and not EPIPE; and a process closes its files before its death can be seen."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sender = Channel(theirs)
    with old_daemon(dead=False) as old:
        async with trio.open_nursery() as nursery:

            async def die() -> None:
                os.kill(old, signal.SIGKILL)

            def dying() -> None:
                sender.close()
                nursery.start_soon(die)

            inherited: list[OwnedFd] = []

            def build(offer: Offer, lock: OwnedFd, listeners: Mapping[str, OwnedFd]) -> Heir:
                inherited.append(lock)
                return Witness(dying)

            offer = Offer(luod="", pid=old, handover=1, generation=1, directory="", endpoints=(), bound=(), ended=(), manager=None)
            with OwnedFd(os.pidfd_open(old)) as pidfd, OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as lock:
                sender.send_now(offer, [lock.fileno(), pidfd.fileno()])
            sender.send_now(Gone(ended=Ended(session_id=bytes(16), owner=0, finished=True)))
            side = NewSide(channel=Channel(ours), kinds=kinds(), build=build)
            await side.run()
    assert side.state is NewState.SERVING
    close_all(inherited)
    assert side.predecessor is not None
    side.predecessor.close()
