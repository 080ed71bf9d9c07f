"""The trio client with a real luod."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import trio

from harness import Daemon
from luod_client import aio
from luod_protocol.errors import Code, Disconnected, Refusal
from luod_protocol.fds import OwnedFd, close_all
from processes import readable


@pytest.fixture
def memfd() -> Generator[int]:
    """A memfd with content."""
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.write(fd.fileno(), b"guest memory")
        yield fd.fileno()


async def preserved(daemon: Daemon, memfd: int, name: str = "guest") -> bytes:
    async with aio.serialize(name, runtime_dir=daemon.runtime_dir) as session:
        await session.preserve({"ram": memfd})
        await session.finalize()
        return session.id


async def test_fds_come_back_by_name(daemon: Daemon, memfd: int) -> None:
    names = [f"region-{number}" for number in range(300)]
    async with aio.serialize("guest", metadata=b"for the next", runtime_dir=daemon.runtime_dir) as session:
        kept = await session.preserve(dict.fromkeys(names, memfd), metadata={names[0]: b"first"}, needs={names[1]: [names[0]]})
        assert list(kept) == names
        await session.unpreserve(names[-1])
        assert "memfd" in (await session.capabilities()).kinds
        finalized = await session.finalize(require={"daemon-upgrade"})
        assert finalized.session_id == session.id
    async with aio.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        assert [info.session for info in await connection.list()] == ["guest"]
        assert (await connection.show("guest")).metadata == b"for the next"
        async with connection.claim("guest") as claim:
            assert claim.entries[names[0]].metadata == b"first"
            fds = await claim.retrieve()
            assert list(fds) == names[:-1]
            assert {os.fstat(fd.fileno()).st_ino for fd in fds.values()} == {os.fstat(memfd).st_ino}
            close_all(fds.values())
            await claim.finish()
        await connection.finish(session.id)
        assert (await connection.status()).sessions_preserved == 0


@pytest.mark.parametrize("cancelled", [False, True])
async def test_leaving_or_cancelling_rolls_back(daemon: Daemon, cancelled: bool) -> None:
    read_end, write_end = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    with read_end:
        with trio.CancelScope() as scope:
            async with aio.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
                with write_end:
                    await session.preserve({"pipe": write_end.fileno()})
                assert not readable(read_end.fileno(), 0)
                if cancelled:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught is cancelled
        assert readable(read_end.fileno()), "luod keeps the fd of a session that was rolled back"


async def test_a_claim_is_released_at_the_end_of_its_block_also_when_cancelled(daemon: Daemon, memfd: int) -> None:
    await preserved(daemon, memfd)
    async with aio.deserialize(runtime_dir=daemon.runtime_dir) as other:
        async with aio.deserialize(runtime_dir=daemon.runtime_dir) as connection:
            async with connection.claim("guest"):
                with pytest.raises(Refusal) as caught:
                    async with other.claim("guest"):
                        raise AssertionError("two have claimed it")
                assert caught.value.code is Code.SESSION_CLAIMED
            async with other.claim("guest"):
                pass
            with trio.CancelScope() as scope:
                async with connection.claim("guest"):
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert scope.cancelled_caught
            with pytest.raises(Disconnected):
                await connection.status()
        async with aio.control(runtime_dir=daemon.runtime_dir) as control:
            while (await control.show("guest")).info.claimed_by:
                await trio.lowlevel.checkpoint()
        await other.discard("guest")


async def test_many_tasks_share_a_connection(daemon: Daemon, memfd: int) -> None:
    await preserved(daemon, memfd)

    async def retrieve(claim: aio.Claim) -> None:
        (await claim.retrieve("ram"))["ram"].close()

    async with aio.deserialize(runtime_dir=daemon.runtime_dir) as connection, connection.claim("guest") as claim:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(retrieve, claim)
        await claim.finish()


async def test_a_client_goes_on_over_an_upgrade(daemon: Daemon, memfd: int) -> None:
    async with aio.serialize("guest", runtime_dir=daemon.runtime_dir) as session:
        await session.preserve({"one": memfd})
        await trio.to_thread.run_sync(daemon.upgrade)
        await session.preserve({"two": memfd})
        assert (await session.status()).generation == 2
        await session.finalize()
    async with aio.deserialize(runtime_dir=daemon.runtime_dir) as connection:
        assert {entry.name for entry in (await connection.show(session_id=session.id)).entries} == {"one", "two"}
        await connection.discard(session_id=session.id)


async def test_what_happens_is_monitored_until_luod_ends(daemon: Daemon, memfd: int) -> None:
    async with aio.control(runtime_dir=daemon.runtime_dir) as watcher:
        events = await watcher.monitor()
        session_id = await preserved(daemon, memfd)
        assert [(await anext(events)).event for _ in range(2)] == ["opened", "finalized"]
        assert (await aio.finalize_again(session_id, runtime_dir=daemon.runtime_dir)).session_id == session_id
        daemon.kill()
        daemon.wait_gone()
        assert [event async for event in events] == []
