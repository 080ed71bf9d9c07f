"""An upgrade that fails: the old daemon serves on when its successor can't come to serve, and what is finished is gone there too."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from luod import manifest
from luod.changes import Departure, Sealing
from luod.config import HandoverTable
from luod.gate import Gate
from luod.handlers import kinds
from luod.manifest import Manifest
from luod.notify import ManagerInfo
from luod.session import Session
from luod.store import Store
from luod.succession import old
from luod.succession.channel import Channel
from luod.succession.messages import VERSIONS, Copied, Declined, Handover, LastUpdate, Meet
from luod.succession.old import HandoverFailed, OldSide
from luod.succession.old_table import OldState
from luod.system import System
from luod_protocol import box
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint
from luod_protocol.version import WIRE

NEVER_S = 3600.0
BOXES = 50
"""More than lie in a socket whose buffer is as small as it can be."""


@attrs.define(kw_only=True)
class Server:
    """What a handover sees of a daemon that has sessions and no clients."""

    nursery: trio.Nursery
    store: Store = attrs.Factory(Store)
    gate: Gate = attrs.Factory(lambda: Gate(is_open=True))
    door: Gate = attrs.Factory(lambda: Gate(is_open=True))
    system: System = attrs.Factory(System)
    generation: int = 1
    directory: str = ""
    manager: ManagerInfo | None = None
    last_update: LastUpdate | None = None
    alone: trio.Event = attrs.Factory(trio.Event)

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        self.nursery.start_soon(task)

    def inheritance(self) -> tuple[tuple[str, ...], Sequence[int]]:
        return (), [0]

    def connections(self) -> Iterable[tuple[Session | None, Sequence[tuple[Handover, Sequence[int]]]]]:
        return ()

    @property
    def bound(self) -> tuple[Endpoint, ...]:
        return ()

    def speakers(self) -> Iterable[tuple[int, int]]:
        return ()

    def tell_monitors(self, event: str, detail: str) -> None:
        pass

    def note_successor(self) -> None:
        pass

    def stored_others(self) -> tuple[str, ...]:
        return ()

    async def settled(self) -> None:
        await self.alone.wait()

    async def announce(self, pid: int) -> None:
        raise AssertionError(f"process {pid} does not serve")


def preserved(number: int) -> Session:
    """A finalized session without entries."""
    description = Manifest(
        version=manifest.VERSIONS.high,
        session_id=number.to_bytes(16, "big"),
        session=f"s{number}",
        owner=0,
        metadata=b"",
        boot_id="",
        generation=1,
        opened_at=0.0,
        finalized_at=0.0,
        entries=(),
    )
    return Session.adopted(description, box.seal(manifest.encode(description), []), (), stored="")


@contextmanager
def successor() -> Generator[subprocess.Popen[bytes]]:
    """A process that holds what a successor would, until its stdin is closed or it is killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process


@contextmanager
def handing_over(nursery: trio.Nursery, pid: int, *, boxes: int, copy_s: float) -> Generator[tuple[OldSide, Channel, Server]]:
    """A handover to the process `pid`, for which the test speaks over the other end of its channel. No predecessor lives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    server = Server(nursery=nursery)
    server.alone.set()
    for number in range(boxes):
        server.store.add(preserved(number))
    bounds = HandoverTable(meet_s=NEVER_S, copy_s=copy_s, freeze_s=NEVER_S, commit_s=NEVER_S)
    channel = Channel(theirs)
    try:
        yield OldSide(host=server, channel=Channel(ours), successor=OwnedFd(os.pidfd_open(pid)), bounds=bounds), channel, server
    finally:
        channel.close()
        for session in server.store:
            close_all(session.take_fds())


async def meet(channel: Channel, pid: int) -> None:
    known: dict[str, tuple[str, ...]] = {kind: (compatible,) for kind, compatible in kinds().items()}
    await channel.send(Meet(luod="", pid=pid, handover=VERSIONS, wire=WIRE, manifest=manifest.VERSIONS, kinds=known))


async def read(channel: Channel, last: type[Handover]) -> None:
    """Read to a message of this type."""
    while (received := await channel.receive()) is not None:
        close_all(received[1])
        if isinstance(received[0], last):
            return
    raise AssertionError(f"no {last.type} came")


async def test_a_successor_that_can_not_be_told_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing, its socket is full. What it has is old as soon as the daemon serves on."""
    monkeypatch.setattr(old, "LEAVE_S", NEVER_S)
    with successor() as process:
        async with trio.open_nursery() as nursery:
            with handing_over(nursery, process.pid, boxes=BOXES, copy_s=0.1) as (side, channel, _):
                await meet(channel, process.pid)
                with pytest.raises(HandoverFailed, match="took nothing"):
                    await side.run()
        assert side.fate.strip(" ()") == f"it ended with signal {signal.SIGKILL.value}"


async def test_finished_waits_for_a_successor_that_failed_and_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to leave and has not left: it has copies."""
    monkeypatch.setattr(old, "LEAVE_S", NEVER_S)
    with successor() as process:
        async with trio.open_nursery() as nursery:
            with handing_over(nursery, process.pid, boxes=1, copy_s=NEVER_S) as (side, channel, server):
                done: list[str] = []

                async def run() -> None:
                    with pytest.raises(HandoverFailed, match="not today"):
                        await side.run()
                    done.append("upgrade")

                async def finish() -> None:
                    await side.tell([Departure(session_id=bytes(16), owner=0, finished=True)])
                    done.append("finish")

                nursery.start_soon(run)
                await meet(channel, process.pid)
                await read(channel, Copied)
                await channel.send(Declined(reason="not today"))
                await read(channel, Declined)
                nursery.start_soon(finish)
                await wait_all_tasks_blocked()
                (session,) = server.store
                await side.tell([Sealing(session=session)])
                assert not done
                assert process.stdin is not None
                process.stdin.close()
    assert sorted(done) == ["finish", "upgrade"]


async def test_finished_does_not_wait_for_a_successor_that_was_offered_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old, "LEAVE_S", NEVER_S)
    with successor() as process:
        async with trio.open_nursery() as nursery:
            with handing_over(nursery, process.pid, boxes=1, copy_s=NEVER_S) as (side, channel, _):

                async def run() -> None:
                    with pytest.raises(HandoverFailed, match="not today"):
                        await side.run()

                nursery.start_soon(run)
                await channel.send(Declined(reason="not today"))
                await read(channel, Declined)
                await side.tell([Departure(session_id=bytes(16), owner=0, finished=True)])
                assert process.poll() is None
                assert process.stdin is not None
                process.stdin.close()


@pytest.mark.parametrize("stopped", [False, True])
async def test_nothing_is_offered_while_the_predecessor_lives(stopped: bool) -> None:
    """It holds copies of which a successor would not know. A luod that is told to stop does not wait for it."""
    with successor() as process:
        async with trio.open_nursery() as nursery:
            with handing_over(nursery, process.pid, boxes=1, copy_s=NEVER_S) as (side, channel, server):
                server.alone = trio.Event()

                async def run() -> None:
                    with pytest.raises(HandoverFailed, match="told to stop" if stopped else "not today"):
                        await side.run()

                nursery.start_soon(run)
                await meet(channel, process.pid)
                await wait_all_tasks_blocked()
                assert side.state is OldState.SERVING
                if stopped:
                    nursery.start_soon(side.stop)
                else:
                    server.alone.set()
                    await read(channel, Copied)
                    await channel.send(Declined(reason="not today"))
                await read(channel, Declined)
                assert process.stdin is not None
                process.stdin.close()
