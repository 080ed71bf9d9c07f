"""The only code that passes fds: one packet with its fds, sent or received whole or not at all.

Theory. A message is one SEQPACKET packet, its fds come in one SCM_RIGHTS array. `send` and `receive` are for blocking sockets,
`send_async` and `receive_async` for trio's (or whatever has the same two methods); the rest is shared and does no I/O of its own.
A message over `MAX_PACKET_BYTES` is put into a sealed memfd, which goes ahead of the message's own fds, and the packet says `bulk`.

Happy path: `receive` gives a `Packet` that owns its fds. `None` is the end of the connection.

Unhappy paths:
1. The peer sent more than a packet may hold (MSG_TRUNC), or its fds did not fit (MSG_CTRUNC: our buffer has room for all that the
   kernel passes, so this process is at RLIMIT_NOFILE): the fds that did arrive are closed, `ProtocolFault`. A part is never used.
2. Ancillary data that isn't SCM_RIGHTS: never asked for, ignored.
3. A packet of no bytes can't be told from the end on a SEQPACKET socket: it is taken for the end, its fds are closed.
4. fds are to be closed that nobody asked for: `dispose` does it, for a close may wait for whoever sent them (a file of a FUSE mount).
5. A peer that died with our last message unread gives ECONNRESET once, before what it had sent: reported as the end for a client
   (`receive`); a handover, for which what was queued matters, asks for `resets=True` and reads on.

Invariants: every descriptor that arrives is close-on-exec and owned before a byte is looked at. Cancelling an async call means that the
packet was not sent, or not received.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Final, Protocol, TypeAlias

from luod_protocol.codec import bulk_size, encode_bulk
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.fds import OwnedFd, close_all, own
from luod_protocol.limits import MAX_BULK_BYTES, MAX_FDS_PER_PACKET, MAX_PACKET_BYTES
from luod_protocol.sealed import read_sealed, seal_bytes

_FD_BYTES: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_FDS_PER_PACKET * _FD_BYTES)
_FLAGS: Final = socket.MSG_CMSG_CLOEXEC

Ancillary: TypeAlias = list[tuple[int, int, bytes]]
Received: TypeAlias = tuple[bytes, Ancillary, int, object]
Dispose: TypeAlias = Callable[[list[OwnedFd]], object]


class AsyncSocket(Protocol):
    """What the async calls need of a socket: trio.socket.SocketType has it."""

    async def sendmsg(self, buffers: Iterable[bytes], ancdata: Iterable[tuple[int, int, bytes]] = ..., /) -> int: ...

    def recvmsg(self, bufsize: int, ancbufsize: int = ..., flags: int = ..., /) -> Awaitable[Received]: ...


class Packet:
    """What came in one packet: the bytes, and the fds, which it owns until they are taken."""

    __slots__ = ("data", "fds")

    def __init__(self, data: bytes, fds: list[OwnedFd]) -> None:
        self.data = data
        self.fds = fds

    def take_fds(self) -> list[OwnedFd]:
        """Move the fds out."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close what was not taken."""
        close_all(self.take_fds())

    def __enter__(self) -> Packet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _rights(fds: Sequence[int]) -> Ancillary:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def _packet(received: Received, dispose: Dispose) -> Packet | None:
    data, ancillary, flags, _ = received
    numbers = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    packet = Packet(data, own(numbers))
    try:
        if flags & socket.MSG_CTRUNC:
            raise ProtocolFault(
                FaultCode.TRUNCATED,
                f"only {len(numbers)} of the fds arrived: the receiver has reached its RLIMIT_NOFILE; send fewer, or raise its limit",
            )
        if flags & socket.MSG_TRUNC:
            raise ProtocolFault(FaultCode.PACKET_TOO_LARGE, f"a packet holds at most {MAX_PACKET_BYTES} bytes: send more as bulk")
        if not data:
            dispose(packet.take_fds())
            return None
        return _unbulk(packet)
    except BaseException:
        dispose(packet.take_fds())
        raise


def _unbulk(packet: Packet) -> Packet:
    size = bulk_size(packet.data)
    if size is None:
        return packet
    if not packet.fds:
        raise ProtocolFault(FaultCode.FD_COUNT, "bulk comes with a memfd as its first fd, none came")
    packet.data = read_sealed(packet.fds[0].fileno(), size)
    # Now it is known to be a memfd.
    packet.fds.pop(0).close()
    return packet


class _Outgoing:
    """A message ready for sendmsg: as it is, or as bulk with its memfd, which is closed at the end."""

    def __init__(self, data: bytes, fds: Sequence[int]) -> None:
        self._memfd: OwnedFd | None = None
        if len(data) > MAX_BULK_BYTES:
            raise Refusal(Code.TOO_LARGE, f"a message of {len(data)} bytes, at most {MAX_BULK_BYTES} can be sent: split it")
        if len(data) > MAX_PACKET_BYTES:
            if len(fds) >= MAX_FDS_PER_PACKET:
                raise Refusal(Code.TOO_LARGE, f"{len(fds)} fds with {len(data)} bytes: one fd fewer fits, or shorter metadata")
            self._memfd = seal_bytes(data, "luod-bulk")
            fds = [self._memfd.fileno(), *fds]
            data = encode_bulk(len(data))
        self.data = data
        self.rights = _rights(fds)

    def __enter__(self) -> _Outgoing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._memfd is not None:
            self._memfd.close()


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = (), *, flags: int = 0) -> None:
    """Send one message with borrowed fds.

    Args:
        sock: a SEQPACKET socket.
        flags: for sendmsg(2), such as MSG_DONTWAIT.

    Raises:
        Refusal: too large.
        OSError: as sendmsg(2); nothing was sent.
    """
    with _Outgoing(data, fds) as out:
        sock.sendmsg([out.data], out.rights, flags | socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, *, flags: int = 0, resets: bool = False, dispose: Dispose = close_all) -> Packet | None:
    """Receive one message, or None at the end of the connection. The caller owns the packet.

    Args:
        sock: a SEQPACKET socket.
        flags: for recvmsg(2), such as MSG_DONTWAIT.
        resets: see unhappy path 5.
        dispose: takes over fds that the caller doesn't get, to close them.

    Raises:
        ProtocolFault: unhappy path 1, or bulk that isn't as it must be.
        OSError: as recvmsg(2).
    """
    while True:
        try:
            return _packet(sock.recvmsg(MAX_PACKET_BYTES, _ANCILLARY_BYTES, flags | _FLAGS), dispose)
        except ConnectionResetError:
            if not resets:
                return None


async def send_async(sock: AsyncSocket, data: bytes, fds: Sequence[int] = ()) -> None:
    """`send` for trio. Cancelled: nothing was sent."""
    with _Outgoing(data, fds) as out:
        await sock.sendmsg([out.data], out.rights)


async def receive_async(sock: AsyncSocket, *, resets: bool = False) -> Packet | None:
    """`receive` for trio. Cancelled: nothing was received."""
    while True:
        try:
            received = await sock.recvmsg(MAX_PACKET_BYTES, _ANCILLARY_BYTES, _FLAGS)
        except ConnectionResetError:
            if not resets:
                return None
        else:
            return _packet(received, close_all)
