"""What luod has its manager keep: the invariants of succession/keeping, with a manager that can fail at any moment."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from luod import manifest
from luod.notify import SUPERVISOR, Manager, ManagerInfo
from luod.session import Session
from luod.store import Ended, Opaque, Store
from luod.succession import ledger
from luod.succession.adoption import adopt
from luod.succession.keeping import Keeper
from luod.succession.ledger import LedgerFault
from luod.survival import Survives
from luod.system import Process
from luod_protocol import box as boxes
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import close_all, duplicate
from standin_manager import StandinManager, standin_manager
from things import same_file
from unit.test_adoption import BOOT, ID, stored_box


@asynccontextmanager
async def keeping(limit: int = 16) -> AsyncGenerator[tuple[StandinManager, Keeper, Store]]:
    """A keeper of generation 5 that has begun, its manager, and the sessions."""
    async with standin_manager(limit) as (there, _):
        store = Store()
        keeper = Keeper(manager=Manager(there.info), generation=5, store=store)
        try:
            await keeper.begin(others=(), leaving=(), is_main=True)
            yield there, keeper, store
        finally:
            keeper.close()


def ended(name: str) -> Ended:
    return Ended(session_id=ID[name], owner=1000, finished=True)


def next_luod(there: StandinManager) -> tuple[list[str], list[Ended], dict[str, set[Process]]]:
    """What a luod that starts now would adopt: names of sessions, what ended, who has retrieved."""
    found = adopt([(name, duplicate(fd.fileno())) for name, fd in there.stored], BOOT)
    names = [session.name for session in found.sessions]
    retrieved = {session.name: session.retrieved_by for session in found.sessions}
    for session in found.sessions:
        close_all(session.take_fds())
    return names, found.ended, retrieved


async def test_kept_retrieved_and_forgotten() -> None:
    process = Process(pid=os.getpid(), start=1)
    async with keeping() as (there, keeper, _):
        assert keeper.fault == ""
        assert there.names == ["luod-ledger-5"]
        with stored_box("one") as (_, box):
            assert await keeper.keep(box.fileno()) == "b0"
            assert "b0" in there.names
            await keeper.note_retrieval(ID["one"], process)
            assert next_luod(there) == (["one"], [], {"one": {process}})
            await keeper.forget(ended("one"), box.fileno(), "b0")
        assert "b0" not in there.names
        assert next_luod(there) == ([], [ended("one")], {})
        assert keeper.others == ("luod-ledger-5",)


async def test_a_successor_that_may_have_served_counts() -> None:
    async with keeping() as (there, keeper, _):
        for _ in range(2):  # the second after a failed upgrade
            keeper.note_successor()
            assert adopt([(name, duplicate(fd.fileno())) for name, fd in there.stored], BOOT).generation == 6


async def test_a_unit_without_a_store_is_found_out_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    async with keeping(limit=0) as (there, keeper, _):
        assert "FileDescriptorStoreMax=" in keeper.fault
        assert "does not keep all that it should" in caplog.text
        reasons = keeper.outlook().reasons
        assert "FileDescriptorStoreMax=" in reasons[Survives.DAEMON_CRASH]
        assert reasons[Survives.DAEMON_UPGRADE] == ""
        with stored_box("one") as (_, box):
            assert await keeper.keep(box.fileno()) == ""
            await keeper.forget(ended("one"), box.fileno(), "")
        assert there.names == []


async def test_a_full_store_refuses_and_one_with_room_again_does_not() -> None:
    async with keeping(limit=3) as (there, keeper, _):
        with stored_box("one") as (_, one), stored_box("two") as (_, two):
            assert await keeper.keep(one.fileno())
            with pytest.raises(Refusal, match=r"it is full.*still open\. Finish or discard") as caught:
                await keeper.keep(two.fileno())
            assert caught.value.code is Code.LIMIT_REACHED
            await keeper.forget(ended("one"), one.fileno(), "b0")
            assert await keeper.keep(two.fileno())
        assert next_luod(there)[0] == ["two"]


async def test_a_manager_that_does_not_answer_keeps_what_was_there(autojump_clock: trio.testing.MockClock) -> None:
    async with keeping() as (there, keeper, _):
        with stored_box("one") as (_, one), stored_box("two") as (_, two):
            assert await keeper.keep(one.fileno())
            there.goes_on = trio.Event()
            with pytest.raises(Refusal, match="the session is as it was") as caught:
                await keeper.forget(ended("one"), one.fileno(), "b0")
            assert caught.value.code is Code.SYSTEM_ERROR
            with pytest.raises(Refusal, match="still open, try again"):
                await keeper.keep(two.fileno())
            there.goes_on.set()
            await keeper.manager.barrier()
            assert next_luod(there) == (["one"], [], {"one": set()})
            await keeper.forget(ended("one"), one.fileno(), "b0")
        assert next_luod(there) == ([], [ended("one")], {})


async def test_a_successor_that_the_manager_does_not_know_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Its predecessor died before it had told the manager: what isn't listened to must not be taken for done."""
    async with keeping() as (there, keeper, _):
        with stored_box("one") as (_, one):
            await keeper.keep(one.fileno())
            there.listens = False
            store = Store()
            store.add(Session.adopted(manifest.decode(boxes.manifest_of(one.fileno())), duplicate(one.fileno()), (), stored="b0"))
            successor = Keeper(manager=Manager(there.info), generation=6, store=store)
            try:
                await successor.begin(others=keeper.others, leaving=keeper.others, is_main=False)
                assert "does not keep all that it should" in caplog.text
                with pytest.raises(Refusal, match="does not take this process for the main process") as caught:
                    await successor.forget(ended("one"), one.fileno(), "b0")
                assert caught.value.code is Code.SYSTEM_ERROR
                await successor.manager.barrier()
                assert next_luod(there) == (["one"], [], {"one": set()})
            finally:
                successor.close()
                for session in store:
                    close_all(session.take_fds())


async def test_a_luod_that_dies_while_the_manager_forgets_has_ended_it(autojump_clock: trio.testing.MockClock) -> None:
    """The ledger is written first: the client was told nothing, and asks again by id."""
    async with keeping() as (there, keeper, _):
        with stored_box("one") as (_, one):
            assert await keeper.keep(one.fileno()) == "b0"
            there.goes_on = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.forget, ended("one"), one.fileno(), "b0")
                await trio.testing.wait_all_tasks_blocked()
                assert "b0" in there.names
                assert next_luod(there)[:2] == ([], [ended("one")])
                nursery.cancel_scope.cancel()


async def test_the_next_generation_begins_a_ledger_with_what_still_matters() -> None:
    process = Process(pid=7, start=8)
    async with keeping() as (there, keeper, store):
        with stored_box("one") as (_, one), stored_box("two") as (_, two):
            await keeper.keep(one.fileno())
            await keeper.keep(two.fileno())
            await keeper.note_retrieval(ID["one"], process)
            await keeper.forget(ended("two"), two.fileno(), "b1")
            found = adopt([(name, duplicate(fd.fileno())) for name, fd in there.stored], BOOT)
            for session in found.sessions:
                store.add(session)
            for each in found.ended:
                store.remember(each)
            following = Keeper(manager=Manager(there.info), generation=6, store=store)
            await following.begin(others=found.others, leaving=found.leaving, is_main=True)
            assert sorted(there.names) == sorted(["b0", "luod-ledger-6"])
            assert next_luod(there) == (["one"], [ended("two")], {"one": {process}})
            for session in store:
                close_all(session.take_fds())
            following.close()


async def test_what_was_finalized_without_a_store_is_stored_when_there_is_one() -> None:
    async with standin_manager() as (there, _):
        store = Store()
        with stored_box("one") as (name, box):
            found = adopt([(name, duplicate(box.fileno()))], BOOT)
            (session,) = found.sessions
            session.stored = ""
            store.add(session)
            keeper = Keeper(manager=Manager(there.info), generation=2, store=store)
            await keeper.begin(others=(), leaving=(), is_main=True)
            assert session.stored == "b0"
            assert next_luod(there)[0] == ["one"]
            close_all(session.take_fds())
            keeper.close()


async def test_a_retrieval_waits_until_it_can_be_written_down() -> None:
    """A successor's manager listens to its predecessor still: should both die now, the next luod must know who holds what."""
    process = Process(pid=os.getpid(), start=1)
    async with keeping() as (there, keeper, _):
        with stored_box("one") as (_, one):
            await keeper.keep(one.fileno())
        successor = Keeper(manager=Manager(there.info), generation=6, store=Store())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(successor.note_retrieval, ID["one"], process)
                await trio.testing.wait_all_tasks_blocked()
                assert nursery.child_tasks
                await successor.begin(others=keeper.others, leaving=keeper.others, is_main=False)
            assert next_luod(there) == (["one"], [], {"one": {process}})
        finally:
            successor.close()


async def test_a_long_ledger_is_begun_anew_and_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LONG_BYTES", 2000)
    async with keeping() as (there, keeper, store):
        with stored_box("one") as (name, box):
            session: Session
            (session,) = adopt([(name, duplicate(box.fileno()))], BOOT).sessions
            await keeper.keep(box.fileno())
            store.add(session)
            for number in range(500):
                process = Process(pid=number % 7 + 1, start=1)
                session.retrieved_by.add(process)
                await keeper.note_retrieval(ID["one"], process)
            size = os.fstat(there.fd("luod-ledger-5")).st_blocks * 512
            assert size < 64 * 1024
            assert next_luod(there)[2] == {"one": session.retrieved_by}
            close_all(session.take_fds())


async def test_a_ledger_that_can_not_be_written_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keeping() as (there, keeper, _):

        def full(_: object, __: object) -> None:
            raise LedgerFault("luod's ledger can't be written: No space left on device; try again")

        with stored_box("one") as (_, box):
            await keeper.keep(box.fileno())
            with monkeypatch.context() as patch:
                patch.setattr(ledger.Ledger, "write", full)
                with pytest.raises(Refusal, match="try again"):
                    await keeper.forget(ended("one"), box.fileno(), "b0")
                with pytest.raises(Refusal, match="try again"):
                    await keeper.note_retrieval(ID["one"], Process(pid=1, start=1))
            assert next_luod(there)[0] == ["one"]


async def test_names_are_short_and_used_again() -> None:
    """All names of a store must fit one environment variable of the next luod."""
    async with keeping() as (there, keeper, _):
        with stored_box("one") as (_, one), stored_box("two") as (_, two), stored_box("three") as (_, three):
            assert [await keeper.keep(each.fileno()) for each in (one, two)] == ["b0", "b1"]
            await keeper.forget(ended("one"), one.fileno(), "b0")
            assert await keeper.keep(three.fileno()) == "b0"
            assert next_luod(there)[0] == ["two", "three"]
        following = Keeper(manager=Manager(there.info), generation=6, store=Store())
        await following.begin(others=["b4", *there.names], leaving=(), is_main=True)
        with stored_box("one") as (_, one), stored_box("two") as (_, two), stored_box("three") as (_, three):
            assert [await following.keep(each.fileno()) for each in (one, two, three)] == ["b2", "b3", "b5"]
        following.close()


async def test_a_supervisor_that_was_killed_keeps_nothing_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    info = ManagerInfo(name=SUPERVISOR, address="/nowhere/notify")
    keeper = Keeper(manager=Manager(info), generation=1, store=Store())
    keeper.ready.set()
    with stored_box("one") as (_, box):
        assert await keeper.keep(box.fileno()) == ""
        await keeper.forget(ended("one"), box.fileno(), "b0")
    assert "was killed; start luod under a new one" in keeper.outlook().reasons[Survives.DAEMON_CRASH]
    assert caplog.text.count("will not survive a crash of luod any more") == 1
    keeper.close()


async def test_what_is_opaque_is_stored_and_what_was_opaque_is_a_session_now() -> None:
    async with keeping() as (there, _, store):
        following = Keeper(manager=Manager(there.info), generation=6, store=store)
        following.inherit(["b1", "b2"])
        assert set(following.others) == {"b1", "b2"}, "a successor may come before it has begun"
        with stored_box("one") as (_, one), stored_box("two") as (_, two), stored_box("three") as (_, three):
            read = manifest.decode(boxes.manifest_of(one.fileno()))
            store.add(Session.adopted(read, one, (), stored="b1"))
            store.opaque = [Opaque(box=two, stored="b2"), Opaque(box=three, stored="")]
            store.note_retrieval(b"somebody's", Process(pid=1, start=2))
            await following.begin(others=["b1", "b2"], leaving=(), is_main=True)
            assert set(following.others) == {"b2", "b0", "luod-ledger-6"}
            assert store.opaque[1].stored == "b0"
            assert same_file(there.fd("b0"), three.fileno())
            assert following.count == 4
            found = adopt([(name, duplicate(fd.fileno())) for name, fd in there.stored], BOOT)
            assert found.retrieved == {b"somebody's": {Process(pid=1, start=2)}}
            close_all(session.take_fds()[0] for session in found.sessions)
        following.close()
