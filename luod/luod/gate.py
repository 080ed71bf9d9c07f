"""The gate through which every wait of a connection goes: how a daemon freezes and thaws.

Theory. A connection's task is either *outside*, waiting for its peer inside `Gate.wait` (a receive, or a send that its peer doesn't
read), or *inside*, working on a request. A freeze closes the gate: waits are cancelled and stay parked, work goes on to its end. When
nobody is inside any more, nothing in the daemon moves. Opening the gate starts the parked waits again.

A cancelled wait has had no effect: trio's recvmsg and sendmsg are atomic towards cancellation, and a packet is received or sent whole.

Happy path: `close()`, then `still()` returns when all are parked, then the handover, then `open()` (or the process ends).

Unhappy paths:
1. A piece of work doesn't end: `still()` goes on waiting; its caller bounds it and opens the gate again.
2. The task itself is cancelled (shutdown): the cancellation passes through.

Invariants: a task is counted inside, or has a wait under way, or is parked at the closed gate; never two of these, and the change from
one to the next has no checkpoint in between.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import trio

T = TypeVar("T")


class Gate:
    """See the module's text."""

    def __init__(self, *, is_open: bool) -> None:
        self._inside = 0
        self._is_open = trio.Event()
        if is_open:
            self._is_open.set()
        self._still = trio.Event()
        self._waits: set[trio.CancelScope] = set()

    @contextmanager
    def working(self) -> Generator[None, None, None]:
        """Everything that a task does, waits included."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._settle()

    async def wait(self, operation: Callable[[], Awaitable[T]]) -> T:
        """`await operation()`, begun again after each freeze. It must have no effect when it is cancelled."""
        self._inside -= 1
        try:
            while True:
                while not self._is_open.is_set():
                    self._settle()
                    await self._is_open.wait()
                with trio.CancelScope() as scope:
                    self._waits.add(scope)
                    try:
                        return await operation()
                    finally:
                        # Not settled here: a wait that came to its end just before the freeze goes on inside.
                        self._waits.discard(scope)
        finally:
            self._inside += 1

    @property
    def inside(self) -> int:
        """How many tasks are at work."""
        return self._inside

    def close(self) -> None:
        """Cancel all waits and let none begin."""
        self._is_open = trio.Event()
        self._still = trio.Event()
        for scope in self._waits:
            scope.cancel()
        self._settle()

    async def still(self) -> None:
        """Return when nobody is inside any more. Cancelling it changes nothing."""
        await self._still.wait()

    def open(self) -> None:
        """Let the waits go on."""
        self._is_open.set()

    def _settle(self) -> None:
        if not self._inside and not self._waits:
            self._still.set()
