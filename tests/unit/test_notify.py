"""Which manager this process has, and talking to it over its real socket."""

from __future__ import annotations

import os
import resource
import socket

import pytest
import trio
import trio.testing

from luod.notify import SUPERVISOR, SYSTEMD, Manager, ManagerFault, ManagerInfo, of_this_process, pipe, started_by_systemd

PID, PARENT = 100, 1
SERVICE = {"NOTIFY_SOCKET": "/run/systemd/notify", "SYSTEMD_EXEC_PID": "100"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SERVICE, ManagerInfo(name=SYSTEMD, address="/run/systemd/notify")),
        ({"NOTIFY_SOCKET": "@abstract", "LISTEN_PID": "100"}, ManagerInfo(name=SYSTEMD, address="@abstract")),
        (
            {**SERVICE, "WATCHDOG_PID": "100", "WATCHDOG_USEC": "3000000", "FDSTORE": "512"},
            ManagerInfo(name=SYSTEMD, address="/run/systemd/notify", watchdog_us=3_000_000, store_limit=512),
        ),
        (
            {"NOTIFY_SOCKET": "/n", "LUOD_SUPERVISOR": "1", "WATCHDOG_USEC": "9", "WATCHDOG_PID": "100"},
            ManagerInfo(name=SUPERVISOR, address="/n", watchdog_us=9),
        ),
        ({**SERVICE, "WATCHDOG_USEC": "soon", "FDSTORE": "-1"}, ManagerInfo(name=SYSTEMD, address="/run/systemd/notify")),
        # A shell inside some service, and whatever is started there, inherit that service's variables.
        ({"NOTIFY_SOCKET": "/run/systemd/notify", "SYSTEMD_EXEC_PID": "99", "WATCHDOG_PID": "99"}, None),
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, None),
        ({"NOTIFY_SOCKET": "/n", "LUOD_SUPERVISOR": "2"}, None),
        ({"NOTIFY_SOCKET": "vsock:2:1234", "SYSTEMD_EXEC_PID": "100"}, None),
        ({"NOTIFY_SOCKET": "", "SYSTEMD_EXEC_PID": "100"}, None),
    ],
)
def test_whose_manager_it_is(environ: dict[str, str], expected: ManagerInfo | None) -> None:
    assert of_this_process(environ, PID, PARENT) == expected


def test_a_unit_without_notify_was_started_by_systemd_all_the_same() -> None:
    assert started_by_systemd({"SYSTEMD_EXEC_PID": "100"}, PID)
    assert not started_by_systemd({"SYSTEMD_EXEC_PID": "1"}, PID)
    assert not started_by_systemd({}, PID)


async def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(b"\0luod-test-%d" % os.getpid())
        here = Manager(ManagerInfo(name=SYSTEMD, address=f"@luod-test-{os.getpid()}"))
        await here.tell("READY=1", "STATUS=well")
        assert there.recv(100) == b"READY=1\nSTATUS=well"
        here.close()


async def test_a_barrier_without_descriptors_waits_for_the_manager_all_the_same() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(b"\0luod-test-%d" % os.getpid())
        here = Manager(ManagerInfo(name=SYSTEMD, address=f"@luod-test-{os.getpid()}"))
        await here.tell("MAINPID=7")
        over: list[bytes] = []

        async def wait() -> None:
            await here.barrier()
            over.append(b"barrier")

        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                assert not over
                over.append(there.recv(100))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert over == [b"MAINPID=7", b"barrier"]
        here.close()


def test_a_pipe_that_can_not_be_had_is_a_fault_of_the_manager() -> None:
    """It ends what needs it, and not luod's part of a handover after the commit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(ManagerFault, match="Too many open files"):
            pipe()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
