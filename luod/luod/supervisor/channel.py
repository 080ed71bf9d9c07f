"""The socket that NOTIFY_SOCKET names.

Theory. Whoever can send to this socket can fill its queue, and can pass descriptors whose closing hangs. So nobody but this uid (and
root) may: an abstract address would be open to everybody in the network namespace. It is a path, and the mode of its folder and of the
socket say no to others. The path is unlinked at once, so that nothing is left behind, and nobody who tidies up can cut the daemon off:
the address is the magic link of an O_PATH descriptor, /proc/PID/fd/N, which leads to the socket for as long as the parent lives. Who sent
a datagram is said by the kernel (SCM_CREDENTIALS, unix(7)), whatever the sender says.

Invariants: every descriptor that arrives is close-on-exec and owned before a byte is looked at. A datagram that did not arrive whole is
nothing.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from contextlib import suppress
from typing import Final, NamedTuple

from luod.supervisor.message import MAX_MESSAGE_BYTES
from luod_protocol.fds import OwnedFd, own

MAX_FDS: Final = 253
"""SCM_MAX_FD: the kernel passes no more in one message."""

_INT_BYTES: Final = array.array("i").itemsize
_CREDENTIALS: Final = struct.Struct("iII")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(MAX_FDS * _INT_BYTES)
_FOLDERS: Final = ("/run", "/dev/shm", "/tmp", "/var/tmp")


class Datagram(NamedTuple):
    """What arrived. `whole` is false when a part didn't; `pid` is 0 for a process that can't be seen from here."""

    pid: int
    uid: int
    data: bytes
    fds: list[OwnedFd]
    whole: bool


class Channel:
    """The receiving end.

    Raises:
        OSError: no folder can be written to.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._place = _bind(self._socket)
        except BaseException:
            self._socket.close()
            raise
        self.address = f"/proc/{os.getpid()}/fd/{self._place.fileno()}"

    def fileno(self) -> int:
        """The socket, borrowed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()
        self._place.close()

    def receive(self) -> Datagram | None:
        """The next datagram, or None when there is none now. The caller owns its descriptors.

        Raises:
            OSError: as recvmsg(2).
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(MAX_MESSAGE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        numbers = array.array("i")
        pid, uid = 0, -1
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(content[: len(content) - len(content) % _INT_BYTES])
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(content) == _CREDENTIALS.size:
                pid, uid, _ = _CREDENTIALS.unpack(content)
        return Datagram(pid, uid, data, own(numbers), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def _bind(sock: socket.socket) -> OwnedFd:
    """Bind `sock` to a path that is gone when this returns. Returns an O_PATH descriptor of it."""
    error = OSError("no folder")
    for base in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), *_FOLDERS)):
        folder = f"{base}/luod-{os.urandom(8).hex()}"
        try:
            os.mkdir(folder, 0o700)
        except OSError as failed:
            error = failed
            continue
        try:
            sock.bind(f"{folder}/notify")
            os.chmod(f"{folder}/notify", 0o600)
            return OwnedFd(os.open(f"{folder}/notify", os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW))
        except OSError as failed:
            error = failed
        finally:
            with suppress(OSError):
                os.unlink(f"{folder}/notify")
            with suppress(OSError):
                os.rmdir(folder)
    raise error
