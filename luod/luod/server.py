"""The server: listens, runs the connections, and hands all of it over.

Theory. One object owns what the daemon has: the lock, the listening sockets, the connections, and the orchestrator with the sessions. It is
built thawed by a fresh daemon, or frozen by a successor, which fills it and then thaws it. All tasks are children of the one nursery.

Happy path: `start()` begins to accept; `thaw()` lets everything move; `stop` or a successful upgrade ends the process.

Unhappy paths:
1. Descriptors run out: accepting pauses for `ACCEPT_PAUSE_S` and goes on; connections are limited below that.
2. Closing a client's fd blocks: `closing`.

Invariants: what changes the set of finalized sessions is known to the service manager, then to a successor, then to the client who asked.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import trio

from luod import unit
from luod.capacity import Capacity, all_uids_are_mapped, overflow_uid
from luod.changes import Change, Retrieval, Sealing
from luod.closing import Closer, Closing, Hanging, Threads
from luod.config import Config
from luod.connection import Connection, Unread
from luod.custody import Client, Custody, Forgetting, Outcome, Pending, Storing, Working
from luod.gate import Gate
from luod.handlers.kernel import socket_name
from luod.handlers.recognizer import Recognizer
from luod.lifecycle import SessionState
from luod.live import describe, peer, revive
from luod.managing import Managing
from luod.notify import ManagerInfo
from luod.orchestrator import Orchestrator
from luod.policy import ROOT
from luod.session import Session
from luod.store import Ended, Opaque, Store
from luod.succession import ledger
from luod.succession.carriable import Carriable
from luod.succession.liveupdate import Device, Opening
from luod.succession.messages import Connection as LiveConnection
from luod.succession.messages import Handover, LastUpdate
from luod.succession.opaque import as_session, decide, tell
from luod.succession.other import left, see_off
from luod.system import Process, System
from luod.updates import Updates
from luod.upgrades import Upgrades
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.connection import ServerConnection, State, fault
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint
from luod_protocol.version import RELEASE

ACCEPT_PAUSE_S: Final = 0.1
"""How long accepting pauses when there is no descriptor for a connection, in seconds."""

PREDECESSOR_S: Final = 10.0
"""How long a predecessor may take to end after the commit before it is killed, in seconds."""

MANAGED_PREDECESSOR_S: Final = 120.0
"""The same where it waits for the service manager, which would end the whole service with it."""

WORK_S: Final = 2.0
"""How long a request waits for work that may hang, in seconds. Less than what a freeze gives it (`handover.freeze_s`)."""

CONTROL_RESERVE: Final = 16
"""Connections to control beyond the limit."""

log = logging.getLogger("luod")


class Server:
    """See the module's text.

    Args:
        nursery: for all tasks.
        config: the configuration.
        options: command-line options that a successor gets.
        system: clock and machine.
        directory: the runtime directory.
        lock: its lock; owned.
        listeners: the listening sockets; owned.
        generation: of this daemon.
        capacity: what to take.
        bound: those of the listening sockets that luod bound itself.
        manager: the service manager, if there is one.
        frozen: whether to begin with a closed gate.
        opening: opens /dev/liveupdate.
    """

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        config: Config,
        options: Sequence[str],
        system: System,
        directory: str,
        lock: OwnedFd,
        listeners: Mapping[Endpoint, socket.socket],
        generation: int,
        capacity: Capacity,
        bound: Iterable[Endpoint] = (),
        manager: ManagerInfo | None = None,
        frozen: bool = False,
        opening: Opening = Device.open,
    ) -> None:
        self.gate = Gate(is_open=not frozen)
        self.door = Gate(is_open=not frozen)
        """For accepting: it is closed first, for whoever connects waits in the backlog and notices nothing."""
        self.system = system
        self.threads = Threads()
        self.boot_id = system.boot_id
        self.directory = directory
        self.generation = generation
        self.capacity = capacity
        self.started_at = system.now()
        self.idle_open_s = config.limits.idle_open_s
        self.last_pause_us = 0
        self.bound: Final = tuple(bound)
        self.closer = Closer(nursery=nursery, threads=self.threads, most=capacity.closing_fds, exempt=(ROOT, system.uid))
        self.custody = Custody(
            system=system,
            capacity=capacity,
            policy=config.policy,
            generation=generation,
            publish=self._publish,
            carriable=Carriable(opening),
            being_closed=lambda: self.closer.total,
        )
        self.updates = Updates(host=self, opening=opening)
        self.custody.admit = self.updates.admit
        own = [socket_name(listener.fileno()) for listener in listeners.values()]
        recognizer = Recognizer(kinds=set(config.kinds.allow) - set(config.kinds.deny), files=config.files.allow, own=own)
        self.orchestrator = Orchestrator(self.custody, recognizer)
        self.managing = Managing(manager, self.custody, generation, unit.name(system.cgroup(system.pid)) if manager is not None else "")
        self.upgrades = Upgrades(host=self, options=options, bounds=config.handover)
        self._nursery = nursery
        self._lock = lock
        self._listeners = dict(listeners)
        self._connections: dict[Connection, None] = {}
        self._alone: trio.Event | None = None
        self._leaving: set[str] = set()
        self._settling: dict[bytes, trio.Event] = {}

    @property
    def store(self) -> Store:
        """The sessions."""
        return self.custody.store

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task among the daemon's."""
        self._nursery.start_soon(task)

    # -------------------------------------------------------------------------------------------------- serving clients

    def start(self) -> None:
        """Begin to accept, and run the connections that were adopted. While frozen nothing moves yet."""
        for connection in self._connections:
            self._nursery.start_soon(connection.run)
        for endpoint, listener in self._listeners.items():
            self._nursery.start_soon(self._accept, endpoint, listener)
        self._nursery.start_soon(self.managing.report)

    async def _accept(self, endpoint: Endpoint, listener: socket.socket) -> None:
        listener.setblocking(False)
        sock = trio.socket.from_stdlib_socket(listener)
        with self.door.working():
            while True:
                try:
                    accepted, _ = await self.door.wait(sock.accept)
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        log.warning("can't accept on %s: %s", endpoint, error.strerror)
                        await self.door.wait(_pause)
                    continue
                if not self.welcome(endpoint, socket.socket(fileno=accepted.detach())):
                    await self.door.wait(_pause)

    def welcome(self, endpoint: Endpoint, sock: socket.socket) -> bool:
        """Serve a connection that was accepted; takes the socket over.

        Returns:
            Whether the next one may come at once: not behind somebody whose sockets luod can't even close.
        """
        # Who may upgrade or look at a luod that is full must still get in.
        room = self.capacity.connections + (CONTROL_RESERVE if endpoint is Endpoint.CONTROL else 0)
        pid, who = peer(sock)
        reason = self.custody.quota.too_many(who.uid)
        if len(self._connections) >= room:
            reason = f"luod has {len(self._connections)} connections, its limit: try again later"
        if reason:
            with suppress(OSError):
                wire.send(sock, ServerConnection(endpoint).send(fault(ProtocolFault(FaultCode.TOO_MANY_CONNECTIONS, reason))))
                sock.shutdown(socket.SHUT_RDWR)
            self.closer.later(Closing(who.uid, [OwnedFd(sock.detach())]))
            return self.closer.has_room(who.uid)
        client = Client(peer=who, process=self.system.process(pid))
        connection = Connection(host=self, sock=sock, client=client, protocol=ServerConnection(endpoint))
        self._keep(connection)
        self._nursery.start_soon(connection.run)
        return True

    def refuse_peer(self, endpoint: Endpoint, uid: int) -> None:
        """Refuse a uid that has no business at `endpoint`.

        Raises:
            Refusal: not-permitted.
        """
        if endpoint is Endpoint.CONTROL and uid not in (ROOT, self.system.uid):
            raise Refusal(Code.NOT_PERMITTED, f"control is for uid {self.system.uid} and root, not for uid {uid}")
        if uid == overflow_uid() and not all_uids_are_mapped():
            raise Refusal(
                Code.NOT_PERMITTED,
                f"your uid isn't mapped in luod's user namespace: it shows as {uid}, as all such uids do, and luod can't tell their owners "
                "apart; run luod in the namespace of its clients",
            )

    def left(self, connection: Connection) -> None:
        """A connection has ended."""
        del self._connections[connection]
        self.custody.quota.disconnected(connection.client.uid)
        self.updates.left(connection)

    def _keep(self, connection: Connection) -> None:
        self._connections[connection] = None
        self.custody.quota.connected(connection.client.uid)

    async def perform(self, pending: Pending) -> Outcome:
        """Have done what a verb waits for, then act.

        Raises:
            Refusal: the service manager can't, or won't, or work takes too long; nothing has changed.
        """
        outcome: Outcome | Pending = pending
        while isinstance(outcome, Pending):
            pending = outcome
            try:
                outcome = pending.act(await self._wait_for(pending.waits_for))
            except BaseException:
                pending.undo()
                raise
        return outcome

    async def _wait_for(self, what: Storing | Forgetting | Working) -> str:
        if not isinstance(what, Working):
            return await self.managing.perform(what)
        try:
            await self.threads.run_within(what.uid, WORK_S, what.work)
        except Hanging:
            raise what.late from None
        return ""

    async def settle(self, changes: Sequence[Change], closing: Closing, again: bytes = b"") -> None:
        """What must be done before a reply: tell the successor, close what was let go (see `Closer.close`), wait for the predecessor's end.

        Args:
            again: the session of which the reply says what another one says that may still be waiting here: it isn't sent before that.

        Cancelled: the fds are closed all the same.

        Raises:
            Refusal: a retrieval can't be written down.
        """
        if again in self._settling:
            await self._settling[again].wait()
        settled = trio.Event()
        about = {_about(change) for change in changes}
        self._settling.update(dict.fromkeys(about, settled))
        try:
            await self._settle(changes, closing)
        finally:
            for session_id in about:
                # Its beginning may settle when its end does so already.
                if self._settling.get(session_id) is settled:
                    del self._settling[session_id]
            settled.set()

    async def _settle(self, changes: Sequence[Change], closing: Closing) -> None:
        for change in changes:
            if isinstance(change, Retrieval):
                await self.managing.note_retrieval(change.session_id, change.process)
            else:
                self.managing.note_change()
        await self.upgrades.tell(changes)
        await self.updates.follow(changes)
        if closing.fds:
            await self.closer.close(closing)
            if self._alone is not None:
                await self._alone.wait()

    def leave(self) -> None:
        """The process ends: close what it holds of clients, so that one's that hangs keeps no other's. Nothing may run after it."""
        sessions = [Closing(session.owner, session.take_fds()) for session in self.store]
        self.closer.leave([*sessions, *(Closing(each.client.uid, each.take_fds()) for each in self._connections)])

    def status(self, seq: int) -> m.DaemonStatus:
        """How the daemon is.

        Raises:
            Refusal: its descriptors can't be counted.
        """
        try:
            open_fds = len(os.listdir("/proc/self/fd")) - 1
        except OSError as error:
            raise Refusal(Code.SYSTEM_ERROR, f"luod can't count its descriptors: {error.strerror}; try again") from None
        return m.DaemonStatus(
            seq=seq,
            luod=RELEASE,
            pid=os.getpid(),
            generation=self.generation,
            started_at=self.started_at,
            sessions_open=self.custody.count(SessionState.OPEN),
            sessions_preserved=self.custody.count(SessionState.PRESERVED),
            sessions_claimed=self.custody.count(SessionState.CLAIMED),
            preserved_fds=self.custody.preserved_fds,
            staged_fds=self.custody.staged_fds,
            connections=len(self._connections),
            open_fds=open_fds,
            last_pause_us=self.last_pause_us,
            manager=self.manager.name if self.manager is not None else "",
            stored_fds=self.managing.stored,
            store_limit=self.manager.store_limit if self.manager is not None else 0,
            sessions_opaque=len(self.store.opaque),
        )

    # ----------------------------------------------------------------------------------------------- who is told what

    @property
    def manager(self) -> ManagerInfo | None:
        """The service manager that watches this daemon."""
        return self.managing.info

    async def announce(self, pid: int) -> None:
        """As `Managing.announce`."""
        await self.managing.announce(pid)

    def tell_monitors(self, event: str, detail: str) -> None:
        """Publish what happens to the daemon itself."""
        self._publish_event(event, "", b"", self.system.uid, detail)

    def _publish(self, event: str, session: Session, detail: str) -> None:
        self._publish_event(event, session.name, session.session_id, session.owner, detail)

    def _publish_event(self, event: str, name: str, session_id: bytes, owner: int, detail: str) -> None:
        watching = [each for each in self._connections if each.protocol.state is State.MONITORING]
        for connection in watching:
            connection.notify(
                m.Event(seq=0, at=self.system.now(), event=event, session=name, session_id=session_id, owner=owner, detail=detail, lost=0)
            )

    # ------------------------------------------------------------------------------------------- updates of the kernel

    @property
    def last_update(self) -> LastUpdate | None:
        """As `Updates.last`."""
        return self.updates.last

    async def update(self, request: m.Update | m.Preflight | m.Prepare | m.Freeze | m.CancelUpdate, connection: Connection) -> m.Reply:
        """As `Updates.answer`."""
        return await self.updates.answer(request, connection)

    @property
    def is_handing_over(self) -> bool:
        """Whether a successor is about to take over."""
        return self.upgrades.is_running

    @property
    def at_work(self) -> int:
        """How many requests are being worked on, the one that asks included."""
        return self.gate.inside

    def tell_clients(self, notice: m.Notice) -> None:
        """Tell those with an open session who asked for it."""
        for each in self._connections:
            if each.client.notices and each.protocol.state is State.OPEN:
                each.tell(notice)

    # ---------------------------------------------------------------------------------------------------- handing over

    def upgrade(self, program: str) -> None:
        """Start a successor and hand over to it.

        Raises:
            Refusal: as `Upgrades.start`, or an update of the kernel is prepared.
        """
        self.updates.refuse_upgrade()
        self.upgrades.start(program)

    def takeover(self, connection: Connection) -> OwnedFd:
        """Hand over to the process that asks. Returns its end of the handover socket, owned by the caller.

        Raises:
            Refusal: as `Upgrades.admit`, or an update of the kernel is prepared.
        """
        self.updates.refuse_upgrade()
        return self.upgrades.admit(connection)

    def waiting_for_upgrade(self) -> Iterable[Connection]:
        """The connections that asked for an upgrade."""
        return (each for each in self._connections if each.upgrade_seq >= 0)

    def inheritance(self) -> tuple[tuple[str, ...], Sequence[int]]:
        """What every successor gets first: the endpoints' names, and the fds of the lock and of their sockets (borrowed)."""
        return tuple(self._listeners), [self._lock.fileno(), *(each.fileno() for each in self._listeners.values())]

    def note_successor(self) -> None:
        """A successor may serve from now on."""
        self.managing.note_successor()

    async def settled(self) -> None:
        """Return when no predecessor lives, and the service manager, if there is one, listens to this process."""
        if self._alone is not None:
            await self._alone.wait()
        await self.managing.begun()

    def stored_others(self) -> tuple[str, ...]:
        """What is in the service manager's store and is no session's box."""
        return self.managing.others

    def speakers(self) -> Iterable[tuple[int, int]]:
        """The wire version and the pid of each connected client that has said hello."""
        return ((each.protocol.version, each.client.process.pid) for each in self._connections if each.protocol.version)

    def connections(self) -> Iterable[tuple[Session | None, Sequence[tuple[Handover, Sequence[int]]]]]:
        """Every live connection: its session, and the messages that describe it with their fds (borrowed). True while frozen."""
        for connection in self._connections:
            if connection.protocol.state is State.HANDED_OVER:
                continue
            yield connection.client.session, describe(connection)

    # ------------------------------------------------------------------------------------------------------- inheriting

    def adopt_session(self, session: Session) -> None:
        """Take in a session from the predecessor."""
        self.custody.adopt(session)

    def adopt_opaque(self, opaque: Opaque) -> None:
        """Take in a box that a predecessor could not read."""
        self.custody.keep_opaque(opaque)

    def _settle_opaque(self) -> None:
        """All sessions are here: which of the boxes that were opaque are sessions now?"""
        if not self.store.opaque:
            return
        decided = decide(self.store.opaque, self.store, {each.session_id for each in self.store.all_ended})
        for opaque, description in decided.sessions:
            self.custody.give_opaque(opaque)
            self.adopt_session(as_session(opaque, description, self.store.retrieved, self.boot_id))
            self.store.retrieved.pop(description.session_id, None)
        for opaque in decided.ended:
            self.custody.give_opaque(opaque)
            self.closer.later(Closing(opaque.manifest.owner if opaque.manifest else self.system.uid, [opaque.box]))
            self._leaving.add(opaque.stored)

    async def drop_session(self, ended: Ended) -> None:
        """A session that came from the predecessor has ended there: close every copy."""
        self.remember(ended)
        await self.settle((), self.custody.drop(ended.session_id))

    def remember(self, ended: Ended) -> None:
        """Remember a session that ended in a predecessor."""
        self.store.remember(ended)

    def note_retrieval(self, session_id: bytes, process: Process) -> None:
        """A process got fds of a session from the predecessor."""
        self.store.note_retrieval(session_id, process)

    def adopt_connection(self, live: LiveConnection, fd: OwnedFd, unread: tuple[bytes, list[OwnedFd]] | None) -> None:
        """Take in a live connection, and the reply with its fds that it didn't take yet."""
        connection = revive(self, live, fd, None if unread is None else Unread(data=unread[0], fds=unread[1]))
        self._keep(connection)

    def forget_live(self) -> None:
        """The predecessor died before all connections were here: end those that are, and roll back what is tied to them."""
        for connection in list(self._connections):
            connection.forget()
            self.closer.later(self.custody.lost(connection.client))
            self.left(connection)

    def close_later(self, fds: Sequence[OwnedFd], owner: int | None) -> None:
        """Close what can't be taken in; `owner` is whose it was, None where that isn't known."""
        self.closer.later(Closing(self.system.uid if owner is None else owner, [*fds]))

    def thaw(self, *, pause_us: int, predecessor: OwnedFd | None, predecessor_pid: int, stored_others: Collection[str] = ()) -> None:
        """Serve: for a successor, right after its commit."""
        self.last_pause_us = pause_us
        self._settle_opaque()
        self.managing.inherit(stored_others)
        if predecessor is not None:
            self._alone = trio.Event()
            self._nursery.start_soon(self._outlive, predecessor, self._alone, stored_others)
        self.gate.open()
        self.door.open()
        for connection in list(self.waiting_for_upgrade()):
            connection.answer_upgrade(
                m.Upgraded(
                    seq=connection.upgrade_seq,
                    generation=self.generation,
                    pid=os.getpid(),
                    predecessor_pid=predecessor_pid,
                    pause_us=pause_us,
                )
            )
        self.tell_monitors("upgraded", f"generation {self.generation}, pause {pause_us} us")

    async def _outlive(self, predecessor: OwnedFd, alone: trio.Event, stored_others: Collection[str]) -> None:
        patience_s = MANAGED_PREDECESSOR_S if self.manager is not None else PREDECESSOR_S
        with predecessor:
            if not await left(predecessor.fileno(), patience_s) and await see_off(predecessor.fileno(), 0):
                log.warning("the predecessor did not end within %g s of the handover and was killed", patience_s)
        self._alone = None
        alone.set()
        tell(self.store.opaque)
        leaving = {ledger.name(self.generation - 1), *self._leaving}
        await self.managing.begin(others=stored_others, leaving=leaving.intersection(stored_others), is_main=False)


def _about(change: Change) -> bytes:
    """The id of the session that changes."""
    return change.session.session_id if isinstance(change, Sealing) else change.session_id


async def _pause() -> None:
    await trio.sleep(ACCEPT_PAUSE_S)
