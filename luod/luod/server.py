"""The server: listens, runs the connections, and hands all of it over.

Theory. One object owns what the daemon has: the lock, the listening sockets, the connections, and the orchestrator with the sessions. It is
built thawed by a fresh daemon, or frozen by a successor, which fills it and then thaws it. All tasks are children of the one nursery.

Happy path: `start()` begins to accept; `thaw()` lets everything move; `stop` or a successful upgrade ends the process.

Unhappy paths:
1. Descriptors run out: accepting pauses for `ACCEPT_PAUSE_S` and goes on; connections are limited below that.
2. Closing a client's fd blocks: it happens in a thread, and only whoever asked for it waits.
3. An upgrade fails: whoever asked is told why; everything else goes on.

Invariants: one upgrade at a time. After a successor has committed, this process touches no client any more and exits at once.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import trio

from luod.capacity import Capacity, all_uids_are_mapped, overflow_uid
from luod.changes import Change
from luod.config import Config
from luod.connection import Connection, Unread
from luod.custody import Client, Custody
from luod.gate import Gate
from luod.handlers.recognizer import Recognizer
from luod.lifecycle import SessionState
from luod.live import describe, peer, revive
from luod.orchestrator import Orchestrator
from luod.policy import ROOT
from luod.session import Session
from luod.store import Ended, Store
from luod.succession.channel import Channel
from luod.succession.messages import Connection as LiveConnection
from luod.succession.messages import Handover
from luod.succession.old import HandoverFailed, OldSide
from luod.succession.other import peer_pidfd, see_off
from luod.succession.spawn import spawn
from luod.system import Process, System
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.connection import ServerConnection, State, fault, refused
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint
from luod_protocol.version import RELEASE

ACCEPT_PAUSE_S: Final = 0.1
"""How long accepting pauses when there is no descriptor for a connection, in seconds."""

PREDECESSOR_S: Final = 10.0
"""How long a predecessor may take to end after the commit before it is killed, in seconds."""

CONTROL_RESERVE: Final = 16
"""Connections to control beyond the limit."""

CLOSING_THREADS: Final = 64
"""Threads that close clients' fds at the same time."""

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
        frozen: whether to begin with a closed gate.
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
        frozen: bool = False,
    ) -> None:
        self.gate = Gate(is_open=not frozen)
        self.door = Gate(is_open=not frozen)
        """For accepting: it is closed first, for whoever connects waits in the backlog and notices nothing."""
        self.system = system
        self.boot_id = system.boot_id
        self.directory = directory
        self.generation = generation
        self.capacity = capacity
        self.started_at = system.now()
        self.last_pause_us = 0
        self.replaced = trio.Event()
        """Set when a successor serves: this process must end now."""
        self.custody = Custody(system=system, capacity=capacity, policy=config.policy, generation=generation, publish=self._publish)
        recognizer = Recognizer(kinds=set(config.kinds.allow) - set(config.kinds.deny), files=config.files.allow)
        self.orchestrator = Orchestrator(self.custody, recognizer)
        self._nursery = nursery
        self._config = config
        self._options = options
        self._lock = lock
        self._listeners = dict(listeners)
        self._connections: dict[Connection, None] = {}
        self._upgrading: OldSide | None = None
        self._closers = trio.CapacityLimiter(CLOSING_THREADS)
        self._alone: trio.Event | None = None
        self._abandoned: list[OwnedFd] = []

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
                self.welcome(endpoint, socket.socket(fileno=accepted.detach()))

    def welcome(self, endpoint: Endpoint, sock: socket.socket) -> None:
        """Serve a connection that was accepted; takes the socket over."""
        # Who may upgrade or look at a luod that is full must still get in.
        room = self.capacity.connections + (CONTROL_RESERVE if endpoint is Endpoint.CONTROL else 0)
        pid, who = peer(sock)
        reason = self.custody.quota.too_many(who.uid)
        if len(self._connections) >= room:
            reason = f"luod has {len(self._connections)} connections, its limit: try again later"
        if reason:
            with sock, suppress(OSError):
                wire.send(sock, ServerConnection(endpoint).send(fault(ProtocolFault(FaultCode.TOO_MANY_CONNECTIONS, reason))))
            return
        client = Client(peer=who, process=self.system.process(pid))
        connection = Connection(host=self, sock=sock, client=client, protocol=ServerConnection(endpoint))
        self._keep(connection)
        self._nursery.start_soon(connection.run)

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

    def _keep(self, connection: Connection) -> None:
        self._connections[connection] = None
        self.custody.quota.connected(connection.client.uid)

    async def settle(self, changes: Sequence[Change], closing: Sequence[OwnedFd]) -> None:
        """What must be done before a reply: tell the successor, close what was let go, wait until no predecessor holds a copy.

        Cancelled: the fds are closed all the same."""
        if self._upgrading is not None and changes:
            await self._upgrading.tell(changes)
        if closing:
            await self._close(list(closing))
            if self._alone is not None:
                await self._alone.wait()

    def close_later(self, fds: Sequence[OwnedFd]) -> None:
        """Close fds whose closing nobody waits for, off the event loop."""
        if fds and self._nursery.cancel_scope.cancel_called:
            # The process ends now, and the kernel closes them.
            self._abandoned += fds
        elif fds:
            self._nursery.start_soon(self._close, list(fds))

    async def _close(self, fds: list[OwnedFd]) -> None:
        try:
            await trio.to_thread.run_sync(close_all, fds, limiter=self._closers, abandon_on_cancel=True)
        except OSError as error:
            log.warning("closing a client's fd: %s", error.strerror)

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
        )

    def _publish(self, event: str, session: Session, detail: str) -> None:
        self._tell_monitors(event, session.name, session.session_id, session.owner, detail)

    def _tell_monitors(self, event: str, name: str, session_id: bytes, owner: int, detail: str) -> None:
        watching = [each for each in self._connections if each.protocol.state is State.MONITORING]
        for connection in watching:
            connection.notify(
                m.Event(seq=0, at=self.system.now(), event=event, session=name, session_id=session_id, owner=owner, detail=detail, lost=0)
            )

    # ---------------------------------------------------------------------------------------------------- handing over

    def upgrade(self, connection: Connection, request: m.Upgrade) -> None:
        """Start a successor and hand over to it. `connection` is answered by whoever serves in the end.

        Raises:
            Refusal: one is running, or the successor can't be started.
        """
        self._refuse_second_upgrade()
        if request.program and (not os.path.isabs(request.program) or "\0" in request.program):
            raise Refusal(Code.BAD_REQUEST, f"the successor's program must be an absolute path, not {request.program!r:.100}")
        ours, theirs = _handover_pair()
        with theirs:
            try:
                successor = spawn(request.program, self._options, theirs.fileno())
            except BaseException:
                ours.close()
                raise
        self._hand_over(ours, successor)

    def takeover(self, connection: Connection, request: m.Takeover) -> OwnedFd:
        """Hand over to the process that asks. Returns its end of the handover socket, owned by the caller.

        Raises:
            Refusal: one is running, or it isn't of this daemon's uid.
        """
        self._refuse_second_upgrade()
        if connection.client.uid != self.system.uid:
            raise Refusal(
                Code.NOT_PERMITTED,
                f"a successor runs as uid {self.system.uid} like this luod, not as uid {connection.client.uid}: start it so",
            )
        successor = peer_pidfd(connection.raw, connection.client.process.pid)
        ours, theirs = _handover_pair()
        self._hand_over(ours, successor)
        return OwnedFd(theirs.detach())

    def _refuse_second_upgrade(self) -> None:
        if self._upgrading is not None:
            raise Refusal(Code.UPGRADE_RUNNING, "an upgrade is under way: wait for its end")

    def _hand_over(self, sock: socket.socket, successor: OwnedFd) -> None:
        self._upgrading = OldSide(host=self, channel=Channel(sock), successor=successor, bounds=self._config.handover)
        self._nursery.start_soon(self._run_upgrade, self._upgrading)

    async def _run_upgrade(self, upgrade: OldSide) -> None:
        self._tell_monitors("upgrading", "", b"", self.system.uid, f"generation {self.generation}")
        try:
            await upgrade.run()
        except HandoverFailed as failure:
            reason = f"{failure}{upgrade.fate}"
            log.error("upgrade failed, generation %d goes on serving: %s", self.generation, reason)
            self._tell_monitors("upgrade-failed", "", b"", self.system.uid, reason)
            for connection in [each for each in self._connections if each.upgrade_seq >= 0]:
                message = f"the upgrade failed, generation {self.generation} goes on serving: {reason}"
                connection.answer_upgrade(refused(connection.upgrade_seq, Refusal(Code.UPGRADE_FAILED, message)))
        else:
            self.replaced.set()
        finally:
            self._upgrading = None

    async def stop_upgrading(self) -> None:
        """Before this daemon ends: give a running upgrade up, or wait until it is through."""
        if self._upgrading is not None:
            await self._upgrading.stop()

    def inheritance(self) -> tuple[tuple[str, ...], Sequence[int]]:
        """What every successor gets first: the endpoints' names, and the fds of the lock and of their sockets (borrowed)."""
        return tuple(self._listeners), [self._lock.fileno(), *(each.fileno() for each in self._listeners.values())]

    def wire_versions(self) -> set[int]:
        """The versions that connected clients speak."""
        return {each.protocol.version for each in self._connections if each.protocol.version}

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

    async def drop_session(self, ended: Ended) -> None:
        """A session that came from the predecessor has ended there: close every copy."""
        self.remember(ended)
        await self.settle((), self.custody.drop(ended.session_id))

    def remember(self, ended: Ended) -> None:
        """Remember a session that ended in a predecessor."""
        self.store.remember(ended)

    def note_retrieval(self, session_id: bytes, process: Process) -> None:
        """A process got fds of a session from the predecessor."""
        session = self.store.by_id(session_id)
        if session is not None:
            session.retrieved_by.add(process)

    def adopt_connection(self, live: LiveConnection, fd: OwnedFd, unread: tuple[bytes, list[OwnedFd]] | None) -> None:
        """Take in a live connection, and the reply with its fds that it didn't take yet."""
        connection = revive(self, live, fd, None if unread is None else Unread(data=unread[0], fds=unread[1]))
        self._keep(connection)

    def forget_live(self) -> None:
        """The predecessor died before all connections were here: end those that are, and roll back what is tied to them."""
        for connection in list(self._connections):
            connection.forget()
            self.close_later(self.custody.lost(connection.client))
            self.left(connection)

    def thaw(self, *, pause_us: int, predecessor: OwnedFd | None, predecessor_pid: int) -> None:
        """Serve: for a successor, right after its commit."""
        self.last_pause_us = pause_us
        if predecessor is not None:
            self._alone = trio.Event()
            self._nursery.start_soon(self._outlive, predecessor, self._alone)
        self.gate.open()
        self.door.open()
        for connection in [each for each in self._connections if each.upgrade_seq >= 0]:
            connection.answer_upgrade(
                m.Upgraded(
                    seq=connection.upgrade_seq,
                    generation=self.generation,
                    pid=os.getpid(),
                    predecessor_pid=predecessor_pid,
                    pause_us=pause_us,
                )
            )
        self._tell_monitors("upgraded", "", b"", self.system.uid, f"generation {self.generation}, pause {pause_us} us")

    async def _outlive(self, predecessor: OwnedFd, alone: trio.Event) -> None:
        with predecessor:
            if await see_off(predecessor.fileno(), PREDECESSOR_S):
                log.warning("the predecessor did not end within %g s of the handover and was killed", PREDECESSOR_S)
        self._alone = None
        alone.set()


def _handover_pair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise Refusal(Code.SYSTEM_ERROR, f"luod can't make a handover socket: {error.strerror}; try again") from None


async def _pause() -> None:
    await trio.sleep(ACCEPT_PAUSE_S)
