"""The old daemon's side of a handover: drives `old_table`.

Theory. The log is what makes the copy true: from the moment at which the copy begins, every change to the set of finalized sessions is sent
to the successor before the client is answered (`tell`), on the same ordered socket as the copy. So at any moment the successor has all that
was answered, and what a dead daemon had queued is still read.

Happy path: `run` waits until this daemon's own predecessor is gone, meets the successor, copies, freezes, sends what is live, and returns
when `serving` was read and the service manager, where there is one, knows the successor as the main process. The process then ends.

Unhappy paths: those of `old_table`. Each ends in `HandoverFailed`, after the gate is open again, the successor is gone, and everybody who
waited for it in `tell` goes on. A system call that fails, for a lack of memory or descriptors, ends the handover at once; but the queue is
read to its end all the same, for a commit may lie in it.

Invariants: what the successor can't carry is refused before the freeze; only receives are cancelled by the freeze; no step waits for a
client; each wait for the successor is bounded. A successor that failed is told so or killed before this daemon serves on: it never finds
the socket's end alone while this daemon may still die.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NoReturn, Protocol

import trio

from luod.changes import Change, Departure, Retrieval, Sealing
from luod.config import HandoverTable
from luod.gate import Gate
from luod.notify import ManagerFault, ManagerGone, ManagerInfo
from luod.session import Session
from luod.store import Ended, Store
from luod.succession.channel import Channel
from luod.succession.hearing import Hearing
from luod.succession.messages import (
    VERSIONS,
    Box,
    Copied,
    Frozen,
    Gone,
    Handover,
    LastUpdate,
    Meet,
    Offer,
    OpaqueBox,
    OpenSession,
    Retrieved,
    StagedEntries,
)
from luod.succession.old_table import OldEvent, OldState, step
from luod.succession.other import kill, reap, see_off
from luod.succession.skew import obstacles
from luod.system import System
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd, duplicate
from luod_protocol.limits import MAX_FDS_PER_PACKET
from luod_protocol.messages import Endpoint
from luod_protocol.version import RELEASE

STAGED_PER_PACKET = MAX_FDS_PER_PACKET - 1
"""One is left for the memfd of a packet that has to travel as bulk."""

BUG = "luod has a bug in its handover and logged it"

ANNOUNCE_AGAIN_S = 1.0
"""How long until a service manager that could not be told is told again, in seconds."""

LEAVE_S = 5.0
"""How long a successor that was told to leave may take before it is killed, in seconds."""


log = logging.getLogger("luod")


class HandoverFailed(LuodError):
    """The successor did not take over; this daemon serves as before."""


class Host(Protocol):
    """What a handover needs of the server."""

    gate: Gate
    door: Gate
    system: System
    generation: int
    directory: str

    @property
    def manager(self) -> ManagerInfo | None: ...

    @property
    def store(self) -> Store: ...

    @property
    def last_update(self) -> LastUpdate | None: ...

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None: ...

    @property
    def bound(self) -> tuple[Endpoint, ...]: ...

    def inheritance(self) -> tuple[tuple[str, ...], Sequence[int]]: ...

    def connections(self) -> Iterable[tuple[Session | None, Sequence[tuple[Handover, Sequence[int]]]]]: ...

    def speakers(self) -> Iterable[tuple[int, int]]: ...

    def stored_others(self) -> tuple[str, ...]: ...

    def tell_monitors(self, event: str, detail: str) -> None: ...

    def note_successor(self) -> None: ...

    async def settled(self) -> None: ...

    async def announce(self, pid: int) -> None: ...


class OldSide:
    """One attempt to hand over.

    Args:
        host: the server.
        channel: the socket to the successor; owned.
        successor: a pidfd of the successor; owned.
        bounds: how long each step may take.
    """

    def __init__(self, *, host: Host, channel: Channel, successor: OwnedFd, bounds: HandoverTable) -> None:
        self.state = OldState.SERVING
        self.fate = ""
        """How a failed successor that was a child of ours ended, for a person."""
        self._host = host
        self._channel = channel
        self._since_us = 0
        self._successor = successor
        self._bounds = bounds
        self._logging = False
        self._leaving = False
        self._settling = trio.CancelScope()
        self._over = trio.Event()
        self._offered: Sequence[Session] = ()
        self._hearing = Hearing(channel)

    # ------------------------------------------------------------------------------------------------------ the steps

    async def run(self) -> None:
        """Hand over. Returns when the successor serves.

        Raises:
            HandoverFailed: with the reason; everything is as before.
        """
        reason = "this daemon is stopping"
        try:
            await self._settle()
            self._step(OldEvent.SUCCESSOR_STARTED)
            self._host.start_soon(self._hearing.listen)
            meet = await self._meet()
            await self._copy(self._offered)
            # Once more, for clients went on, and open sessions and connections are not in the log.
            self._refuse_what_it_can_not_carry(meet)
            await self._freeze()
            await self._commit()
            await self._release(meet.pid)
        except HandoverFailed as failure:
            reason = str(failure)
            raise
        except OSError as error:
            reason = f"luod can't hand over: {error.strerror}"
            raise HandoverFailed(reason) from error
        except Exception as bug:
            reason = BUG
            log.exception(BUG)
            raise HandoverFailed(BUG) from bug
        finally:
            if self.state in (OldState.FROZEN, OldState.DRAINING, OldState.REPLACED, OldState.RELEASED):
                # Replaced; or this process is ending in the middle, and its successor will find it dead and serve.
                self._channel.close()
                self._successor.close()
            else:
                self._leaving, self._logging = self._logging, False
                if not self._channel.close(reason):
                    # It would take the end of the socket for this daemon's death, should that come before its own, and serve what it has.
                    kill(self._successor.fileno())
                self._host.gate.open()
                self._host.door.open()
                gc.enable()
                with trio.CancelScope(shield=True):
                    await self._see_off()
            self._over.set()

    async def _settle(self) -> None:
        # A successor looks after its predecessor's end, and knows of no other; and the manager takes a main process from the last one only.
        with self._settling:
            await self._host.settled()
        if self._settling.cancelled_caught:
            raise HandoverFailed("this luod was told to stop")

    async def _meet(self) -> Meet:
        """Returns who the successor is. What is finalized now is to be copied; all that changes from the same moment on is in the log."""
        event, meet = await self._next(self._bounds.meet_s, "the successor did not say who it is")
        if event is not OldEvent.ACCEPTED or not isinstance(meet, Meet):
            self._fail(event, meet)
        self._refuse_what_it_can_not_carry(meet)
        self._step(OldEvent.ACCEPTED)
        self._logging = True
        self._offered = [session for session in self._host.store if session.sealed is not None]
        endpoints, fds = self._host.inheritance()
        offer = Offer(
            luod=RELEASE,
            pid=os.getpid(),
            handover=VERSIONS.common(meet.handover) or 0,
            generation=self._host.generation,
            directory=self._host.directory,
            endpoints=endpoints,
            bound=self._host.bound,
            ended=tuple(self._host.store.all_ended),
            manager=self._host.manager,
            last_update=self._host.last_update,
        )
        try:
            pidfd = OwnedFd(os.pidfd_open(os.getpid()))
        except OSError as error:
            self._fail(OldEvent.LATE, _cannot(error))
        with pidfd:
            await self._send(offer, [*fds, pidfd.fileno()])
        return meet

    def _refuse_what_it_can_not_carry(self, meet: Meet) -> None:
        missing = obstacles(meet, sessions=self._host.store, speakers=self._host.speakers())
        if missing:
            self._fail(OldEvent.DECLINED, f"luod {meet.luod:.64} can't carry what is held here: {'; '.join(missing)}")

    async def _copy(self, finalized: Sequence[Session]) -> None:
        for session in finalized:
            try:
                await self._send_box(session, self._send)
            except OSError as error:  # no descriptor for a duplicate
                self._fail(OldEvent.LATE, _cannot(error))
        for opaque in self._host.store.opaque:
            await self._send(OpaqueBox(stored=opaque.stored), [opaque.box.fileno()])
        for session_id, processes in self._host.store.retrieved.items():
            for process in processes:
                await self._send(Retrieved(session_id=session_id, process=process))
        await self._send(Copied())
        event, said = await self._next(self._bounds.copy_s, "the successor did not verify what it was sent")
        if event is not OldEvent.VERIFIED:
            self._fail(event, said)
        self._step(event)

    async def _freeze(self) -> None:
        self._host.tell_monitors("freezing", f"generation {self._host.generation}")
        # First the door, where nobody waits for an answer: less is left to be done in the pause.
        self._host.door.close()
        await self._host.door.still()
        gc.disable()
        self._since_us = self._host.system.monotonic_us()
        self._host.gate.close()
        with trio.move_on_after(self._bounds.freeze_s) as scope:
            await self._host.gate.still()
        if scope.cancelled_caught:
            self._fail(OldEvent.LATE, f"a request was still being worked on {self._bounds.freeze_s:g} s after the freeze")
        self._step(OldEvent.ALL_PARKED)

    async def _commit(self) -> None:
        event: OldEvent = OldEvent.LATE
        said: Handover | str = f"the successor did not serve within {self._bounds.commit_s:g} s after the freeze"
        with trio.move_on_after(self._bounds.commit_s):
            try:
                try:
                    await self._send_live()
                except OSError as error:
                    self._unsent(error)
                event, said = await self._hearing.next()
            except Exception:
                # Frozen: whatever it is, there is one way back.
                event, said = OldEvent.DECLINED, BUG
                log.exception(BUG)
        if event in (OldEvent.ACCEPTED, OldEvent.VERIFIED):
            event, said = OldEvent.DECLINED, f"the successor sent {event} out of order"
        self._step(event)
        if event is OldEvent.SERVING_READ:
            return
        self._channel.deafen()
        # The listener reads on to the end of the queue, which can't grow any more.
        await self._hearing.deaf()
        found = OldEvent.SERVING_READ if self._hearing.has_heard_serving else OldEvent.QUEUE_EMPTY
        self._step(found)
        if found is OldEvent.QUEUE_EMPTY:
            raise HandoverFailed(f"after the freeze: {said}")

    async def _send_live(self) -> None:
        self._host.note_successor()
        connections = 0
        for session, messages in self._host.connections():
            if session is not None and session.sealed is None:
                await self._send_open(session)
            for message, fds in messages:
                await self._channel.send_fast(message, fds)
            connections += 1
        await self._channel.send_fast(
            Frozen(
                since_us=self._since_us,
                connections=connections,
                sessions=len(self._host.store),
                opaque=len(self._host.store.opaque),
                stored_others=self._host.stored_others(),
            )
        )

    async def _send_open(self, session: Session) -> None:
        await self._channel.send_fast(
            OpenSession(
                session_id=session.session_id,
                name=session.name,
                owner=session.owner,
                metadata=session.metadata,
                opened_at=session.opened_at,
                entries=session.size,
            )
        )
        staged = list(session.staged.values())
        for start in range(0, len(staged), STAGED_PER_PACKET):
            part = staged[start : start + STAGED_PER_PACKET]
            await self._channel.send_fast(StagedEntries(entries=tuple(each.entry for each in part)), [each.fd.fileno() for each in part])

    async def _release(self, successor: int) -> None:
        """Returns when this process may end. The successor serves: whatever goes wrong here, this process serves no more, and the successor
        ends it when it takes too long."""
        while True:
            try:
                await self._host.announce(successor)
                break
            except ManagerGone:
                break
            except (ManagerFault, OSError) as error:
                log.error("the service manager has not confirmed process %d as the main process of the service: %s", successor, error)
                await trio.sleep(ANNOUNCE_AGAIN_S)
        self._step(OldEvent.CONFIRMED)

    async def stop(self) -> None:
        """This daemon is to end: give up, unless it is frozen, when the successor is a moment from serving; returns when it is decided."""
        self._settling.cancel()
        if self.state not in (OldState.FROZEN, OldState.DRAINING):
            self._hearing.tell(OldEvent.DECLINED, "this luod was told to stop")
        await self._over.wait()

    # -------------------------------------------------------------------------------------------------------- the log

    async def tell(self, changes: Sequence[Change]) -> None:
        """Log before reply: returns when the successor has been sent `changes`, and has closed its copies of what ended. Returns at
        once when there is no successor to tell; when this attempt has failed, as soon as the successor has no copies of what ended. Call
        it right after the change, without a checkpoint in between: the log has the order of the changes."""
        if not self._logging:
            if self._leaving and any(isinstance(change, Departure) for change in changes):
                await self._over.wait()
            return
        for change in changes:
            try:
                with trio.fail_after(self._bounds.copy_s):
                    await self._tell(change)
                continue
            except trio.TooSlowError:
                self._hearing.tell(OldEvent.LATE, f"the successor did not take the log within {self._bounds.copy_s:g} s")
            except OSError as error:
                self._unsent(error)
            except trio.ClosedResourceError:
                pass  # it is over
            await self._over.wait()
            return

    async def _tell(self, change: Change) -> None:
        match change:
            case Sealing():
                await self._send_box(change.session, self._channel.send)
            case Retrieval():
                await self._channel.send(Retrieved(session_id=change.session_id, process=change.process))
            case Departure():
                ended = Ended(session_id=change.session_id, owner=change.owner, finished=change.finished)
                done = self._hearing.let_go(change.session_id)
                await self._channel.send(Gone(ended=ended))
                await done.wait()

    async def _send_box(self, session: Session, send: Callable[[Handover, Sequence[int]], Awaitable[None]]) -> None:
        # A duplicate: the session may be finished while this waits for room.
        if session.sealed is not None:
            message = Box(session_id=session.session_id, retrieved_by=tuple(session.retrieved_by), stored=session.stored)
            with duplicate(session.sealed.box.fileno()) as box:
                await send(message, [box.fileno()])

    # --------------------------------------------------------------------------------------------------------- inside

    async def _send(self, message: Handover, fds: Sequence[int] = ()) -> None:
        try:
            with trio.fail_after(self._bounds.copy_s):
                await self._channel.send(message, fds)
        except trio.TooSlowError:
            self._fail(OldEvent.LATE, f"the successor took nothing for {self._bounds.copy_s:g} s")
        except OSError as error:
            self._unsent(error)
            event, said = await self._next(self._bounds.copy_s, "the successor has closed its end, and its end did not come")
            self._fail(event, said)

    def _unsent(self, error: OSError) -> None:
        """A send has failed. When the successor has closed its end the listener hears of it, and of the reason; of all else it does not."""
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            self._hearing.tell(OldEvent.DECLINED, f"what it needs can't be sent to the successor: {error.strerror}")

    async def _next(self, seconds: float, late: str) -> tuple[OldEvent, Handover | str]:
        with trio.move_on_after(seconds):
            return await self._hearing.next()
        return OldEvent.LATE, f"{late} within {seconds:g} s"

    def _step(self, event: OldEvent) -> None:
        self.state = step(self.state, event)

    def _fail(self, event: OldEvent, said: Handover | str) -> NoReturn:
        if event in (OldEvent.DECLINED, OldEvent.LOST, OldEvent.LATE) and isinstance(said, str):
            self._step(event)
            raise HandoverFailed(said)
        raise HandoverFailed(f"the successor sent {event} out of order")

    async def _see_off(self) -> None:
        """Wait until the successor is gone, and with it its copies."""
        with self._successor:
            await see_off(self._successor.fileno(), LEAVE_S)
            self.fate = reap(self._successor.fileno())
            self._hearing.all_let_go()


def _cannot(error: OSError) -> str:
    return f"this luod can't send it all: {error.strerror}"
