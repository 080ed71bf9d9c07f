"""Updates of the kernel, of a luod in this process with a kernel that stands in: what travels, and every way in which it doesn't."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress

import pytest

from kernel_standin import KernelStandin
from luod.live import revive
from luod.store import Opaque
from luod.succession import kernel as succession
from luod.succession.kernel import Arrival, collect, unload
from luod.succession.liveupdate import LiveUpdateFault
from luod.succession.messages import Connection as LiveConnection
from luod_client import aio
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd, close_all
from processes import LIMIT_S
from unit.updating import NO_WAIT, Luod, back, jump, keep, luod, memfd, prepared, read_only


@pytest.fixture
def kernel() -> KernelStandin:
    """A kernel; what it holds in the end is let go of by the tests."""
    return KernelStandin()


async def test_sessions_are_as_they_were_in_the_next_kernel(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        many = {f"e{number}": memfd(b"%d" % number, number % 3) for number in range(300)}
        sealed = memfd(b"sealed")
        fcntl.fcntl(sealed.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        appending = memfd(b"log")
        fcntl.fcntl(appending.fileno(), fcntl.F_SETFL, os.O_APPEND)
        finalized = await keep(first, "many", {**many, "sealed": sealed, "appending": appending}, ("kexec",))
        assert "kexec" in finalized.survives
        await keep(first, "empty", {})
        following = await jump(first)
    assert {"luod-index"} < set(following.incoming)
    async with luod(following) as second:
        assert second.server.generation == 2
        status = await second.until("updated")
        assert (status.arrived, status.lost, set(status.steps_us)) == (2, (), {"kernel", "boot", "start", "adopt"})
        async with aio.deserialize(runtime_dir=second.directory) as connection:
            shown = await connection.show("many")
        assert [(entry.name, entry.metadata) for entry in shown.entries][:2] == [("e0", b"e0"), ("e1", b"e1")]
        fds = await back(second, "many")
        for number in range(300):
            fd = fds[f"e{number}"].fileno()
            assert os.pread(fd, 10, 0) == b"%d" % number
            assert os.lseek(fd, 0, os.SEEK_CUR) == number % 3
        assert fcntl.fcntl(fds["sealed"].fileno(), fcntl.F_GET_SEALS) == fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
        assert fcntl.fcntl(fds["appending"].fileno(), fcntl.F_GETFL) & os.O_APPEND
        close_all(fds.values())
        assert "first-retrieve" in second.server.updates.status(0).steps_us
        await back(second, "empty")
        assert not following.incoming, "finished with the sessions"
        assert second.server.updates.status(0).state == "normal"


async def test_read_only_stays_so(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        memory = memfd(b"shared memory")
        os.fchmod(memory.fileno(), 0o600)
        reader, writer = read_only(memory, 7), OwnedFd(os.dup(memory.fileno()))
        alone = memfd(b"alone")
        await keep(first, "owner", {"reader": reader, "memory": memory, "alone": read_only(alone, 2)})
        alone.close()
        await keep(first, "other", {"same": writer})
        following = await jump(first)
    async with luod(following) as second:
        owner, other = await back(second, "owner"), await back(second, "other")
        access = {name: fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE for name, fd in {**owner, **other}.items()}
        assert access == {"reader": os.O_RDONLY, "memory": os.O_RDWR, "alone": os.O_RDONLY, "same": os.O_RDWR}
        assert [os.lseek(owner[name].fileno(), 0, os.SEEK_CUR) for name in ("reader", "memory", "alone")] == [7, 0, 2]
        assert stat.S_IMODE(os.fstat(owner["memory"].fileno()).st_mode) == 0o600
        os.pwrite(other["same"].fileno(), b"SHARED", 0)
        assert os.pread(owner["reader"].fileno(), 6, 0) == b"SHARED"
        close_all([*owner.values(), *other.values()])


async def test_who_asked_to_be_told_is_told_by_a_successor_too(kernel: KernelStandin) -> None:
    async with luod(kernel) as first, aio.serialize("told", notices=True, runtime_dir=first.directory) as session:
        ((_, (*_, (live, fds))),) = first.server.connections()
        assert isinstance(live, LiveConnection)
        successors = revive(first.server, live, OwnedFd(os.dup(fds[0])), None)
        assert successors.client.notices
        successors.tell(m.Notice(seq=0, what="prepare", deadline=1.0))
        assert await session.notice() == m.Notice(seq=0, what="prepare", deadline=1.0)
        close_all(successors.take_fds())


async def test_a_successor_still_tells_what_came_of_the_last_update(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        assert first.server.last_update is None
        await keep(first, "s", {"e": memfd(b"told")})
        following = await jump(first)
    async with luod(following) as second:
        last, told = second.server.last_update, second.server.updates.status(0)
        close_all((await back(second, "s")).values())
    assert last is not None
    async with luod(KernelStandin()) as successor:
        successor.server.updates.inherit(last)
        tells = successor.server.updates.status(0)
        assert (tells.arrived, tells.lost, tells.left_behind) == (1, (), ())
        assert {**told.steps_us, **tells.steps_us} == tells.steps_us


async def test_two_updates_in_a_row(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        await keep(first, "s", {"e": memfd(b"twice")})
        second_kernel = await jump(first)
    async with luod(second_kernel) as second:
        third_kernel = await jump(second)
        assert "finish " + next(name for name in third_kernel.incoming if name != "luod-index") in second_kernel.calls
    async with luod(third_kernel) as third:
        assert third.server.generation == 3
        fds = await back(third, "s")
        assert os.pread(fds["e"].fileno(), 10, 0) == b"twice"
        close_all(fds.values())


async def check_event_goes_on(following: KernelStandin, name: str) -> None:
    """In the next kernel the session `name` has its eventfd of 7."""
    async with luod(following) as second:
        fds = await back(second, name)
        assert os.eventfd_read(fds["event"].fileno()) == 7
        close_all(fds.values())


async def test_what_a_later_kernel_has_learned_travels_and_is_promised(kernel: KernelStandin) -> None:
    kernel.learned = ("anon_inode:[eventfd]",)
    async with luod(kernel) as first:
        async with aio.control(runtime_dir=first.directory) as control:
            matrix = {row.sort: row for row in (await control.capabilities()).matrix}
        assert matrix["eventfd"].survives["kexec"] == ""
        assert matrix["timerfd"].survives["kexec"] == "this kernel can't carry fds of this kind"
        finalized = await keep(first, "learned", {"event": OwnedFd(os.eventfd(7)), "memory": memfd(b"7")}, ("kexec",))
        assert "kexec" in finalized.survives
        async with aio.control(runtime_dir=first.directory) as control:
            assert (await control.preflight()).cannot == {}
        following = await jump(first)
    await check_event_goes_on(following, "learned")


async def test_what_a_module_teaches_the_kernel_later_travels_as_well(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        finalized = await keep(first, "early", {"event": OwnedFd(os.eventfd(7))})
        assert "kexec" not in finalized.survives
        async with aio.control(runtime_dir=first.directory) as control:
            assert len((await control.preflight()).cannot) == 1
            kernel.learned = ("anon_inode:[eventfd]",)
            assert (await control.preflight()).cannot == {}
        async with aio.deserialize(runtime_dir=first.directory) as connection:
            assert "kexec" in (await connection.show("early")).info.survives
        following = await jump(first)
    await check_event_goes_on(following, "early")


async def test_what_cannot_travel_is_refused_and_named(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        finalized = await keep(first, "mixed", {"event": OwnedFd(os.eventfd(0)), "memory": memfd(b"")})
        assert "kexec" not in finalized.survives
        assert finalized.entry_survives == {"memory": ("daemon-upgrade", "kexec")}
        with pytest.raises(Refusal, match="kexec: eventfd: this kernel can't carry fds of this kind"):
            await keep(first, "demanding", {"event": OwnedFd(os.eventfd(0))}, ("kexec",))
        async with aio.control(runtime_dir=first.directory) as control:
            report = await control.preflight()
            assert [(text.split(",")[0], why.split(":")[0]) for text, why in report.cannot.items()] == [
                ("session 'mixed' of uid " + str(os.geteuid()), "entry 'event'")
            ]
            with pytest.raises(Refusal, match=r"session 'mixed' of uid .*entry 'event'") as caught:
                await control.prepare(deadline_s=NO_WAIT)
            assert caught.value.code is Code.CANNOT_SURVIVE
            with pytest.raises(Refusal, match="no session 'mxed'"):
                await control.prepare(deadline_s=NO_WAIT, leave_behind=["mxed"])
            await control.prepare(deadline_s=NO_WAIT, leave_behind=["mixed"])
        status = await first.until("prepared")
        assert (status.carried, len(status.left_behind)) == (0, 1)


async def test_what_is_a_newer_luods_is_in_the_way_and_named_when_it_is_left(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        first.server.adopt_opaque(Opaque(box=memfd(b"of a newer luod"), stored=""))
        async with aio.control(runtime_dir=first.directory) as control:
            ((text, why),) = (await control.preflight()).cannot.items()
            assert (text, "upgrade luod first" in why) == ("1 sessions of a newer luod", True)
            with pytest.raises(Refusal, match=r"luod holds 1 sessions of a newer luod: .* or say --force"):
                await control.prepare(deadline_s=NO_WAIT)
            assert (await prepared(first, force=True)).left_behind == ("1 sessions of a newer luod",)
            await control.cancel_update()
        close_all(each.box for each in first.server.store.opaque)


def refuse(call: str, number: int = errno.ENOMEM, *, nth: int = 1) -> Callable[[str], None]:
    """Answer the `nth` call that begins so with an error."""
    seen = 0

    def fault(made: str) -> None:
        nonlocal seen
        seen += made.startswith(call)
        if made.startswith(call) and seen == nth:
            raise LiveUpdateFault(f"{made}: no memory", number)

    return fault


@pytest.mark.parametrize(
    ("call", "nth"), [("create", 1), ("create", 3), ("preserve", 1), ("preserve", 130), ("preserve", 132), ("open", 1), ("open", 2)]
)
async def test_a_refusing_kernel_leaves_everything_as_it_was(kernel: KernelStandin, call: str, nth: int) -> None:
    async with luod(kernel) as first:
        await keep(first, "many", {f"e{number}": memfd(b"") for number in range(130)})
        await keep(first, "more", {"e": memfd(b"")})
        kernel.fault = refuse(call, nth=nth)
        async with aio.control(runtime_dir=first.directory) as control:
            await control.prepare(deadline_s=NO_WAIT)
            status = await first.until("normal")
            assert "no memory" in status.reason
            assert not kernel.preserved()
            kernel.fault = lambda _: None
            await control.prepare(deadline_s=NO_WAIT)
        assert (await first.until("prepared")).carried == 2


async def test_a_freeze_that_the_kernel_refuses_can_be_tried_again(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        await prepared(first)
        kernel.fault = refuse("preserve luod-index")
        async with aio.control(runtime_dir=first.directory) as control:
            with pytest.raises(Refusal, match="can't be frozen"):
                await control.freeze()
            assert "luod-index" not in kernel.outgoing
            assert (await control.freeze()).state == "frozen"


async def test_a_kernel_without_live_update(kernel: KernelStandin) -> None:
    kernel.is_there = False
    async with luod(kernel) as first, aio.control(runtime_dir=first.directory) as control:
        assert "no /dev/liveupdate" in (await control.capabilities()).survives["kexec"]
        with pytest.raises(Refusal, match="no /dev/liveupdate"):
            await control.prepare(deadline_s=NO_WAIT)
        assert (await control.update()).state == "normal"


async def test_frozen_nothing_changes(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        await keep(first, "s", {"e": memfd(b"")})
        await prepared(first)
        async with aio.deserialize(runtime_dir=first.directory) as connection, connection.claim("s") as claim:
            async with aio.control(runtime_dir=first.directory) as control:
                await control.freeze()
                for request in (claim.retrieve, claim.finish):
                    with pytest.raises(Refusal) as caught:
                        await request()
                    assert caught.value.code is Code.UPDATE_RUNNING
                kernel.calls.clear()
                assert (await control.capabilities()).survives["kexec"] == ""
                assert not [call for call in kernel.calls if call.startswith("create")], "it would travel"
                assert [each.session for each in await connection.list()] == ["s"]
                with pytest.raises(Refusal, match="an update of the kernel is frozen"):
                    await control.upgrade()
            status = await first.until("normal")
            assert status.reason == "whoever froze luod for the reboot ended without one"
            assert not kernel.preserved()
            await claim.finish()


async def test_a_prepared_session_ends_and_its_borrower_is_preserved_anew(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        memory = memfd(b"lent")
        await keep(first, "lender", {"e": OwnedFd(os.dup(memory.fileno()))})
        await keep(first, "borrower", {"e": memory})
        assert (await prepared(first)).carried == 2
        async with aio.deserialize(runtime_dir=first.directory) as connection:
            await connection.discard("lender")
        await first.until("prepared", carried=1)
        following = await frozen_and_gone(first)
    async with luod(following) as second:
        fds = await back(second, "borrower")
        assert os.pread(fds["e"].fileno(), 10, 0) == b"lent"
        close_all(fds.values())


async def frozen_and_gone(luod: Luod) -> KernelStandin:
    async with aio.control(runtime_dir=luod.directory) as control:
        await control.freeze()
        return luod.kernel.kexec()


async def test_clients_are_told_and_waited_for(kernel: KernelStandin) -> None:
    async with luod(kernel) as first, aio.control(runtime_dir=first.directory) as control:
        async with (
            aio.serialize("told", notices=True, runtime_dir=first.directory) as told,
            aio.serialize("untold", runtime_dir=first.directory) as untold,
        ):
            await control.prepare(deadline_s=LIMIT_S)
            notice = await told.notice()
            assert notice is not None
            assert notice.what == "prepare"
            assert notice.deadline > 0
            with pytest.raises(Refusal, match="an update of the kernel is prepared"):
                async with aio.serialize("late", runtime_dir=first.directory):
                    pytest.fail("it was opened")
            with memfd(b"late") as fd:
                await told.preserve({"late": fd.fileno()})
            await told.finalize(require={"kexec"})
            assert (await control.update()).state == "preparing", "one is still open"
            await untold.cancel()
        status = await first.until("prepared")
        assert (status.carried, status.left_behind) == (1, ())
        assert (await control.cancel_update("not today")).state == "normal"
        assert (await control.update()).reason == "not today"
        assert not kernel.preserved()


async def test_a_session_that_is_open_past_the_deadline_is_left_behind(kernel: KernelStandin) -> None:
    async with luod(kernel) as first:
        async with aio.serialize("open", notices=True, runtime_dir=first.directory) as session:
            status = await prepared(first)
            assert status.left_behind == (f"session 'open' of uid {os.geteuid()}",)
            async with aio.control(runtime_dir=first.directory) as control:
                await control.cancel_update()
            seen = [await session.notice(), await session.notice()]
            assert [each.what for each in seen if each is not None] == ["prepare", "cancelled"]
            await prepared(first)
            with memfd(b"") as fd:
                await session.preserve({"e": fd.fileno()})
            await session.finalize()
        await first.until("prepared", carried=1)
        following = await frozen_and_gone(first)
    async with luod(following) as second:
        assert second.server.updates.status(0).arrived == 1


async def test_one_that_is_finalized_late_and_cannot_travel_ends_the_preparation(kernel: KernelStandin) -> None:
    async with luod(kernel) as first, aio.control(runtime_dir=first.directory) as control:
        async with aio.serialize("late", runtime_dir=first.directory) as session:
            await control.prepare(deadline_s=LIMIT_S)
            with OwnedFd(os.eventfd(0)) as fd:
                await session.preserve({"e": fd.fileno()})
            await session.finalize()
        assert "session 'late'" in (await first.until("normal")).reason


async def test_a_session_that_does_not_come_is_told(kernel: KernelStandin, caplog: pytest.LogCaptureFixture) -> None:
    async with luod(kernel) as first:
        await keep(first, "good", {"e": memfd(b"good")})
        await keep(first, "bad", {"e": memfd(b"bad")})
        following = await jump(first)
    bad = sorted(name for name in following.incoming if name != "luod-index")
    following.fault = refuse(f"retrieve {bad[0]} 1", errno.EIO)
    async with luod(following) as second:
        status = second.server.updates.status(0)
        assert status.arrived == 1
        assert len(status.lost) == 1
        assert "no memory" in status.lost[0]
        assert "is lost" in caplog.text
    following.close()


@pytest.mark.parametrize("what", ["retrieve luod-index 0", "open"])
def test_an_index_that_cannot_be_had(what: str) -> None:
    kernel = KernelStandin()
    with memfd(b"no index") as fd:
        session = kernel.opening(patience_s=0).create("luod-index")
        kernel.is_open = False
        session.preserve(fd.fileno(), 0)
    following = kernel.kexec()
    following.fault = refuse(what, errno.EACCES)
    arrival: Arrival | None = None
    with suppress(LiveUpdateFault):
        arrival = unload(collect(following.opening), "boot")
    assert arrival is None
    following.close()


def test_a_kernel_session_has_128_fds() -> None:
    assert [succession.parts_of(entries) for entries in (0, 127, 128, 255, 256)] == [1, 1, 2, 2, 3]
