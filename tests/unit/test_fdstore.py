"""The manager's store: nothing is taken for kept that isn't."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from luod import notify
from luod.notify import ManagerFault
from luod.succession.fdstore import NAMES_BYTES, WITNESS, FdStore, NotKept
from standin_manager import standin_manager
from things import memfd, same_file


async def test_what_is_put_is_there_until_it_is_removed() -> None:
    async with standin_manager() as (there, here):
        store = FdStore(here, ())
        with memfd(b"one") as one, memfd(b"two") as two:
            await store.put("luod-1", one.fileno())
            await store.put("luod-2", two.fileno())
            await here.barrier()
            assert there.names == ["luod-1", "luod-2"]
            assert store.names == {"luod-1", "luod-2"}
            assert same_file(there.fd("luod-1"), one.fileno())
            await store.remove("luod-1")
        assert there.names == ["luod-2"]
        assert store.count == 1
        assert all(told["FDPOLL"] == "0" for told in there.told if "FDSTORE" in told)


@pytest.mark.parametrize("room", [0, 1])
async def test_a_full_store_is_found_out(room: int) -> None:
    """With room for the fd and none for the witness it is refused too: it can't be known."""
    async with standin_manager(limit=room) as (there, here):
        store = FdStore(here, ())
        with memfd() as fd:
            with pytest.raises(NotKept, match="took nothing more"):
                await store.put("luod-1", fd.fileno())
            await here.barrier()
            assert there.names == []
            assert store.count == 0
            there.limit = 2
            await store.put("luod-1", fd.fileno())
        await here.barrier()
        assert there.names == ["luod-1"]


async def test_a_manager_that_does_not_listen_is_found_out() -> None:
    async with standin_manager() as (there, here):
        there.listens = False
        with memfd() as fd, pytest.raises(NotKept, match="does not listen to this process"):
            await FdStore(here, ()).put("luod-1", fd.fileno())
        assert there.names == []


async def test_a_known_limit_is_told_before_the_manager_is_asked() -> None:
    async with standin_manager() as (there, here):
        limited = notify.Manager(notify.ManagerInfo(name="systemd", address=there.info.address, store_limit=3))
        store = FdStore(limited, ["luod-0"])
        with memfd() as fd:
            await store.put("luod-1", fd.fileno())
            await here.barrier()
            before = len(there.told)
            with pytest.raises(NotKept, match="room for 3 fds and luod has 2 there"):
                await store.put("luod-2", fd.fileno())
            await here.barrier()
        assert len(there.told) == before
        limited.close()


async def test_a_manager_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with standin_manager() as (there, here):
        store = FdStore(here, ())
        there.goes_on = trio.Event()
        with memfd() as fd, pytest.raises(ManagerFault, match=r"did not take .* within 30 s"):
            await store.put("luod-1", fd.fileno())
        assert store.count == 0
        there.goes_on.set()
        await here.barrier()
        assert there.names == [], "what was sent is undone behind it"


async def test_a_cancelled_put_is_undone() -> None:
    async with standin_manager() as (there, here):
        store = FdStore(here, ())
        there.goes_on = trio.Event()
        with memfd() as fd:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.put, "luod-1", fd.fileno())
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        there.goes_on.set()
        await here.barrier()
        assert there.names == []


async def test_a_removal_that_is_not_answered_can_be_undone(autojump_clock: trio.testing.MockClock) -> None:
    async with standin_manager() as (there, here):
        store = FdStore(here, ())
        with memfd(b"kept") as fd:
            await store.put("luod-1", fd.fileno())
            there.goes_on = trio.Event()
            with pytest.raises(ManagerFault):
                await store.remove("luod-1")
            await store.restore("luod-1", fd.fileno())
            there.goes_on.set()
            await here.barrier()
            assert there.names == ["luod-1"]
            assert os.pread(there.fd("luod-1"), 9, 0) == b"kept"
        assert store.names == {"luod-1"}


async def test_the_witness_speaks_for_one_fd_at_a_time() -> None:
    async with standin_manager(limit=4) as (there, here):
        store = FdStore(here, ())
        kept: list[str] = []

        async def put(name: str, fd: int) -> None:
            try:
                await store.put(name, fd)
            except NotKept:
                return
            kept.append(name)

        fds = [memfd() for _ in range(10)]
        async with trio.open_nursery() as nursery:
            for number, fd in enumerate(fds):
                nursery.start_soon(put, f"luod-{number}", fd.fileno())
        await here.barrier()
        assert len(kept) == 3
        assert sorted(there.names) == sorted(kept) == sorted(store.names)
        assert WITNESS not in [name for name, _ in there.stored]
        for fd in fds:
            fd.close()


async def test_a_manager_that_is_gone() -> None:
    here = notify.Manager(notify.ManagerInfo(name="systemd", address="/nowhere/notify"))
    with pytest.raises(ManagerFault, match=r"systemd can't be told \(/nowhere/notify\): No such file"):
        await here.tell("READY=1")
    with memfd() as fd, pytest.raises(ManagerFault):
        await FdStore(here, ()).put("luod-1", fd.fileno())
    here.close()


async def test_more_names_than_the_next_luod_can_be_passed_are_refused() -> None:
    async with standin_manager() as (there, here):
        store = FdStore(here, [f"b{number}" for number in range(18_000)])
        with memfd() as fd:
            await store.put("b" * (NAMES_BYTES - sum(len(name) + 1 for name in store.names) - 1), fd.fileno())
            before = len(there.told)
            with pytest.raises(NotKept, match=r"luod has 18001 fds .* whose names fill what can be passed on"):
                await store.put("b", fd.fileno())
            await store.remove("b17")
            await store.put("b17", fd.fileno())
        assert len(there.told) > before
