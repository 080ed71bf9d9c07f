"""One client's connection, as a task.

Theory. A loop of three waits, each through the gate: send the reply that isn't sent yet, receive a request, and between them the work.
At any freeze the task stands before one of the first two, so the connection is described by its protocol state and at most one unread
reply.

Happy path: hello, requests and replies, end. At the end the session that is tied to the connection is rolled back or released.

Unhappy paths:
1. The client doesn't speak the protocol: a last `fault`, end.
2. The client doesn't read its replies: nothing more is read from it, and after `UNREAD_S` it is ended.
3. The client connects and says nothing: ended after `HELLO_S`.
4. The client doesn't take the fds it asked for: beyond `MAX_IN_FLIGHT` it gets no more until it has, as in 2. They count against luod's
   uid (unix(7), ETOOMANYREFS), so without a bound one client could keep all others from theirs. Should the count be used up by others
   all the same, or luod have no descriptor for a long reply, the send is tried again, as long as in 2.
5. The client of an open session does nothing: ended after `limits.idle_open_s` of the configuration, where that is set. After an upgrade
   its time begins anew. An idle connection without a session, or with a claim, holds nothing of others and isn't ended.
6. A request raises what it must not: logged with its trace, `fault` to this client, end; the others don't notice.

Invariants: fds that came with a request are owned here until a verb takes them. A connection is ended with shutdown(2), for a copy of
it may live elsewhere.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

import attrs
import trio

from luod.capacity import Capacity
from luod.changes import Change
from luod.closing import Closer, Closing
from luod.custody import Client, Custody, Outcome, Pending
from luod.gate import Gate
from luod.inflight import outstanding
from luod.orchestrator import Orchestrator
from luod_protocol import messages as m
from luod_protocol import wire
from luod_protocol.connection import ServerConnection, State, agree, fault, refused
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.limits import (
    MAX_BULK_BYTES,
    MAX_ENTRIES_PER_SESSION,
    MAX_FDS_PER_PACKET,
    MAX_METADATA_BYTES,
    MAX_NAME_BYTES,
    MAX_PACKET_BYTES,
)
from luod_protocol.messages import Endpoint
from luod_protocol.version import RELEASE

HELLO_S: Final = 10.0
"""How long a client may take to say hello, in seconds."""

UNREAD_S: Final = 60.0
"""How long a reply may stay unread while the client's socket is full, in seconds."""

MAX_IN_FLIGHT: Final = 4 * MAX_FDS_PER_PACKET
"""fds that may lie unread in a client's socket."""

IN_FLIGHT_PAUSE_S: Final = 0.005
"""How long until it is looked again whether the client has read, in seconds: no event tells."""

PASSING: Final = (errno.ETOOMANYREFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""Why a reply can't be sent just now: too many fds in flight, or (for its memfd, when it is long) no descriptor or memory."""

log = logging.getLogger("luod")


class Host(Protocol):
    """What a connection needs of the server."""

    gate: Gate
    orchestrator: Orchestrator
    custody: Custody
    capacity: Capacity
    closer: Closer
    idle_open_s: float
    generation: int

    async def perform(self, pending: Pending) -> Outcome: ...

    async def settle(self, changes: Sequence[Change], closing: Closing, again: bytes = ...) -> None: ...

    def status(self, seq: int) -> m.DaemonStatus: ...

    def refuse_peer(self, endpoint: Endpoint, uid: int) -> None: ...

    def upgrade(self, program: str) -> None: ...

    def takeover(self, connection: Connection) -> OwnedFd: ...

    def left(self, connection: Connection) -> None: ...

    async def update(self, request: m.Update | m.Preflight | m.Prepare | m.Freeze | m.CancelUpdate, connection: Connection) -> m.Reply: ...


@attrs.define(kw_only=True, eq=False)
class Unread:
    """A reply on its way: the bytes, and fds that are owned until it is sent."""

    data: bytes
    fds: list[OwnedFd]


class Connection:
    """A connection that was accepted, or came from a predecessor.

    Args:
        host: the server.
        sock: the connection; owned.
        client: who is there.
        protocol: where the conversation is.
    """

    def __init__(self, *, host: Host, sock: socket.socket, client: Client, protocol: ServerConnection) -> None:
        sock.setblocking(False)
        self.raw: Final = sock
        self.client: Final = client
        self.protocol: Final = protocol
        self.unread: Unread | None = None
        self.upgrade_seq = -1
        """The `seq` of an upgrade request that is to be answered by whoever serves in the end, else -1."""
        self.lost_events = 0
        self._notice: m.Notice | None = None
        self._in_flight = 0
        self._host = host
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._answered = trio.Event()
        self._heard_at = trio.current_time()
        """When the client's last request was done, or the connection began here: a failed upgrade gives no more time."""

    async def run(self) -> None:
        """Serve the client to the end of its connection."""
        with self._host.gate.working():
            try:
                await self._serve()
            except (BrokenPipeError, ConnectionResetError):
                pass
            except Exception:
                log.exception("a request of process %d broke luod: this is a bug", self.client.process.pid)
                await self._send_fault(ProtocolFault(FaultCode.INTERNAL, "luod has a bug here and logged it; this connection ends"))
            finally:
                self._end()

    async def _serve(self) -> None:
        while True:
            await self._flush()
            if self.upgrade_seq >= 0:
                await self._host.gate.wait(self._answered.wait)
                continue
            if self.protocol.state is State.ENDED:
                return
            try:
                packet = await self._host.gate.wait(self._receive)
            except ProtocolFault as error:
                await self._send_fault(error)
                return
            if packet is None:
                return
            await self._answer(packet)
            self._heard_at = trio.current_time()

    async def _receive(self) -> wire.Packet | None:
        # Within the gate: no time-out may move anything while the daemon is frozen.
        with trio.move_on_at(self._deadline()):
            # As trio's recvmsg does it: cancelled it has had no effect, and between two packets the others have their turn. Whether there
            # is room is asked right before each packet.
            await trio.lowlevel.checkpoint_if_cancelled()
            waited = False
            while True:
                await self._host.closer.room(self.client.uid)
                with suppress(BlockingIOError):
                    packet = wire.receive(self.raw, flags=socket.MSG_DONTWAIT, dispose=self._close_later)
                    if not waited:
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    return packet
                await trio.lowlevel.wait_readable(self.raw)
                waited = True
        if self.protocol.state is State.NEW:
            raise ProtocolFault(FaultCode.TOO_SLOW, f"no hello within {HELLO_S:g} s")
        raise ProtocolFault(
            FaultCode.TOO_SLOW,
            f"no request for {self._host.idle_open_s:g} s, after which limits.idle_open_s of luod's configuration ends an open session: "
            "it is rolled back",
        )

    def _deadline(self) -> float:
        match self.protocol.state:
            case State.NEW:
                return self._heard_at + HELLO_S
            case State.OPEN if self._host.idle_open_s:
                return self._heard_at + self._host.idle_open_s
            case _:
                return float("inf")

    async def _send(self, unread: Unread) -> None:
        with trio.move_on_after(UNREAD_S):
            while True:
                if self._may_send(len(unread.fds)):
                    try:
                        return await wire.send_async(self._sock, unread.data, [fd.fileno() for fd in unread.fds])
                    except OSError as error:
                        if error.errno not in PASSING:
                            raise
                await trio.sleep(IN_FLIGHT_PAUSE_S)
        raise BrokenPipeError(f"a reply was not read for {UNREAD_S:g} s")

    def _may_send(self, fds: int) -> bool:
        if fds and not outstanding(self.raw.fileno()):
            self._in_flight = 0
        return not fds or self._in_flight + fds <= MAX_IN_FLIGHT

    async def _flush(self) -> None:
        unread = self.unread
        if unread is None:
            return
        await self._host.gate.wait(lambda: self._send(unread))
        self.unread = None
        self._in_flight += len(unread.fds)
        # Never the last reference: the client or the box has one.
        close_all(unread.fds)
        if self._notice is not None:
            self.tell(self._notice)

    async def _answer(self, packet: wire.Packet) -> None:
        try:
            try:
                request = self.protocol.receive(packet.data, len(packet.fds))
                reply, fds = await self._grant(request, packet)
            except ProtocolFault as error:
                await self._send_fault(error)
                return
            if reply is not None:
                self._queue(request, reply, fds)
        finally:
            if packet.fds:
                self._close_later(packet.take_fds())

    async def _grant(self, request: m.Request, packet: wire.Packet) -> tuple[m.Reply | None, Sequence[OwnedFd]]:
        try:
            self.protocol.begin(request)
            match request:
                case m.Hello():
                    return self._welcome(request), ()
                case m.Status():
                    return self._host.status(request.seq), ()
                case m.Monitor():
                    return m.Monitoring(seq=request.seq), ()
                case m.Upgrade():
                    self._host.upgrade(request.program)
                    self.upgrade_seq = request.seq
                    self._answered = trio.Event()
                    return None, ()
                case m.Takeover():
                    return m.TakeoverOffered(seq=request.seq), [self._host.takeover(self)]
                case m.Update() | m.Preflight() | m.Prepare() | m.Freeze() | m.CancelUpdate():
                    return await self._host.update(request, self), ()
                case _:
                    outcome = self._host.orchestrator.handle(self.client, request, packet.fds)
                    if isinstance(outcome, Pending):
                        outcome = await self._host.perform(outcome)
                    try:
                        await self._host.settle(outcome.changes, outcome.closing, outcome.again)
                    except BaseException:
                        close_all(outcome.fds)
                        raise
                    return outcome.reply, outcome.fds
        except Refusal as refusal:
            return refused(request.seq, refusal), ()

    def _welcome(self, hello: m.Hello) -> m.Welcome:
        version = agree(hello)
        self._host.refuse_peer(self.protocol.endpoint, self.client.uid)
        return m.Welcome(
            seq=hello.seq,
            version=version,
            luod=RELEASE,
            generation=self._host.generation,
            limits=m.Limits(
                packet_bytes=MAX_PACKET_BYTES,
                bulk_bytes=MAX_BULK_BYTES,
                fds_per_packet=MAX_FDS_PER_PACKET,
                name_bytes=MAX_NAME_BYTES,
                metadata_bytes=MAX_METADATA_BYTES,
                entries_per_session=MAX_ENTRIES_PER_SESSION,
                preserved_fds=self._host.capacity.preserved_fds,
            ),
        )

    def _queue(self, request: m.Request, reply: m.Reply, fds: Sequence[OwnedFd]) -> None:
        data = self.protocol.send(reply)
        if len(data) > MAX_BULK_BYTES:
            # Only answers that look grow with what is held: a refusal takes nothing back.
            too_large = Refusal(Code.TOO_LARGE, f"the answer has {len(data)} bytes, at most {MAX_BULK_BYTES} can be sent: ask for less")
            data = self.protocol.send(refused(request.seq, too_large))
        self.unread = Unread(data=data, fds=list(fds))

    async def _send_fault(self, error: ProtocolFault) -> None:
        with suppress(OSError):
            wire.send(self.raw, self.protocol.send(fault(error)), flags=socket.MSG_DONTWAIT)

    # ------------------------------------------------------------------------------------------------ for the server

    def answer_upgrade(self, reply: m.Reply) -> None:
        """Answer the upgrade request that waits here."""
        self.protocol.begin(m.Upgrade(seq=reply.seq if not isinstance(reply, m.Fault) else 0))
        self.unread = Unread(data=self.protocol.send(reply), fds=[])
        self.upgrade_seq = -1
        self._answered.set()

    def notify(self, event: m.Event) -> None:
        """Send an event to a client that monitors; count it as lost when its socket is full. Until it has been told that it monitors it
        doesn't."""
        if self.unread is not None:
            return
        try:
            wire.send(self.raw, self.protocol.send(attrs.evolve(event, lost=self.lost_events)), flags=socket.MSG_DONTWAIT)
        except OSError:
            self.lost_events += 1
        else:
            self.lost_events = 0

    def tell(self, notice: m.Notice) -> None:
        """Send a notice, now or behind the reply that is on its way. A client whose socket is full isn't told before its next reply."""
        self._notice = notice
        if self.unread is None:
            with suppress(OSError):
                wire.send(self.raw, self.protocol.send(notice), flags=socket.MSG_DONTWAIT)
                self._notice = None

    def forget(self) -> None:
        """Close it without a task having run: the client is told by the end of its connection."""
        with suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)
        if self.raw.fileno() != -1:
            trio.lowlevel.notify_closing(self.raw)
            # What the client sent and luod didn't read is closed with it.
            self._close_later([OwnedFd(self.raw.detach())])
        if self.unread is not None:
            self._close_later(self.unread.fds)
            self.unread = None

    def take_fds(self) -> list[OwnedFd]:
        """Move out every fd that is kept for this client, its connection included, which isn't shut down: at the end of the process."""
        fds = [] if self.raw.fileno() == -1 else [OwnedFd(self.raw.detach())]
        if self.unread is not None:
            fds += self.unread.fds
            self.unread = None
        return fds

    def _close_later(self, fds: Sequence[OwnedFd]) -> None:
        self._host.closer.later(Closing(self.client.uid, fds))

    def _end(self) -> None:
        self.forget()
        self._host.closer.later(self._host.custody.lost(self.client))
        self._host.left(self)
