"""Closing what clients sent: in threads, for it may never end.

Theory. close(2) asks the server of a FUSE file system, and waits for it in a way that no signal ends (fs/fuse/file.c, fuse_flush; so do the
last closes of files with locks or unwritten pages). Such a file need not be preserved: it comes with a packet that is refused, or lies in
the queue of a unix socket, luod's own connections among them. So everything that a client sent, and every connection, is closed here. Each
uid has threads of its own, and answers with its own connections for what hangs: nothing more is read from it while too much of what it sent
is waiting to be closed.

Happy path: `later`; or `close`, which returns when it is done.

Unhappy paths:
1. It takes long: after `CLOSE_S` whoever waits goes on, and it is said once on stderr. The closing goes on.
2. It never ends: four threads of that uid hang, and what it sends after that waits behind them, up to `room`.
3. No thread can be had: tried again every `AGAIN_S`.
4. The process ends meanwhile: `leave`. A thread that hangs in the kernel keeps the process, and its table of descriptors, from going away;
   so everything but what hangs is closed first, one by one, and others may take the process for gone (`succession.other.gone`).

Invariants: nothing here waits for a client on the event loop; one uid's closes wait for no other's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import attrs
import trio

from luod_protocol.fds import OwnedFd, close_all

T = TypeVar("T")

CLOSE_S: Final = 1.0
"""How long a reply waits for closes, in seconds. Less than what a freeze gives a request (`handover.freeze_s`)."""

AGAIN_S: Final = 1.0
"""How long until a thread is asked for again, in seconds."""

THREADS_PER_UID: Final = 4
"""Threads that do at the same time what may hang, for one uid."""

log = logging.getLogger("luod")


@attrs.frozen
class Closing:
    """fds that are to be closed, owned, and the uid that they are of."""

    uid: int
    fds: Sequence[OwnedFd] = ()

    def now(self) -> None:
        """Close them here, which may take for ever. For what luod made itself, and for tests."""
        close_all(self.fds)


NOTHING: Final = Closing(0)


class Hanging(Exception):
    """A call hasn't come back in time, and goes on."""


class Threads:
    """Threads for calls that may never come back, `THREADS_PER_UID` for each uid."""

    def __init__(self) -> None:
        self._limiters: dict[int, trio.CapacityLimiter] = {}

    async def run(self, uid: int, call: Callable[[], T]) -> T:
        """`call()` in a thread of `uid`'s. Cancelled: the thread goes on, or was not begun."""
        limiter = self._limiters.setdefault(uid, trio.CapacityLimiter(THREADS_PER_UID))
        try:
            while True:
                try:
                    return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True)
                except RuntimeError as error:  # "can't start new thread"
                    log.warning("%s for uid %d: %d are there", error, uid, threading.active_count())
                    await trio.sleep(AGAIN_S)
        finally:
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                self._limiters.pop(uid, None)

    async def run_within(self, uid: int, seconds: float, call: Callable[[], T]) -> T:
        """As `run`, for so many seconds at most.

        Raises:
            Hanging: it takes longer; it may still happen.
        """
        with trio.move_on_after(seconds):
            return await self.run(uid, call)
        raise Hanging


@attrs.define(eq=False)
class _Batch:
    closing: Closing
    size: int
    begun: bool = False
    over: trio.Event = attrs.field(factory=trio.Event)
    closed: threading.Event = attrs.field(factory=threading.Event)

    def close(self) -> None:
        self.begun = True
        try:
            close_all(self.closing.fds)
        except OSError as error:
            log.warning("closing a fd of uid %d: %s", self.closing.uid, error.strerror)
        finally:
            self.closed.set()


class Closer:
    """See the module's text.

    Args:
        nursery: for its tasks.
        threads: where it closes.
        most: fds of one uid that may wait to be closed before nothing more is read from it.
        exempt: uids for which that doesn't hold.
    """

    def __init__(self, *, nursery: trio.Nursery, threads: Threads, most: int, exempt: Iterable[int]) -> None:
        self.total = 0
        """fds that wait to be closed."""
        self._nursery: Final = nursery
        self._threads: Final = threads
        self._most: Final = most
        self._exempt: Final = frozenset(exempt)
        self._waiting: dict[int, int] = {}
        self._batches: dict[_Batch, None] = {}
        self._hanging: set[int] = set()
        self._done: Final = trio.lowlevel.ParkingLot()

    def later(self, closing: Closing) -> None:
        """Close fds whose closing nobody waits for."""
        if closing.fds:
            self._begin(closing)

    async def close(self, closing: Closing) -> None:
        """Close fds; returns when they are closed, or after `CLOSE_S`. Cancelled: they are closed all the same."""
        if closing.fds:
            batch = self._begin(closing)
            with trio.move_on_after(CLOSE_S):
                await batch.over.wait()

    def _begin(self, closing: Closing) -> _Batch:
        batch = _Batch(closing, len(closing.fds))
        self._batches[batch] = None
        self._waiting[closing.uid] = self._waiting.get(closing.uid, 0) + batch.size
        self.total += batch.size
        if not self._nursery.cancel_scope.cancel_called:
            self._nursery.start_soon(self._run, batch)
        return batch

    async def _run(self, batch: _Batch) -> None:
        uid = batch.closing.uid
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._complain, uid)
            await self._threads.run(uid, batch.close)
            nursery.cancel_scope.cancel()
        batch.over.set()
        del self._batches[batch]
        self.total -= batch.size
        self._waiting[uid] -= batch.size
        if not self._waiting[uid]:
            del self._waiting[uid]
            self._hanging.discard(uid)
        self._done.unpark_all()

    async def _complain(self, uid: int) -> None:
        await trio.sleep(CLOSE_S)
        self._say_that_it_hangs(uid)

    def _say_that_it_hangs(self, uid: int) -> None:
        if uid not in self._hanging:
            self._hanging.add(uid)
            log.warning(
                "closing what uid %d sent has taken more than %g s: a file server that doesn't answer? Others don't wait for it; "
                "kill the server, or abort it (/sys/fs/fuse/connections)",
                uid,
                CLOSE_S,
            )

    def has_room(self, uid: int) -> bool:
        """Whether more may come from `uid`."""
        return uid in self._exempt or self._waiting.get(uid, 0) < self._most

    async def room(self, uid: int) -> None:
        """Return when more may come from `uid`; without a checkpoint when it may now."""
        while not self.has_room(uid):
            await self._done.park()

    def leave(self, more: Iterable[Closing]) -> None:
        """The process ends: close what waits and `more`, each uid's in a thread of its own, for `CLOSE_S` in all. Not on a running event
        loop that anybody still needs."""
        rest: dict[int, list[OwnedFd]] = {}
        for closing in (*(batch.closing for batch in self._batches if not batch.begun), *more):
            rest.setdefault(closing.uid, []).extend(closing.fds)
        begun = [batch for batch in self._batches if batch.begun]
        self._batches = dict.fromkeys(begun)
        for uid, fds in rest.items():
            batch = _Batch(Closing(uid, fds), len(fds))
            self._batches[batch] = None
            threading.Thread(target=batch.close, daemon=True).start()
        deadline = time.monotonic() + CLOSE_S
        for batch in self._batches:
            if not batch.closed.wait(max(0.0, deadline - time.monotonic())):
                self._say_that_it_hangs(batch.closing.uid)

    def close_all_but_what_hangs(self) -> None:
        """Right before os._exit: let go of everything that isn't hanging, if something is."""
        hanging = [batch for batch in self._batches if not batch.closed.is_set()]
        if not hanging:
            return
        low = 0
        for fd in sorted(fd.fileno() for batch in hanging for fd in batch.closing.fds if not fd.closed):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
