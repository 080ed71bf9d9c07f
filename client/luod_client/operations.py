"""What a client says and hears, without any I/O: shared by the blocking and the trio client.

Theory. An operation is a generator. It yields a `Send` (a packet to send, with borrowed fds) or None (receive a packet) and is sent what
came: a `Packet`, or None at the end of the connection. It returns its result. `session.run` drives it on a blocking socket, `aio` on
trio; both throw the OSError of a failed call into it, so that everything is explained here, once.

Happy path: `_send`, `_answer`. Long lists are cut into batches, with two requests under way at a time: luod works on one while the other
is written, and both fit the socket's buffer, so that two sides that only send can't wait for each other.

Unhappy paths:
1. luod refuses: `Refusal`, the connection goes on. When one batch of several is refused the others are taken back, so that "nothing
   changed" holds for the whole call.
2. The kernel refuses to pass a fd (an io_uring, or one that isn't open): `Refusal` that names the entry; nothing was sent.
3. The user has too many fds in flight (ETOOMANYREFS): tried again after luod has answered what is under way, else a `Refusal` that says
   that it can be tried again.
4. The connection ends where an answer is due: `Disconnected`, which says what is unknown, and how to find out. Sending to a dead
   connection is no error by itself: the reason, if luod gave one, is where the answer would be.
5. The answer is not one: `ProtocolFault`. After 4, 5 or an operation that was broken off (cancelled), the connection is of no use, and
   the driver closes it.

Invariants: a request that wasn't sent has no answer due. Fds that arrived are in the result, or closed, also when the generator is closed.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias, TypeVar

import attrs

from luod_protocol import messages as m
from luod_protocol.connection import ClientConnection, State, refusal
from luod_protocol.errors import Code, Disconnected, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.limits import MAX_FDS_PER_PACKET, MAX_PACKET_BYTES
from luod_protocol.messages import Endpoint
from luod_protocol.version import RELEASE, WIRE
from luod_protocol.wire import Packet

_WINDOW: Final = 2
_MESSAGE_BYTES: Final = 128
"""More than the fields around the entries or names of a packet take, encoded."""
_ENTRY_BYTES: Final = 48
"""More than the keys and length fields of one entry take, encoded."""
_NAME_BYTES: Final = 3
"""A msgpack str of at most 255 bytes has a length field of 1 or 2 bytes."""

IO_URING: Final = "anon_inode:[io_uring]"
"""What the link of an io_uring's fd in /proc says (io_uring/io_uring.c)."""


class NotPassed(OSError):
    """sendmsg(2) failed because of a fd.

    Args:
        number: the errno.
        text: what it means.
        index: the fd's place among those that were to be sent.
        what: where the fd's link in /proc points, empty when that is unknown.
    """

    def __init__(self, number: int, text: str, index: int, what: str) -> None:
        super().__init__(number, text)
        self.index = index
        self.what = what


class _InFlight(Refusal):
    """Unhappy path 3."""


@attrs.frozen
class Send:
    """A packet to send, with borrowed fds."""

    data: bytes
    fds: Sequence[int]


T = TypeVar("T")
R = TypeVar("R", bound=m.Reply)
Steps: TypeAlias = Generator[Send | None, Packet | None, T]


class Conversation:
    """All that can be asked on one connection. Each method is an operation, see above.

    Args:
        endpoint: what the connection is with; luod refuses what does not belong there.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._line = ClientConnection(endpoint)
        self._packet_bytes = MAX_PACKET_BYTES
        self._packet_fds = MAX_FDS_PER_PACKET
        self._notices: deque[m.Notice] = deque()

    def _send(self, request: m.Request, fds: Sequence[int] = ()) -> Steps[None]:
        if self._line.state is State.ENDED:
            raise Refusal(Code.OUT_OF_ORDER, f"{request.type} refused: this connection has done its work, open another")
        try:
            data = self._line.send(request, len(fds))
        except (UnicodeEncodeError, OverflowError) as error:
            raise Refusal(Code.BAD_REQUEST, f"{request.type} can't be encoded: {error}") from error
        try:
            yield Send(data, fds)
        except (BrokenPipeError, ConnectionResetError):
            pass  # unhappy path 4
        except OSError as error:
            self._line.withdraw()
            raise _not_sent(request, error) from error
        except Refusal:
            self._line.withdraw()
            raise

    def _receive(self) -> Steps[tuple[m.Reply, list[OwnedFd]]]:
        """The next message that isn't a notice, with its fds."""
        while True:
            reply, fds = yield from self._next()
            if not isinstance(reply, m.Notice):
                return reply, fds
            self._notices.append(reply)

    def _next(self) -> Steps[tuple[m.Reply, list[OwnedFd]]]:
        try:
            packet = yield None
        except OSError as error:
            raise Disconnected(f"{error.strerror}; {self._unknown()}") from error
        if packet is None:
            raise Disconnected(self._unknown())
        with packet:
            reply = self._line.receive(packet.data, len(packet.fds))
            if isinstance(reply, m.Refused):
                raise refusal(reply)
            return reply, packet.take_fds()

    def _answer(self, kind: type[R]) -> Steps[tuple[R, list[OwnedFd]]]:
        reply, fds = yield from self._receive()
        if not isinstance(reply, kind):
            close_all(fds)
            raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, f"{reply.type} came where {kind.type} was due")
        return reply, fds

    def _ask(self, request: m.Request, kind: type[R]) -> Steps[R]:
        yield from self._send(request)
        reply, _ = yield from self._answer(kind)
        return reply

    def _ask_all(
        self, calls: Iterable[tuple[m.Request, Sequence[int]]], kind: type[R], take: Callable[[R, list[OwnedFd]], None]
    ) -> Steps[None]:
        """Send `calls`, a window of them under way; `take` owns what comes. The first refusal is raised when nothing is under way."""
        todo = deque(calls)
        window = _WINDOW
        refused: Refusal | None = None
        while self._line.waiting or (todo and refused is None):
            try:
                if todo and refused is None and len(self._line.waiting) < window:
                    yield from self._send(*todo[0])
                    todo.popleft()
                else:
                    take(*(yield from self._answer(kind)))
            except _InFlight as error:
                window = 1
                if not self._line.waiting:
                    refused = error
            except Refusal as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def _unknown(self) -> str:
        request = next(iter(self._line.waiting), None)
        if request is None:
            return "luod ended the connection"
        return f"luod ended the connection before it answered {request.type}. {_outcome(request)}"

    def _greet(self) -> m.Hello:
        return m.Hello(seq=self._line.next_seq(), low=WIRE.low, high=WIRE.high, client=f"luod_client {RELEASE}")

    def _welcomed(self) -> Steps[m.Welcome]:
        welcome, _ = yield from self._answer(m.Welcome)
        self._packet_bytes = min(MAX_PACKET_BYTES, welcome.limits.packet_bytes)
        self._packet_fds = min(MAX_FDS_PER_PACKET, welcome.limits.fds_per_packet)
        return welcome

    def hello(self) -> Steps[m.Welcome]:
        """The first exchange of a connection."""
        yield from self._send(self._greet())
        return (yield from self._welcomed())

    def status(self) -> Steps[m.DaemonStatus]:
        """Ask how the daemon is."""
        return (yield from self._ask(m.Status(seq=self._line.next_seq()), m.DaemonStatus))

    def capabilities(self) -> Steps[m.DaemonCapabilities]:
        """Ask what the daemon takes."""
        return (yield from self._ask(m.Capabilities(seq=self._line.next_seq()), m.DaemonCapabilities))

    def open(self, session: str, session_id: bytes, metadata: bytes, owner: int | None, notices: bool) -> Steps[m.Opened]:
        """The first exchange of a connection and its session, in one round trip."""
        yield from self._send(self._greet())
        yield from self._send(
            m.Open(seq=self._line.next_seq(), session=session, session_id=session_id, metadata=metadata, owner=owner, notices=notices),
        )
        yield from self._welcomed()
        opened, _ = yield from self._answer(m.Opened)
        return opened

    def preserve(
        self, fds: Mapping[str, int], metadata: Mapping[str, bytes], needs: Mapping[str, Iterable[str]]
    ) -> Steps[dict[str, m.EntryInfo]]:
        """Add entries: all or none of them."""
        for name in [*metadata, *needs]:
            if name not in fds:
                raise Refusal(Code.BAD_REQUEST, f"metadata or needs for {name!r}, which isn't among the fds to preserve", entry=name)
        specs = [m.EntrySpec(name=name, metadata=metadata.get(name, b""), needs=tuple(needs.get(name, ()))) for name in fds]
        calls = [
            (m.Preserve(seq=self._line.next_seq(), entries=tuple(batch)), [fds[spec.name] for spec in batch])
            for batch in self._batches(specs, _spec_bytes)
        ]
        kept: dict[str, m.EntryInfo] = {}

        def take(reply: m.Preserved, _: list[OwnedFd]) -> None:
            kept.update((entry.name, entry) for entry in reply.entries)

        try:
            yield from self._ask_all(calls, m.Preserved, take)
        except Refusal:
            if kept:
                yield from self.unpreserve(tuple(kept))
            raise
        return kept

    def unpreserve(self, names: Iterable[str]) -> Steps[m.Unpreserved]:
        """Take entries out again."""
        return (yield from self._ask(m.Unpreserve(seq=self._line.next_seq(), names=tuple(names)), m.Unpreserved))

    def cancel(self) -> Steps[m.Cancelled]:
        """Drop the open session."""
        return (yield from self._ask(m.Cancel(seq=self._line.next_seq()), m.Cancelled))

    def finalize(self, session_id: bytes, require: Iterable[str], seal: Mapping[str, Iterable[str]]) -> Steps[m.Finalized]:
        """Give the session into luod's custody."""
        request = m.Finalize(
            seq=self._line.next_seq(),
            session_id=session_id,
            require=tuple(sorted(require)),
            seal={name: tuple(sorted(seals)) for name, seals in seal.items()},
        )
        return (yield from self._ask(request, m.Finalized))

    def sessions(self, owner: int | None) -> Steps[tuple[m.SessionInfo, ...]]:
        """The sessions that this user may see."""
        return (yield from self._ask(m.List(seq=self._line.next_seq(), owner=owner), m.Listed)).sessions

    def show(self, session: str, session_id: bytes, owner: int | None) -> Steps[m.Shown]:
        """One session."""
        request = m.Show(seq=self._line.next_seq(), session=session, session_id=session_id, owner=owner)
        return (yield from self._ask(request, m.Shown))

    def claim(self, session: str, session_id: bytes, owner: int | None, force: bool) -> Steps[m.Claimed]:
        """Take the right to a session."""
        request = m.Claim(seq=self._line.next_seq(), session=session, session_id=session_id, owner=owner, force=force)
        return (yield from self._ask(request, m.Claimed))

    def retrieve(self, names: Iterable[str]) -> Steps[dict[str, OwnedFd]]:
        """Duplicates of entries' fds: all or none of them."""
        batches = [tuple(batch) for batch in self._batches(dict.fromkeys(names), _name_bytes)]
        expected = iter(batches)
        fds: dict[str, OwnedFd] = {}

        def take(reply: m.Retrieved, came: list[OwnedFd]) -> None:
            if reply.names != next(expected):
                close_all(came)
                raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, "luod sent other entries than were asked for")
            fds.update(zip(reply.names, came, strict=True))

        calls = [(m.Retrieve(seq=self._line.next_seq(), names=batch), ()) for batch in batches]
        try:
            yield from self._ask_all(calls, m.Retrieved, take)
        except BaseException:
            close_all(fds.values())
            raise
        return fds

    def release(self) -> Steps[m.Released]:
        """Give the claim back."""
        return (yield from self._ask(m.Release(seq=self._line.next_seq()), m.Released))

    def finish(self, session_id: bytes) -> Steps[m.Finished]:
        """Have luod let go of a session."""
        return (yield from self._ask(m.Finish(seq=self._line.next_seq(), session_id=session_id), m.Finished))

    def discard(self, session: str, session_id: bytes, owner: int | None, force: bool) -> Steps[m.Discarded]:
        """Drop a session that nobody claims."""
        request = m.Discard(seq=self._line.next_seq(), session=session, session_id=session_id, owner=owner, force=force)
        return (yield from self._ask(request, m.Discarded))

    def upgrade(self, program: str) -> Steps[m.Upgraded]:
        """Have luod replaced by a fresh one."""
        return (yield from self._ask(m.Upgrade(seq=self._line.next_seq(), program=program), m.Upgraded))

    @property
    def has_notice(self) -> bool:
        """Whether a notice has come that was not asked for yet."""
        return bool(self._notices)

    def notice(self) -> Steps[m.Notice | None]:
        """The next notice, None when luod has ended the connection."""
        while not self._notices:
            try:
                came, fds = yield from self._next()
            except Disconnected:
                return None
            if not isinstance(came, m.Notice):
                close_all(fds)
                raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, f"{came.type} came where only a notice may")
            self._notices.append(came)
        return self._notices.popleft()

    def update(self) -> Steps[m.UpdateStatus]:
        """Ask how an update of the kernel is going."""
        return (yield from self._ask(m.Update(seq=self._line.next_seq()), m.UpdateStatus))

    def preflight(self) -> Steps[m.PreflightReport]:
        """Ask what an update would carry."""
        return (yield from self._ask(m.Preflight(seq=self._line.next_seq()), m.PreflightReport))

    def prepare(self, deadline_s: float, leave_behind: Iterable[str], force: bool) -> Steps[m.UpdateStatus]:
        """Have luod prepare for an update."""
        request = m.Prepare(seq=self._line.next_seq(), deadline_s=deadline_s, leave_behind=tuple(leave_behind), force=force)
        return (yield from self._ask(request, m.UpdateStatus))

    def freeze(self) -> Steps[m.UpdateStatus]:
        """Have nothing change any more."""
        return (yield from self._ask(m.Freeze(seq=self._line.next_seq()), m.UpdateStatus))

    def cancel_update(self, reason: str) -> Steps[m.UpdateStatus]:
        """Have an update undone."""
        return (yield from self._ask(m.CancelUpdate(seq=self._line.next_seq(), reason=reason), m.UpdateStatus))

    def monitor(self) -> Steps[m.Monitoring]:
        """Ask for events; `event` gets them."""
        return (yield from self._ask(m.Monitor(seq=self._line.next_seq()), m.Monitoring))

    def event(self) -> Steps[m.Event | None]:
        """The next event, None when luod has ended."""
        try:
            event, _ = yield from self._answer(m.Event)
        except Disconnected:
            return None
        return event

    def _batches(self, items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
        """`items` in parts that fit a packet each, by number and by size. An item too large for any is alone, and travels as bulk."""
        batch: list[T] = []
        room = self._packet_bytes - _MESSAGE_BYTES
        for item in items:
            size = size_of(item)
            if batch and (size > room or len(batch) == self._packet_fds):
                yield batch
                batch, room = [], self._packet_bytes - _MESSAGE_BYTES
            batch.append(item)
            room -= size
        if batch:
            yield batch


def _name_bytes(name: str) -> int:
    return len(name) + _NAME_BYTES


def _spec_bytes(spec: m.EntrySpec) -> int:
    return _ENTRY_BYTES + _name_bytes(spec.name) + len(spec.metadata) + sum(map(_name_bytes, spec.needs))


def _not_sent(request: m.Request, error: OSError) -> Refusal:
    """Why the kernel did not send `request`; nothing of it was sent."""
    if error.errno == errno.ETOOMANYREFS:
        return _InFlight(
            Code.LIMIT_REACHED,
            "the kernel refused to pass the fds (ETOOMANYREFS): this user has more fds in flight than this process's RLIMIT_NOFILE allows. "
            "Nothing was sent; it can be tried again as soon as receivers have taken theirs, or with a higher RLIMIT_NOFILE",
        )
    if isinstance(error, NotPassed) and isinstance(request, m.Preserve):
        name = request.entries[error.index].name
        if error.errno == errno.EBADF:
            return Refusal(Code.BAD_REQUEST, f"entry {name!r}: its fd is not open in this process", entry=name)
        what = "an io_uring" if error.what == IO_URING else f"{error.what or 'of an unknown kind'}"
        return Refusal(
            Code.KIND_NOT_SUPPORTED,
            f"entry {name!r}: its fd is {what}, which the kernel passes to no other process ({error.strerror}): leave it out, close it "
            "when all it does is done, and set up another after the replacement",
            entry=name,
        )
    return Refusal(Code.SYSTEM_ERROR, f"{request.type} could not be sent, and wasn't: {error.strerror or error}")


def _outcome(request: m.Request) -> str:
    """What is known when the connection ended before `request` was answered."""
    match request:
        case m.Finalize():
            return (
                f"Whether the session is preserved is unknown: `show` by its id {request.session_id.hex()} tells, "
                "and to finalize again with the same id (finalize_again) does no harm"
            )
        case m.Finish():
            return (
                f"Whether luod has let go of the session is unknown: `show` by its id {request.session_id.hex()} tells, "
                "and to finish again with the same id does no harm"
            )
        case m.Discard():
            return "Whether the session is gone is unknown: `show` tells"
        case m.Open() | m.Preserve() | m.Unpreserve() | m.Cancel():
            return "The session wasn't finalized, so it ends with its connection and nothing is preserved: begin again"
        case m.Claim() | m.Retrieve() | m.Release():
            return "The claim ends with its connection and the session stays preserved: claim it again"
        case m.Upgrade():
            return "Whether luod was replaced is unknown: `status` tells, by the generation"
        case _:
            return "Ask again on another connection"
