"""The runtime directory: its lock, and the three listening sockets.

Theory. Whoever holds the lock (flock of DIR/lock) is the daemon of DIR, or its successor: the lock is taken before anything is bound, and
the open file that holds it is passed on in a handover, so there is no moment without it.

Happy path: make the directory, take the lock, replace what a dead daemon left, bind, listen.

Unhappy paths:
1. Another daemon lives: `AlreadyServed` with its pid; nothing is touched.
2. The directory isn't ours, or can't be made: `CannotListen` says what to do.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Final

from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint

LOCK_NAME: Final = "lock"
BACKLOG: Final = 512
"""Connections that the kernel keeps until luod accepts them."""

MODES: Final = {Endpoint.SERIALIZE: 0o660, Endpoint.DESERIALIZE: 0o660, Endpoint.CONTROL: 0o600}
"""Who may connect: the socket's group to serialize and deserialize, the owner alone to control."""


class AlreadyServed(LuodError):
    """Another luod serves this directory."""


class CannotListen(LuodError):
    """The sockets can't be made."""


def lock(directory: str) -> OwnedFd:
    """Make the runtime directory if need be, and take its lock. The caller owns the lock.

    Raises:
        AlreadyServed: somebody has it.
        CannotListen: the directory can't be used.
    """
    try:
        with suppress(FileExistsError):
            os.mkdir(directory, 0o755)
        found = os.stat(directory)
        if not stat.S_ISDIR(found.st_mode):
            raise CannotListen(f"{directory} is not a directory: say --runtime-dir DIR")
        if found.st_uid != os.geteuid():
            raise CannotListen(f"{directory} belongs to uid {found.st_uid}, luod runs as uid {os.geteuid()}: say --runtime-dir DIR")
        file = OwnedFd(os.open(f"{directory}/{LOCK_NAME}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644))
    except OSError as error:
        raise CannotListen(f"the runtime directory {directory} can't be used: {error.strerror}; say --runtime-dir DIR") from None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file.fileno(), 32, 0).decode("ascii", "replace").strip()
        file.close()
        raise AlreadyServed(
            f"another luod (process {holder or 'unknown'}) serves {directory}: `luoctl upgrade` or `luod --takeover` replaces it "
            "and keeps what it holds"
        ) from None
    return file


def sign(lock_fd: int) -> None:
    """Write this process's pid into the lock (borrowed), for people."""
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, f"{os.getpid()}\n".encode("ascii"), 0)


def bind(directory: str, endpoints: Iterable[Endpoint] = Endpoint) -> dict[Endpoint, socket.socket]:
    """The sockets of `endpoints`, bound and listening. The lock must be held: what lies there is a dead daemon's, and is replaced.

    Raises:
        CannotListen: one of them can't be made.
    """
    with ExitStack() as undo:
        sockets: dict[Endpoint, socket.socket] = {}
        for endpoint in endpoints:
            mode = MODES[endpoint]
            path = f"{directory}/{endpoint}"
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            try:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                before = os.umask(0o777 & ~mode)
                try:
                    sock.bind(path)
                finally:
                    os.umask(before)
                undo.callback(_unlink, path)
                sock.listen(BACKLOG)
            except OSError as error:
                raise CannotListen(f"{path} can't be bound: {error.strerror or error}") from None
            sockets[endpoint] = sock
        undo.pop_all()
        return sockets


def unbind(directory: str, endpoints: Iterable[Endpoint]) -> None:
    """Remove the files of sockets that `bind` made. For a daemon that ends with nobody after it."""
    for endpoint in endpoints:
        _unlink(f"{directory}/{endpoint}")


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
