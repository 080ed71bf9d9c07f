"""The service manager's store of fds: FDSTORE=1 of sd_notify(3), made sure of.

Theory. What lies in the store outlives this process: after a crash or a restart the manager passes it to the next one (`luod.activation`).
But the manager says nothing: a store that is full, or a sender that it doesn't listen to, and the fd is dropped without a word, BARRIER or
not. So behind each fd a *witness* is sent, the end of a pipe. The store is filled in order: when the manager has kept the witness, which
shows at the pipe's other end, it has kept the fd as well. The witness is then removed again. Nothing needs to be known of the manager's
limit, though where it is known it is heeded first, for a refusal that says the number.

Happy path: `put(name, fd)` returns when the manager holds the fd; `remove(name)` when it doesn't any more.

Unhappy paths:
1. The store is full, or its unit has none (FileDescriptorStoreMax=0, the default), or the manager doesn't take this process for the
   service's main process: `NotKept`, and what may have been kept is removed again. So it is when no more names fit: the next luod gets all
   of them in one variable, and the kernel lets none be longer than 32 pages (execve(2)).
2. The manager doesn't answer: `ManagerFault`; what was sent is undone behind it, for it may take both later.
3. Nothing shows whether a removal was listened to. Where no witness was ever kept one is sent first: `ManagerFault` when that isn't kept.
   So it is for a successor whose predecessor died before the manager knew of it; the manager is about to end it.

Invariants: one operation at a time, so that the witness speaks for one fd. A name is put once. Names hold no `:`, which systemd drops.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import trio

from luod.notify import Manager, ManagerFault, hung_up, pipe
from luod_protocol.errors import LuodError

WITNESS: Final = "luod-witness"
SPARE: Final = 1
"""Places that an operation needs besides its own: the witness's."""


NAMES_BYTES: Final = 120 * 1024
"""What all names may take in $LISTEN_FDNAMES, which ends at 128 KiB."""


class NotKept(LuodError):
    """The manager did not keep a fd."""


class FdStore:
    """The store of one manager.

    Args:
        manager: whose store it is.
        names: what is in it already.
        is_heard: whether the manager is known to listen to this process.
    """

    def __init__(self, manager: Manager, names: Collection[str], *, is_heard: bool = False) -> None:
        self._manager: Final = manager
        self._is_heard = is_heard
        self._names = set(names)
        self._bytes = sum(map(_weight, self._names))
        self._turn = trio.Lock()

    @property
    def count(self) -> int:
        """How many fds are stored."""
        return len(self._names)

    @property
    def names(self) -> frozenset[str]:
        """What is stored."""
        return frozenset(self._names)

    async def put(self, name: str, fd: int) -> None:
        """Return when the manager holds the borrowed `fd` as `name`. Cancelled: it may hold it or not.

        Raises:
            NotKept: unhappy path 1.
            ManagerFault: unhappy path 2.
        """
        async with self._turn:
            limit = self._manager.info.store_limit
            if limit and self.count + 1 + SPARE > limit:
                raise NotKept(f"the store of {self._manager.info.name} has room for {limit} fds and luod has {self.count} there")
            if self._bytes + _weight(name) > NAMES_BYTES:
                raise NotKept(
                    f"luod has {self.count} fds in the store of {self._manager.info.name}, whose names fill what can be passed on"
                )
            kept = False
            try:
                kept = await self._put(name, fd)
            finally:
                if not kept:
                    await self._undo(f"FDNAME={name}")
            self._note(name)

    def _note(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            self._bytes += _weight(name)

    async def _put(self, name: str, fd: int) -> bool:
        await self._manager.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
        if not await self._witnessed():
            raise NotKept(
                f"the store of {self._manager.info.name} took nothing more: it is full, has no room at all "
                "(FileDescriptorStoreMax= of the unit), or does not listen to this process"
            )
        return True

    async def _witnessed(self) -> bool:
        ours, theirs = pipe()
        with ours:
            with theirs:
                await self._manager.tell("FDSTORE=1", f"FDNAME={WITNESS}", "FDPOLL=0", fds=[theirs.fileno()])
            try:
                await self._manager.barrier()
                kept = not hung_up(ours)
            finally:
                await self._undo(f"FDNAME={WITNESS}")
        self._is_heard |= kept
        return kept

    async def _undo(self, field: str) -> None:
        # Behind what it undoes, also when this is cancelled: the manager takes both or neither.
        with trio.CancelScope(shield=True):
            try:
                await self._manager.tell("FDSTOREREMOVE=1", field)
            except ManagerFault:
                return

    async def remove(self, name: str) -> None:
        """Return when the manager has let go of what it holds as `name`, perhaps nothing.

        Raises:
            ManagerFault: unhappy paths 2, it may let go later, and 3.
        """
        async with self._turn:
            if not self._is_heard and not await self._witnessed():
                raise ManagerFault(f"{self._manager.info.name} does not take this process for the main process of the service")
            await self._manager.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
            await self._manager.barrier()
            if name in self._names:
                self._names.discard(name)
                self._bytes -= _weight(name)

    async def restore(self, name: str, fd: int) -> None:
        """After a `remove` that failed: have the manager hold `fd` again, behind the removal that it may not have taken yet."""
        async with self._turn:
            with trio.CancelScope(shield=True):
                await self._manager.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
                self._note(name)


def _weight(name: str) -> int:
    return len(name) + 1
