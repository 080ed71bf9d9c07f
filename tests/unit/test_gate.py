"""The gate: what a freeze stops, what it waits for, and that nothing is lost by it."""

from __future__ import annotations

import random
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from luod.gate import Gate

FREEZES = 300
CLIENTS = 8
PATIENCE_S = 5.0
"""A gate that doesn't do what a test waits for has failed it after this long."""

T = TypeVar("T")


class Stillness:
    """Waits for `still` in a task, and says whether it has come."""

    def __init__(self, nursery: trio.Nursery, gate: Gate) -> None:
        self._gate = gate
        self._came = trio.Event()
        nursery.start_soon(self._wait)

    async def _wait(self) -> None:
        await self._gate.still()
        self._came.set()

    async def settled(self) -> bool:
        """Whether all is still, now that every task has got as far as it can."""
        await wait_all_tasks_blocked()
        return self._came.is_set()


async def bounded(wait: Callable[[], Awaitable[T]]) -> T:
    with trio.fail_after(PATIENCE_S):
        return await wait()


def pair() -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    left, right = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return left, right


async def test_without_work_all_is_still_at_once() -> None:
    gate = Gate(is_open=True)
    gate.close()
    await bounded(gate.still)


async def test_work_is_waited_for_and_goes_on(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    end, done = trio.Event(), trio.Event()

    async def task() -> None:
        with gate.working():
            await end.wait()
            done.set()

    nursery.start_soon(task)
    await wait_all_tasks_blocked()
    gate.close()
    still = Stillness(nursery, gate)
    assert not await still.settled()
    end.set()
    assert await still.settled()
    assert done.is_set()


async def test_a_wait_that_completed_just_before_the_close_goes_on_inside_and_is_waited_for(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    came, end = trio.Event(), trio.Event()
    steps: list[str] = []

    async def task() -> None:
        with gate.working():
            await gate.wait(came.wait)
            steps.append("working")
            await end.wait()
            steps.append("done")

    nursery.start_soon(task)
    await wait_all_tasks_blocked()
    # The wait is over here, though its task hasn't run yet.
    came.set()
    gate.close()
    still = Stillness(nursery, gate)
    assert not await still.settled()
    assert steps == ["working"]
    end.set()
    assert await still.settled()
    assert steps == ["working", "done"]


async def test_a_wait_that_failed_just_before_the_close_is_waited_for_too(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    came, end = trio.Event(), trio.Event()

    async def fail() -> None:
        await came.wait()
        raise BrokenPipeError

    async def task() -> None:
        with gate.working():
            with pytest.raises(BrokenPipeError):
                await gate.wait(fail)
            await end.wait()

    nursery.start_soon(task)
    await wait_all_tasks_blocked()
    came.set()
    gate.close()
    still = Stillness(nursery, gate)
    assert not await still.settled()
    end.set()
    assert await still.settled()


async def test_a_cancelled_receive_has_taken_nothing(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    received: list[bytes] = []
    sock = trio.socket.from_stdlib_socket(here)

    async def task() -> None:
        with gate.working():
            while True:
                received.append(await gate.wait(lambda: sock.recv(10)))

    with here, there:
        nursery.start_soon(task)
        await wait_all_tasks_blocked()
        # It is there, and the waiting task was not told yet.
        there.send(b"1")
        gate.close()
        await bounded(gate.still)
        there.send(b"2")
        await wait_all_tasks_blocked()
        assert received == []
        assert here.recv(10, socket.MSG_PEEK) == b"1"
        gate.open()
        await wait_all_tasks_blocked()
        assert received == [b"1", b"2"]
        nursery.cancel_scope.cancel()


async def test_a_cancelled_send_has_sent_nothing(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    sock = trio.socket.from_stdlib_socket(here)
    with here, there:
        queued = 0
        try:
            while True:
                here.send(b"filling")
                queued += 1
        except BlockingIOError:
            pass

        async def task() -> None:
            with gate.working():
                await gate.wait(lambda: sock.send(b"last"))

        nursery.start_soon(task)
        await wait_all_tasks_blocked()
        gate.close()
        await bounded(gate.still)
        assert [there.recv(10) for _ in range(queued)] == [b"filling"] * queued
        await wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            there.recv(10, socket.MSG_DONTWAIT)
        gate.open()
        await wait_all_tasks_blocked()
        assert there.recv(10, socket.MSG_DONTWAIT) == b"last"


async def test_a_wait_at_a_closed_gate_does_not_begin(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=False)
    begun: list[int] = []

    async def operation() -> None:
        begun.append(1)

    async def task() -> None:
        with gate.working():
            await gate.wait(operation)

    nursery.start_soon(task)
    await wait_all_tasks_blocked()
    assert not begun
    gate.open()
    await wait_all_tasks_blocked()
    assert begun == [1]


async def test_opening_and_closing_in_one_moment_leaves_all_parked(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    never = trio.Event()
    begun: list[int] = []

    async def operation() -> None:
        begun.append(1)
        await never.wait()

    async def task() -> None:
        with gate.working():
            await gate.wait(operation)

    nursery.start_soon(task)
    await wait_all_tasks_blocked()
    for _ in range(3):
        gate.close()
        await bounded(gate.still)
        gate.open()
        gate.close()
        await bounded(gate.still)
        await wait_all_tasks_blocked()
        assert begun == [1]
        gate.open()
        await wait_all_tasks_blocked()
        begun.pop()
    nursery.cancel_scope.cancel()


async def test_an_outer_cancellation_passes_through_and_leaves_the_counts_right(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    never = trio.Event()
    ended: list[str] = []

    async def task(name: str, scope: trio.CancelScope) -> None:
        with scope, gate.working():
            try:
                await gate.wait(never.wait)
            except trio.Cancelled:
                ended.append(name)
                raise

    waiting, parked, both = trio.CancelScope(), trio.CancelScope(), trio.CancelScope()
    nursery.start_soon(task, "waiting", waiting)
    await wait_all_tasks_blocked()
    waiting.cancel()
    await wait_all_tasks_blocked()
    assert ended == ["waiting"]

    nursery.start_soon(task, "parked", parked)
    nursery.start_soon(task, "both", both)
    await wait_all_tasks_blocked()
    gate.close()
    both.cancel()
    await bounded(gate.still)
    await wait_all_tasks_blocked()
    assert ended == ["waiting", "both"]
    parked.cancel()
    await wait_all_tasks_blocked()
    assert ended == ["waiting", "both", "parked"]
    gate.open()
    gate.close()
    await bounded(gate.still)


async def test_giving_up_on_stillness_changes_nothing(nursery: trio.Nursery) -> None:
    gate = Gate(is_open=True)
    end = trio.Event()

    async def task() -> None:
        with gate.working():
            await end.wait()

    nursery.start_soon(task)
    await wait_all_tasks_blocked()
    gate.close()
    with trio.move_on_after(0) as scope:
        await gate.still()
    assert scope.cancelled_caught
    end.set()
    await bounded(gate.still)


async def test_many_freezes_lose_and_double_nothing() -> None:
    gate = Gate(is_open=True)
    chance = random.Random(11)
    inside = 0
    answered: list[list[int]] = [[] for _ in range(CLIENTS)]
    stop = False

    async def serve(sock: trio.socket.SocketType) -> None:
        nonlocal inside
        with sock, gate.working():
            while True:
                request = await gate.wait(partial(sock.recv, 16))
                if not request:
                    return
                inside += 1
                for _ in range(chance.randrange(4)):
                    await trio.lowlevel.checkpoint()
                inside -= 1
                await gate.wait(partial(sock.send, request))

    async def ask(sock: trio.socket.SocketType, answers: list[int]) -> None:
        number = 0
        with sock:
            while not stop:
                # Two under way: one of them lies in the queue while the gate is closed.
                await sock.send(b"%d" % number)
                await sock.send(b"%d" % (number + 1))
                number += 2
                answers += [int(await sock.recv(16)), int(await sock.recv(16))]
            await sock.send(b"%d" % number)
            answers.append(int(await sock.recv(16)))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for answers in answered:
                theirs, ours = pair()
                nursery.start_soon(ask, theirs, answers)
                nursery.start_soon(serve, ours)
            for _ in range(FREEZES):
                for _ in range(chance.randrange(6)):
                    await trio.lowlevel.checkpoint()
                gate.close()
                await gate.still()
                assert inside == 0
                before = [len(answers) for answers in answered]
                for _ in range(3):
                    await trio.lowlevel.checkpoint()
                assert inside == 0
                # A client may still find an answer that was sent before, or two.
                assert all(len(answers) - count <= 2 for answers, count in zip(answered, before, strict=True))
                gate.open()
                seen = len(answered[0])
                while len(answered[0]) == seen:
                    await trio.lowlevel.checkpoint()
            stop = True
    for answers in answered:
        assert answers == list(range(len(answers)))
        assert len(answers) >= FREEZES // CLIENTS
