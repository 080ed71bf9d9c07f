"""What both clients do with sockets: find luod, and find the fd that the kernel would not pass."""

from __future__ import annotations

import errno
import os
import socket
from typing import Protocol

from luod_client.operations import NotPassed, Send
from luod_protocol import wire
from luod_protocol.errors import Code, LuodError, Refusal
from luod_protocol.messages import Endpoint
from luod_protocol.paths import runtime_dir


class NoDaemon(LuodError):
    """Nothing listens in the runtime directory."""


def new_socket() -> socket.socket:
    """A socket to connect to luod, close-on-exec. The caller closes it."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def address(endpoint: Endpoint, given: str | None) -> str:
    """Where `endpoint` is.

    Args:
        given: the runtime directory, None for this user's.

    Raises:
        Refusal: there is no place to look.
    """
    return f"{runtime_dir(given, os.environ, os.geteuid())}/{endpoint.value}"


def not_connected(path: str, error: OSError) -> LuodError:
    """What a failed connect(2) to `path` means."""
    directory = os.path.dirname(path)
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
        return NoDaemon(
            f"no luod serves {directory} ({error.strerror}): start `luod --runtime-dir {directory}`, or say another --runtime-dir"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refusal(Code.NOT_PERMITTED, f"{path}: {error.strerror}: this user may not connect to this luod")
    return Refusal(Code.SYSTEM_ERROR, f"{path}: can't connect: {error.strerror or error}")


class Endable(Protocol):
    """What `end` needs of a socket: Python's and trio's have it."""

    def fileno(self) -> int: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


def end(sock: Endable) -> None:
    """End a connection, also when a forked process still has a copy of it, and close it. Does nothing the second time."""
    if sock.fileno() == -1:
        return
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
    finally:
        sock.close()


def blame(error: OSError | Refusal, step: Send | None) -> OSError | Refusal:
    """`error` of a failed call, or, when sendmsg(2) failed because of one of the fds in `step`, a `NotPassed` that says which.

    sendmsg(2) doesn't say which fd it refused. Each is tried alone, on a pair of sockets that nobody reads.
    """
    if step is None or isinstance(error, Refusal) or error.errno not in (errno.EINVAL, errno.EBADF):
        return error
    refused = error.errno
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        for index, fd in enumerate(step.fds):
            try:
                wire.send(here, b"?", (fd,), flags=socket.MSG_DONTWAIT)
                with wire.receive(there) or wire.Packet(b"", []):
                    pass
            except OSError as single:
                if single.errno == refused:
                    return NotPassed(refused, os.strerror(refused), index, _what(fd))
    return error


def _what(fd: int) -> str:
    """Where the link of a fd (borrowed) in /proc points; empty when that is unknown."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
