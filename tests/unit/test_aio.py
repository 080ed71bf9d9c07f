"""The trio client against a peer that keeps it waiting, or loses answers."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from luod_client import aio
from luod_protocol import messages as m
from luod_protocol.errors import Code, Disconnected, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint
from scripted import SESSION_ID, Peer, scripted, status


async def test_cancelled_in_the_middle_of_a_request_the_connection_is_closed(tmp_path: Path) -> None:
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def script(peer: Peer) -> None:
        peer.opened()
        peer.taken(m.Finalize)
        token.run_sync_soon(asked.set)
        peer.gone()

    async def finalize(session: aio.Session) -> None:
        with pytest.raises(trio.Cancelled):
            await session.finalize()

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where:
        async with aio.serialize("s", runtime_dir=where) as session:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(finalize, session)
                await asked.wait()
                nursery.cancel_scope.cancel()
            with pytest.raises(Disconnected, match="open another"):
                await session.status()


async def test_cancelled_retrieve_closes_what_came(tmp_path: Path) -> None:
    names = [str(number) for number in range(300)]
    half = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def script(peer: Peer) -> None:
        peer.claimed(*names)
        with OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC)) as fd:
            request = peer.taken(m.Retrieve)
            peer.say(m.Retrieved(seq=request.seq, names=request.names), [fd.fileno()] * len(request.names))
        peer.taken(m.Retrieve)
        token.run_sync_soon(half.set)
        peer.gone()

    with scripted(tmp_path, Endpoint.DESERIALIZE, script) as where:
        async with aio.deserialize(runtime_dir=where) as connection, connection.claim("guest") as claim:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(claim.retrieve)
                await half.wait()
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            # The script holds a few of its own; the client's would be 253.
            assert len(os.listdir("/proc/self/fd")) < 100


async def test_a_task_that_waits_for_its_turn_can_be_cancelled(tmp_path: Path) -> None:
    asked, cancelled = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def script(peer: Peer) -> None:
        peer.greet()
        first = peer.taken(m.Status)
        token.run_sync_soon(asked.set)
        assert cancelled.wait(10)
        peer.say(status(first.seq))
        peer.say(status(peer.taken(m.Status).seq))

    async def wait_in_vain(connection: aio.Deserializer, scope: trio.CancelScope) -> None:
        with scope:
            await connection.list()

    with scripted(tmp_path, Endpoint.DESERIALIZE, script) as where:
        async with aio.deserialize(runtime_dir=where) as connection:
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                nursery.start_soon(connection.status)
                await asked.wait()
                nursery.start_soon(wait_in_vain, connection, scope)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert scope.cancelled_caught
                cancelled.set()
            await connection.status()


async def test_closing_under_a_request_says_that_its_outcome_is_unknown(tmp_path: Path) -> None:
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def script(peer: Peer) -> None:
        peer.greet()
        peer.taken(m.Upgrade)
        token.run_sync_soon(asked.set)
        peer.gone()

    async def upgrade(connection: aio.Control) -> None:
        with pytest.raises(Disconnected, match="unknown"):
            await connection.upgrade()

    with scripted(tmp_path, Endpoint.CONTROL, script) as where:
        async with aio.control(runtime_dir=where) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(upgrade, connection)
            await asked.wait()
            connection.close()


async def test_a_full_backlog_is_waited_out(tmp_path: Path) -> None:
    path = str(tmp_path / "deserialize")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(0)
        fillers: list[socket.socket] = []
        with suppress(BlockingIOError):
            while True:
                fillers.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                fillers[-1].connect(path)

        def serve() -> None:
            for _ in fillers[:-1]:
                listener.accept()[0].close()
            sock, _ = listener.accept()
            with sock:
                peer = Peer(sock, Endpoint.DESERIALIZE)
                peer.greet()
                peer.say(status(peer.taken(m.Status).seq))

        async def ask() -> None:
            async with aio.deserialize(runtime_dir=str(tmp_path)) as connection:
                await connection.status()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(serve)
        for filler in fillers:
            filler.close()


async def test_the_kernels_refusal_names_the_entry(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.opened()
        peer.gone()

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where:
        async with aio.serialize("s", runtime_dir=where) as session:
            with pytest.raises(Refusal, match="not open in this process") as caught:
                await session.preserve({"closed": 1_000_000})
            assert caught.value.entry == "closed"
            session.close()


async def test_leaving_a_claim_after_the_connection_was_lost_raises_nothing_more(tmp_path: Path) -> None:
    with scripted(tmp_path, Endpoint.DESERIALIZE, lambda peer: peer.claimed("ram")) as where:
        async with aio.deserialize(runtime_dir=where) as connection, connection.claim("guest"):
            pass


async def test_finalize_again_asks_without_a_session(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        request = peer.taken(m.Finalize)
        peer.say(m.Refused(seq=request.seq, code=Code.NO_SUCH_SESSION, errno=2, message="rolled back"))

    with scripted(tmp_path, Endpoint.SERIALIZE, script) as where, pytest.raises(Refusal, match="rolled back"):
        await aio.finalize_again(SESSION_ID, runtime_dir=where)


async def test_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(aio.NoDaemon):
        async with aio.control(runtime_dir=str(tmp_path)):
            raise AssertionError("connected to nothing")
