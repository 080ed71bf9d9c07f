"""A luod that systemd shuts down, in this process, with a kernel and a manager that stand in: what lies in the store at its end, and what
the next luod makes of it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping

import pytest

from kernel_standin import KernelStandin, SessionStandin
from luod.notify import SUPERVISOR, Manager, ManagerInfo
from luod.relaying import relay
from luod.store import Store
from luod.succession import relay as names
from luod.succession.keeping import Keeper, secure
from luod.succession.kernel import Arrival, unload
from luod.succession.liveupdate import LiveUpdateFault
from luod.unit import PidOne
from luod_client import aio
from luod_protocol.codec import pack
from luod_protocol.fds import OwnedFd, close_all, duplicate
from standin_manager import StandinManager, standin_manager
from things import memfd as plain
from unit.updating import boot_id, keep, luod, memfd, prepared


def says(systemd: PidOne | None) -> Callable[[], Awaitable[PidOne | None]]:
    """A PID 1."""

    async def ask() -> PidOne | None:
        return systemd

    return ask


SHUTS_DOWN = says(PidOne(release=262, is_stopping=True))
RESTARTS = says(PidOne(release=262, is_stopping=False))
OLDER = says(PidOne(release=260, is_stopping=True))
SAYS_NOTHING = says(None)


def kernel_sessions(there: StandinManager) -> list[str]:
    """The names of the kernel sessions in the store, in order."""
    return [name for name in there.names if name.startswith("k")]


def carried(there: StandinManager, kernel: KernelStandin) -> tuple[KernelStandin, dict[int, SessionStandin]]:
    """The next kernel, where systemd has retrieved what was in its store, and what it passes on by number."""
    by_inode = {os.fstat(session.fileno()).st_ino: name for name, session in kernel.outgoing.items()}
    stored = names.sort([(name, duplicate(fd.fileno())) for name, fd in there.stored], boot_id(KernelStandin(boot=9)))
    close_all(fd for _, fd in stored.others)
    following = kernel.kexec()
    passed: dict[int, SessionStandin] = {}
    for number, fd in stored.came.items():
        with fd:
            passed[number] = following.opening(patience_s=0).retrieve(by_inode[os.fstat(fd.fileno()).st_ino])
            following.is_open = False
    return following, passed


def contents(arrival: Arrival) -> Mapping[str, int]:
    """What sessions arrived, with how many entries."""
    return {session.name: session.size for session in arrival.sessions}


def let_go(arrival: Arrival) -> None:
    arrival.settle()
    arrival.hold.let_all_go()
    close_all(fd for session in arrival.sessions for fd in session.take_fds())


async def test_what_is_prepared_lies_in_the_store_at_the_end_and_comes_back() -> None:
    async with standin_manager() as (there, _), luod(kernel := KernelStandin(), manager=there.info) as first:
        await keep(first, "many", {f"e{number}": memfd(b"%d" % number) for number in range(130)})
        await keep(first, "one", {"e": memfd(b"one")})
        await prepared(first)
        assert await relay(first.server, SHUTS_DOWN)
        assert first.server.updates.state == "frozen"
        boot = boot_id(kernel)
        assert kernel_sessions(there) == [names.name(boot, number) for number in range(4)]
        assert {"b0", "b1"} < set(there.names), "should the reboot not happen"
        assert any("EXTEND_TIMEOUT_USEC" in told for told in there.told)
        following, passed = carried(there, kernel)
    arrival = unload(passed, boot_id(following))
    assert arrival is not None
    assert contents(arrival) == {"many": 130, "one": 1}
    assert arrival.lost == ()
    let_go(arrival)
    assert not following.incoming
    following.close()


async def test_with_a_kernel_loaded_it_is_prepared_at_the_end() -> None:
    async with standin_manager() as (there, _), luod(kernel := KernelStandin(), manager=there.info, kexec_loaded=True) as first:
        await keep(first, "travels", {"e": memfd(b"travels")})
        await keep(first, "stays", {"e": OwnedFd(os.eventfd(0))})
        assert await relay(first.server, SHUTS_DOWN)
        status = first.server.updates.status(0)
        assert (status.carried, status.left_behind) == (1, (f"session 'stays' of uid {os.geteuid()}",))
        following, passed = carried(there, kernel)
    arrival = unload(passed, boot_id(following))
    assert arrival is not None
    assert contents(arrival) == {"travels": 1}
    let_go(arrival)
    following.close()


async def test_an_open_session_is_not_waited_for_at_the_end() -> None:
    async with standin_manager() as (there, _), luod(KernelStandin(), manager=there.info) as first:
        await keep(first, "one", {"e": memfd(b"one")})
        async with aio.serialize("open", runtime_dir=first.directory):
            async with aio.control(runtime_dir=first.directory) as control:
                assert (await control.prepare(deadline_s=600)).state == "preparing"
            assert await relay(first.server, SHUTS_DOWN)
            assert first.server.updates.status(0).left_behind == (f"session 'open' of uid {os.geteuid()}",)
            assert len(kernel_sessions(there)) == 2
            first.server.gate.open()


async def test_nothing_is_done_without_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    async with standin_manager() as (there, _):
        async with luod(KernelStandin(), manager=there.info) as no_kernel_loaded:
            await keep(no_kernel_loaded, "one", {"e": memfd(b"one")})
            assert not await relay(no_kernel_loaded.server, SHUTS_DOWN)
        async with luod(KernelStandin(boot=2), manager=there.info, kexec_loaded=True) as no_sessions:
            assert not await relay(no_sessions.server, SHUTS_DOWN)
        async with luod(KernelStandin(is_there=False), manager=there.info, kexec_loaded=True) as no_live_update:
            await keep(no_live_update, "one", {"e": memfd(b"one")})
            assert not await relay(no_live_update.server, SHUTS_DOWN)
        for systemd in (RESTARTS, SAYS_NOTHING):
            async with luod(KernelStandin(), manager=there.info, kexec_loaded=True) as only_stopped:
                await keep(only_stopped, "one", {"e": memfd(b"one")})
                assert not await relay(only_stopped.server, systemd)
        assert kernel_sessions(there) == []
    async with luod(KernelStandin(), kexec_loaded=True) as no_manager:
        await keep(no_manager, "one", {"e": memfd(b"one")})
        assert not await relay(no_manager.server, SHUTS_DOWN)
    assert "a kexec will cost" not in caplog.text


async def test_an_older_systemd_that_shuts_down_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with standin_manager() as (there, _), luod(KernelStandin(), manager=there.info, kexec_loaded=True) as first:
        await keep(first, "one", {"e": memfd(b"one")})
        assert not await relay(first.server, OLDER)
        assert "older than 261" in caplog.text
        assert kernel_sessions(there) == []


async def test_a_prepared_update_that_ends_with_luod_says_what_would_have_done(caplog: pytest.LogCaptureFixture) -> None:
    async with standin_manager(limit=0) as (full, _), standin_manager() as (there, _):
        supervised = ManagerInfo(name=SUPERVISOR, address=there.info.address)
        for manager, systemd, says in (
            (None, SHUTS_DOWN, "does not run as a service of systemd"),
            (supervised, SHUTS_DOWN, "does not run as a service of systemd"),
            (there.info, OLDER, "older than 261"),
            (there.info, SAYS_NOTHING, "older than 261"),
            (full.info, SHUTS_DOWN, "FileDescriptorStoreMax="),
        ):
            caplog.clear()
            async with luod(KernelStandin(), manager=manager) as first:
                await keep(first, "one", {"e": memfd(b"one")})
                await prepared(first)
                assert not await relay(first.server, systemd)
            assert says in caplog.text
            assert "`luoctl kexec run --now`" in caplog.text
        assert kernel_sessions(there) == []


async def test_a_prepared_update_goes_on_whatever_systemd_stops_luod_for() -> None:
    async with standin_manager() as (there, _), luod(KernelStandin(), manager=there.info) as first:
        await keep(first, "one", {"e": memfd(b"one")})
        await prepared(first)
        assert await relay(first.server, RESTARTS)
        assert len(kernel_sessions(there)) == 2


async def test_a_store_that_is_full_costs_nothing_but_the_kexec(caplog: pytest.LogCaptureFixture) -> None:
    async with standin_manager(limit=5) as (there, _), luod(kernel := KernelStandin(), manager=there.info) as first:
        await keep(first, "one", {"e": memfd(b"one")})
        await keep(first, "two", {"e": memfd(b"two")})
        await prepared(first)
        assert not await relay(first.server, SHUTS_DOWN)
        assert kernel_sessions(there) == []
        assert first.server.updates.state == "normal"
        assert not kernel.preserved()
        assert "took nothing more" in first.server.updates.status(0).reason
        assert "a kexec will cost the sessions" in caplog.text
        async with aio.deserialize(runtime_dir=first.directory) as connection:
            assert {each.session for each in await connection.list()} == {"one", "two"}, "it serves to its end"


async def test_a_luod_that_crashes_in_the_next_kernel_loses_nothing() -> None:
    async with standin_manager() as (there, _), luod(kernel := KernelStandin(), manager=there.info) as first:
        await keep(first, "one", {"shared": memfd(b"one")})
        await keep(first, "two", {"e": memfd(b"two")})
        await prepared(first)
        assert await relay(first.server, SHUTS_DOWN)
        following, passed = carried(there, kernel)
    crashed = unload(passed, boot_id(following))
    assert crashed is not None
    again = unload(passed, boot_id(following), known={crashed.sessions[0].session_id})
    assert again is not None
    assert (contents(again), again.lost) == ({"two": 1}, ())
    close_all(fd for session in crashed.sessions for fd in session.take_fds())
    let_go(again)
    following.close()


async def test_what_luod_retrieves_itself_is_stored_until_boxes_are() -> None:
    async with standin_manager() as (there, _):
        sessions = {number: plain() for number in range(3)}
        stored = await secure(there.info, (), {number: fd.fileno() for number, fd in sessions.items()})
        assert list(stored) == kernel_sessions(there)
        found = names.sort([(name, duplicate(fd.fileno())) for name, fd in there.stored], "1" * 32)
        assert sorted(found.came) == [0, 1, 2]
        close_all([*found.came.values(), *(fd for _, fd in found.others), *sessions.values()])
        keeper = Keeper(manager=Manager(there.info), generation=1, store=Store())
        await keeper.begin(others=stored, leaving=(), is_main=True, spent=stored)
        assert kernel_sessions(there) == []
        assert keeper.others == ("luod-ledger-1",)
        keeper.close()


async def test_a_store_without_room_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with standin_manager(limit=0) as (there, _):
        with plain() as fd:
            assert await secure(there.info, (), {0: fd.fileno()}) == []
        assert "a crash of luod before it serves" in caplog.text


@pytest.mark.parametrize("missing", [0, 1])
async def test_a_kernel_session_that_systemd_does_not_bring_is_told(missing: int, caplog: pytest.LogCaptureFixture) -> None:
    async with standin_manager() as (there, _), luod(kernel := KernelStandin(), manager=there.info) as first:
        await keep(first, "one", {"e": memfd(b"one")})
        await keep(first, "two", {"e": memfd(b"two")})
        await prepared(first)
        assert await relay(first.server, SHUTS_DOWN)
        following, passed = carried(there, kernel)
    arrival = unload({number: session for number, session in passed.items() if number != missing}, boot_id(following))
    if missing:
        assert arrival is not None
        assert (contents(arrival), len(arrival.lost)) == ({"two": 1}, 1)
        let_go(arrival)
    else:
        assert arrival is None
        assert "can't be had" in caplog.text
    following.close()


def test_nothing_came() -> None:
    assert unload({}, "boot") is None
    assert unload({0: LiveUpdateFault("there is none", 2)}, "boot") is None


def sorted_names(stored: list[str], boot: str) -> tuple[list[str], list[int], list[str], list[str]]:
    found = names.sort([(name, plain()) for name in stored], boot)
    close_all([*(fd for _, fd in found.others), *found.came.values()])
    return [name for name, _ in found.others], sorted(found.came), found.names, found.of_this_boot


def test_names_tell_of_which_boot_they_are() -> None:
    this, other, third = "11111111-1111-1111-1111-111111111111", "2" * 32, "3" * 32
    assert names.name(this, 7) == "k111111111111.7"
    ours, theirs = [names.name(this, 0), names.name(this, 1)], [names.name(other, 1), names.name(other, 0)]
    assert sorted_names(["b0", *ours, "luod-ledger-1", "k1", "k111111111111.x"], this) == (
        *(["b0", "luod-ledger-1", "k1", "k111111111111.x"], [], []),
        ours,
    )
    assert sorted_names(theirs, this) == ([], [0, 1], theirs, [])
    without_index = names.name(third, 5)
    assert sorted_names([without_index, *theirs], this) == ([], [0, 1], [without_index, *theirs], [])
    assert sorted_names([theirs[0], theirs[0]], this) == ([], [1], [theirs[0]], [])


async def test_an_index_of_a_newer_luod_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    kernel = KernelStandin()
    with memfd(pack({"version": 99})) as index:
        kernel.opening(patience_s=0).create("luod-index").preserve(index.fileno(), 0)
    following = kernel.kexec()
    session = following.opening(patience_s=0).retrieve("luod-index")
    assert unload({0: session}, "boot") is None
    assert "a newer luod wrote it" in caplog.text
    assert "finish luod-index" not in following.calls
    following.close()
