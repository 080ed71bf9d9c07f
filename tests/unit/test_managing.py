"""What the service manager is told of luod, over its real socket, on a clock that doesn't wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from luod.custody import Storing
from luod.managing import LEAST_S, REPORT_S, Managing
from luod.notify import SUPERVISOR, SYSTEMD, ManagerInfo
from luod.survival import ALONE, Survives
from standin_manager import StandinManager, standin_manager
from unit.test_quota import custody_of


def told(there: StandinManager, field: str) -> list[str]:
    """What it was told as this field."""
    return [each[field] for each in there.told if field in each]


async def test_ready_is_said_again_until_it_can_be_said(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    address = str(tmp_path / "notify")
    managing = Managing(ManagerInfo(name=SYSTEMD, address=address), custody_of(), 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: managing.begin(others=(), leaving=(), is_main=True))
        nursery.start_soon(managing.report)
        # Nobody is there; it isn't gone, as systemd never is.
        await trio.sleep(20 * LEAST_S)
        assert sum("can't be told" in each.message for each in caplog.records if each.name == "luod") == 2, "one of them is the keeper's"
        there = StandinManager(address, 16)
        nursery.start_soon(there.run)
        await trio.sleep(2 * LEAST_S)
        assert told(there, "READY") == ["1"]
        assert told(there, "STATUS") == ["generation 3: 0 sessions preserved, 0 fds"]
        nursery.cancel_scope.cancel()
    managing.close()
    there.close()


async def test_changes_are_told_but_not_each(autojump_clock: trio.testing.MockClock) -> None:
    async with standin_manager() as (there, _):
        managing = Managing(there.info, custody_of(), 1)
        async with trio.open_nursery() as nursery:
            await managing.begin(others=(), leaving=(), is_main=True)
            nursery.start_soon(managing.report)
            await trio.sleep(LEAST_S / 2)
            assert len(told(there, "STATUS")) == 1
            for _ in range(100):
                managing.note_change()
                await trio.sleep(LEAST_S / 100)
            assert len(told(there, "STATUS")) == 2
            await trio.sleep(LEAST_S)
            assert len(told(there, "STATUS")) == 3
            await trio.sleep(REPORT_S - 2 * LEAST_S)
            assert len(told(there, "STATUS")) == 3
            await trio.sleep(2 * LEAST_S)
            assert len(told(there, "STATUS")) == 4
            assert told(there, "WATCHDOG") == ["1"] * 4
            assert told(there, "READY") == ["1"]
            nursery.cancel_scope.cancel()
        managing.close()


async def test_the_watchdog_is_told_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with standin_manager() as (there, _):
        managing = Managing(ManagerInfo(name=SYSTEMD, address=there.info.address, watchdog_us=500_000), custody_of(), 1)
        async with trio.open_nursery() as nursery:
            await managing.begin(others=(), leaving=(), is_main=True)
            nursery.start_soon(managing.report)
            await trio.sleep(2.1)
            assert len(told(there, "WATCHDOG")) == 9
            nursery.cancel_scope.cancel()
        managing.close()


async def test_one_that_is_gone_is_told_nothing_more(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    custody = custody_of()
    managing = Managing(ManagerInfo(name=SUPERVISOR, address=str(tmp_path / "notify")), custody, 1)
    assert not custody.outlook.reasons[Survives.DAEMON_CRASH], "as the predecessor has found out"
    await managing.begin(others=(), leaving=(), is_main=True)
    await managing.report()
    assert managing.info is None
    assert "was killed" in custody.outlook.reasons[Survives.DAEMON_CRASH]
    assert (managing.stored, await managing.tell("STOPPING=1")) == (0, True)
    managing.close()


async def test_without_one_nothing_is_kept() -> None:
    custody = custody_of()
    managing = Managing(None, custody, 1)
    await managing.begin(others=(), leaving=(), is_main=True)
    await managing.begun()
    await managing.report()
    await managing.announce(os.getpid())
    assert await managing.perform(Storing(box=-1)) == ""
    assert custody.outlook is ALONE
    assert (managing.info, managing.stored, managing.others) == (None, 0, ())
    managing.close()
