"""The socket between an old daemon and its successor: handover messages with their fds, either way."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from contextlib import suppress

import trio

from luod.inflight import insist
from luod.succession.messages import CODEC, Declined, Handover, fds_of
from luod_protocol import wire
from luod_protocol.errors import FaultCode, ProtocolFault
from luod_protocol.fds import OwnedFd


def decline(sock: socket.socket, reason: str) -> None:
    """The last words of a successor that can't even begin: before it has an event loop.

    Args:
        sock: the handover socket, borrowed.
        reason: for whoever asked for the upgrade.
    """
    with suppress(OSError):
        wire.send(sock, CODEC.encode(Declined(reason=reason)), flags=socket.MSG_DONTWAIT)


class Channel:
    """One end. Owns the socket.

    Sends are whole and in order, also when several tasks send: the lock is fair. Cancelling a send or a receive means that it did not
    happen.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._raw = sock
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._lock = trio.Lock()

    async def send(self, message: Handover, fds: Sequence[int] = ()) -> None:
        """Send `message` with borrowed fds.

        Raises:
            OSError: EPIPE when the other end is closed or deaf, ETOOMANYREFS when others of this uid have too many fds in flight.
        """
        data = CODEC.encode(message)
        async with self._lock:
            await insist(lambda: wire.send_async(self._sock, data, fds))

    def send_now(self, message: Handover, fds: Sequence[int] = ()) -> None:
        """Send `message` with borrowed fds, without waiting. Only while no other task sends.

        Raises:
            OSError: as `send`, and BlockingIOError when the queue is full.
        """
        wire.send(self._raw, CODEC.encode(message), fds, flags=socket.MSG_DONTWAIT)

    async def send_fast(self, message: Handover, fds: Sequence[int] = ()) -> None:
        """As `send_now`, but waits where the queue is full. In a pause each pass through the event loop counts."""
        try:
            self.send_now(message, fds)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                raise
            await self.send(message, fds)

    async def receive(self) -> tuple[Handover, list[OwnedFd]] | None:
        """The next message and its fds, which the caller owns; None at the end, when all that was queued is read. Waits only when
        nothing is queued.

        Raises:
            ProtocolFault: it is no handover message, or its fds are not as many as it says.
        """
        try:
            packet = wire.receive(self._raw, flags=socket.MSG_DONTWAIT, resets=True)
        except BlockingIOError:
            packet = await wire.receive_async(self._sock, resets=True)
        if packet is None:
            return None
        with packet:
            message = CODEC.decode(packet.data)
            if fds_of(message) != len(packet.fds):
                raise ProtocolFault(FaultCode.FD_COUNT, f"{message.type} takes {fds_of(message)} fds, {len(packet.fds)} came")
            return message, packet.take_fds()

    def deafen(self) -> None:
        """From here on nothing more can be sent to this end; what is queued can still be received, then comes the end."""
        with suppress(OSError):
            self._raw.shutdown(socket.SHUT_RD)

    def close(self, reason: str = "") -> bool:
        """Close it, after a last `declined` when there is a reason and room.

        Returns:
            Whether the other end will know: it was sent this, or has closed its end.
        """
        told = True
        if self._raw.fileno() == -1:
            return told
        if reason:
            try:
                self.send_now(Declined(reason=reason))
            except BrokenPipeError:
                pass
            except OSError:
                told = False
        self._sock.close()
        return told
