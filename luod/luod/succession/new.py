"""The successor's side of a handover: drives `new_table`.

Theory. The successor is told everything twice-safe: sessions come as boxes, which are checked when they arrive; what changed since comes
behind them on the same ordered socket. Live connections come last, and are not touched before the commit.

Happy path: `run` says who it is, takes the offer, builds a server that is frozen, fills it, commits by sending `serving`, and returns with
the server ready to be thawed.

Unhappy paths: those of `new_table`. `Left` means that this process must end without having served.

When something that came can't be used the handover is declined, for the old daemon has it all. If that is dead by then, what came is
nowhere else: that part is logged and dropped, and the rest is kept. What was opaque to the old daemon is kept whatever it is (`opaque`).

Invariants: nothing is read from a client, and nothing is accepted, before `run` returns. When the old daemon is dead, whatever was sent is
read to the end first. A luod that goes on to serve closes nothing of a client's here, for that may never end: its server does.
"""

from __future__ import annotations

import gc
import logging
import os
import select
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import trio

from luod import manifest, verify
from luod.handlers.base import Mismatch
from luod.manifest import ForeignManifest, ManifestFault
from luod.session import Session, Staged, weigh
from luod.store import Ended, Opaque, Store
from luod.succession.channel import Channel
from luod.succession.messages import (
    VERSIONS,
    Box,
    Connection,
    Copied,
    Declined,
    Frozen,
    Gone,
    Handover,
    LetGo,
    Meet,
    Offer,
    OpaqueBox,
    OpenSession,
    Retrieved,
    Serving,
    StagedEntries,
    UnreadFds,
    UnreadReply,
    Verified,
)
from luod.succession.new_table import NewEvent, NewState, step
from luod.succession.opaque import examine
from luod.system import Process
from luod_protocol.box import BoxFault
from luod_protocol.errors import FaultCode, LuodError, ProtocolFault
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint
from luod_protocol.version import RELEASE, WIRE

FAILURES = (Mismatch, BoxFault, ManifestFault, ForeignManifest, ProtocolFault, OSError)
"""What declines a handover: something that came isn't what it should be, or can't be taken."""

ENDED = (BrokenPipeError, ConnectionResetError)
"""What a send says when the old daemon has closed its end; the second, when it had not read all that it was sent."""

DEATH_S = 5.0
"""How long after the end of the socket the old daemon's death is waited for, in seconds: a killed process closes its files first."""


log = logging.getLogger("luod")


class Left(LuodError):
    """This successor must not serve; the old daemon does, or nobody can."""


class Heir(Protocol):
    """The frozen server that is filled. It owns every fd that it is given."""

    boot_id: str

    @property
    def store(self) -> Store: ...

    def adopt_session(self, session: Session) -> None: ...

    def adopt_opaque(self, opaque: Opaque) -> None: ...

    async def drop_session(self, ended: Ended) -> None: ...

    def note_retrieval(self, session_id: bytes, process: Process) -> None: ...

    def adopt_connection(self, live: Connection, fd: OwnedFd, unread: tuple[bytes, list[OwnedFd]] | None) -> None: ...

    def forget_live(self) -> None: ...

    def close_later(self, fds: Sequence[OwnedFd], owner: int | None) -> None: ...


BuildHeir = Callable[[Offer, OwnedFd, Mapping[str, OwnedFd]], Heir]
"""The offer, the lock, the listening sockets by endpoint: to a server that is frozen."""


class NewSide:
    """One attempt to succeed.

    Args:
        channel: the socket to the old daemon; owned.
        kinds: what the handlers here can verify, by kind.
        build: makes the server, once there is an offer.
    """

    def __init__(self, *, channel: Channel, kinds: Mapping[str, str], build: BuildHeir) -> None:
        self.state = NewState.STARTING
        self.offer: Offer | None = None
        self.since_us = 0
        """When the freeze began, in microseconds of CLOCK_MONOTONIC; 0 when the old daemon died before."""
        self.stored_others: tuple[str, ...] = ()
        """Names in the service manager's store that are no session's box."""
        self.predecessor: OwnedFd | None = None
        """The old daemon's pidfd, from the offer on; owned by whoever runs this."""
        self._channel = channel
        self._kinds = kinds
        self._build = build
        self._heir: Heir | None = None
        self._sessions = 0
        self._live = 0
        self._opening: tuple[OpenSession, dict[str, Staged]] | None = None
        self._unread: tuple[bytes, list[OwnedFd]] | None = None

    async def run(self) -> None:
        """Succeed. Returns when this process is the one to serve.

        Raises:
            Left: it must not.
        """
        try:
            await self._send(
                Meet(
                    luod=RELEASE,
                    pid=os.getpid(),
                    handover=VERSIONS,
                    wire=WIRE,
                    manifest=manifest.VERSIONS,
                    kinds={kind: (compatible,) for kind, compatible in self._kinds.items()},
                )
            )
            while self.state not in (NewState.SERVING, NewState.LEFT):
                await self._next()
        except FAILURES as error:
            self._channel.close(f"{error}")
            raise Left(f"declined the handover: {error}") from error
        finally:
            is_ending = self.state is not NewState.SERVING
            self._drop_half(self._close_here if is_ending else self._close_later)
            if is_ending:
                self._channel.close("the successor is ending")
        self._channel.close()

    async def _next(self) -> None:
        received = await self._channel.receive()
        if received is None:
            await self._lost()
            return
        message, fds = received
        try:
            await self._take(message, fds)
        except FAILURES as error:
            if not self._orphaned():
                raise
            log.error("the old daemon is dead, and a %s that it had sent can't be used: %s", message.type, error)
            self._close_later(fds, None)
            fds.clear()
        finally:
            close_all(fds)

    async def _take(self, message: Handover, fds: list[OwnedFd]) -> None:
        match message:
            case Offer():
                self._take_offer(message, fds)
            case Declined():
                self._step(NewEvent.REFUSED)
                raise Left(f"the old daemon declined: {message.reason}")
            case Box():
                self._take_box(message, fds)
            case OpaqueBox():
                # Whatever it is: the old daemon could not tell either, and it must not be lost.
                self._ready_heir.adopt_opaque(examine(fds.pop(), message.stored, self._ready_heir.boot_id))
            case Gone():
                await self._ready_heir.drop_session(message.ended)
                await self._send(LetGo(session_id=message.ended.session_id))
            case Retrieved():
                self._ready_heir.note_retrieval(message.session_id, message.process)
            case Copied():
                self._step(NewEvent.COPIED)
                # Now, while the old daemon serves: in the pause there is none, and right after it only what is new is walked.
                gc.collect()
                gc.freeze()
                await self._send(Verified(sessions=self._sessions))
            case OpenSession():
                self._drop_half()
                self._opening = (message, {})
            case StagedEntries():
                self._take_staged(message, fds)
            case UnreadReply():
                self._unread = (message.data, [])
            case UnreadFds():
                if self._unread is None:
                    raise Mismatch("the fds of an unread reply came without the reply")
                self._unread[1].extend(fds)
                fds.clear()
            case Connection():
                self._take_connection(message, fds)
            case Frozen():
                await self._take_frozen(message)
            case _:
                raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, f"the old daemon sent {message.type}, which is not its to send")

    # ----------------------------------------------------------------------------------------------- what is preserved

    def _take_offer(self, offer: Offer, fds: list[OwnedFd]) -> None:
        if offer.handover not in VERSIONS:
            raise Mismatch(f"luod {offer.luod:.64} offers handover version {offer.handover}, this luod speaks {VERSIONS}")
        strange = [repr(name[:64]) for name in offer.endpoints if name not in set(Endpoint)]
        if strange:
            raise Mismatch(f"luod {offer.luod:.64} serves at {', '.join(strange[:3])}, which this luod doesn't")
        self._step(NewEvent.OFFERED)
        self.predecessor = fds.pop()
        lock, *listeners = fds
        fds.clear()
        self._heir = self._build(offer, lock, dict(zip(offer.endpoints, listeners, strict=True)))
        self.offer = offer

    def _take_box(self, message: Box, fds: list[OwnedFd]) -> None:
        heir = self._ready_heir
        description = verify.boxed(fds[0].fileno(), heir.boot_id)
        if description.session_id != message.session_id:
            raise Mismatch("a box has another session's manifest")
        heir.adopt_session(Session.adopted(description, fds.pop(), message.retrieved_by, stored=message.stored))
        self._sessions += 1

    # ---------------------------------------------------------------------------------------------------- what is live

    def _take_staged(self, message: StagedEntries, fds: list[OwnedFd]) -> None:
        if self._opening is None:
            raise Mismatch("staged entries came without a session")
        verify.entries(message.entries, fds, same_kernel=True)
        for entry, fd in zip(message.entries, fds, strict=True):
            self._opening[1][entry.name] = Staged(entry=entry, fd=fd)
        fds.clear()

    def _take_connection(self, message: Connection, fds: list[OwnedFd]) -> None:
        heir = self._ready_heir
        if message.version and message.version not in WIRE:
            raise Mismatch(f"process {message.client.pid} speaks wire version {message.version}, this luod {WIRE}")
        if self._opening is not None:
            opened, staged = self._opening
            if len(staged) != opened.entries or message.session_id != opened.session_id:
                self._drop_half()
                raise Mismatch(f"open session {opened.name!r} came with {len(staged)} of {opened.entries} entries")
            self._opening = None
            heir.adopt_session(
                Session(
                    session_id=opened.session_id,
                    name=opened.name,
                    owner=opened.owner,
                    metadata=opened.metadata,
                    opened_at=opened.opened_at,
                    staged=staged,
                    weight=weigh(each.entry for each in staged.values()),
                )
            )
        unread, self._unread = self._unread, None
        heir.adopt_connection(message, fds.pop(), unread)
        self._live += 1

    async def _take_frozen(self, message: Frozen) -> None:
        if message.connections != self._live:
            raise Mismatch(f"{self._live} of {message.connections} connections came")
        if message.sessions != len(self._ready_heir.store):
            raise Mismatch(f"{len(self._ready_heir.store)} of {message.sessions} sessions came")
        if message.opaque != len(self._ready_heir.store.opaque):
            raise Mismatch(f"{len(self._ready_heir.store.opaque)} of {message.opaque} opaque boxes came")
        self._step(NewEvent.FROZEN)
        self.since_us = message.since_us
        self.stored_others = message.stored_others
        try:
            self._channel.send_now(Serving())
        except ENDED:
            return  # its last words, or the end of the socket, tell whether the old daemon is dead or has thawed
        self._step(NewEvent.COMMITTED)

    # --------------------------------------------------------------------------------------------------------- inside

    async def _lost(self) -> None:
        """The socket has ended: whose is the set now?"""
        if not await self._old_is_dead():
            self._step(NewEvent.LOST_ALIVE)
            raise Left("the old daemon ended the handover")
        if self.offer is not None and self.offer.manager is not None:
            self._step(NewEvent.OLD_DIED_MANAGED)
            raise Left("the old daemon died: the service manager ends this one with it, and starts luod again from its store")
        before = self.state
        self._step(NewEvent.OLD_DIED)
        if before is not NewState.HOLDING:
            self._drop_half()
            self._ready_heir.forget_live()

    def _orphaned(self) -> bool:
        """Whether the old daemon is dead now: what it sent is then nowhere else, and one part that is wrong must not cost the rest."""
        return self.predecessor is not None and _has_ended(self.predecessor.fileno())

    async def _old_is_dead(self) -> bool:
        if self.predecessor is None:
            return False
        with trio.move_on_after(DEATH_S):
            await trio.lowlevel.wait_readable(self.predecessor.fileno())
            return True
        return False

    async def _send(self, message: Handover) -> None:
        try:
            await self._channel.send(message)
        except ENDED:
            # The old daemon is gone or has ended it: what it had sent is still to be read, and says which.
            return

    @property
    def _ready_heir(self) -> Heir:
        if self._heir is None:
            raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, "the old daemon sent sessions before its offer")
        return self._heir

    def _drop_half(self, close: Callable[[Sequence[OwnedFd], int | None], None] | None = None) -> None:
        close = close or self._close_later
        if self._opening is not None:
            (opened, staged), self._opening = self._opening, None
            close([each.fd for each in staged.values()], opened.owner)
        if self._unread is not None:
            (_, fds), self._unread = self._unread, None
            close(fds, None)

    def _close_later(self, fds: Sequence[OwnedFd], owner: int | None) -> None:
        self._ready_heir.close_later(fds, owner)

    def _close_here(self, fds: Sequence[OwnedFd], _: int | None) -> None:
        # The process is about to end, which would close them as well.
        close_all(fds)

    def _step(self, event: NewEvent) -> None:
        self.state = step(self.state, event)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
