"""The entries of the soak's sessions as file descriptors: made, and looked at when they come back.

`fault` takes nothing out, so it can be asked any number of times; `emptied` does, for the last one who has them.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import struct
import termios
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from luod_protocol.fds import OwnedFd
from soak.plan import Entry, Kind

SEALS: Final = {
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "write": fcntl.F_SEAL_WRITE,
    "future-write": 0x10,
}
_WHO: Final = struct.Struct("<Q")


def _bits(names: Iterable[str]) -> int:
    bits = 0
    for name in names:
        bits |= SEALS[name]
    return bits


def make(entry: Entry) -> tuple[OwnedFd, OwnedFd | None]:
    """The entry, and its other end if it has one; the caller owns both."""
    match entry.kind:
        case Kind.MEMFD:
            fd = OwnedFd(os.memfd_create("soak", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.write(fd.fileno(), entry.content)
            os.lseek(fd.fileno(), entry.number, os.SEEK_SET)
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _bits(entry.seals))
            return fd, None
        case Kind.EVENTFD:
            fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            os.eventfd_write(fd.fileno(), entry.number)
            return fd, None
        case Kind.WRITE_END | Kind.READ_END:
            read, write = (OwnedFd(fd) for fd in os.pipe2(os.O_CLOEXEC))
            os.write(write.fileno(), entry.content)
            return (read, write) if entry.kind is Kind.READ_END else (write, read)
        case Kind.SOCKET:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            there.sendall(entry.content)
            return OwnedFd(here.detach()), OwnedFd(there.detach())
        case Kind.LISTENER:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting,
            ):
                listener.bind("")  # unix(7): an abstract name that the kernel chooses
                listener.listen(1)
                waiting.connect(listener.getsockname())
                waiting.sendall(entry.content)
                return OwnedFd(listener.detach()), OwnedFd(waiting.detach())


def who(fd: int) -> bytes:
    """Which file a fd (borrowed) is: to be kept in its metadata."""
    found = re.search(r"^eventfd-id:\s*(\d+)", _fdinfo(fd), re.MULTILINE)
    return _WHO.pack(int(found[1]) if found else os.fstat(fd).st_ino)


def fault(entry: Entry, metadata: bytes, fd: int) -> str:
    """What isn't right with an entry that came back (borrowed); empty when all is."""
    what = _fault(entry, fd)
    if not what and metadata != entry.metadata + who(fd):
        what = f"it is another file: {metadata!r} was kept with it, it is {who(fd)!r}"
    return what and f"entry {entry.name}: {what}"


def _fault(entry: Entry, fd: int) -> str:
    is_, was = "", ""
    match entry.kind:
        case Kind.MEMFD:
            is_, was = _memfd(fd), repr((entry.content, entry.number, _bits((*entry.seals, *entry.sealed))))
        case Kind.EVENTFD:
            found = re.search(r"eventfd-count:\s*([0-9a-f]+)", _fdinfo(fd))
            is_, was = found[1] if found else "no eventfd", f"{entry.number:x}"
        case Kind.READ_END:
            is_, was = str(_unread(fd)), str(len(entry.content))
        case Kind.SOCKET:
            with socket.socket(fileno=os.dup(fd)) as sock:
                is_, was = repr(sock.recv(65536, socket.MSG_PEEK | socket.MSG_DONTWAIT)), repr(entry.content)
        case Kind.LISTENER:
            is_, was = str(bool(select.select([fd], [], [], 0)[0])), "True"
        case Kind.WRITE_END:
            is_, was = str(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE), str(os.O_WRONLY)
    return "" if is_ == was else f"it is {is_:.200}, it was {was:.200}"


def _memfd(fd: int) -> str:
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    return repr((content, os.lseek(fd, 0, os.SEEK_CUR), fcntl.fcntl(fd, fcntl.F_GET_SEALS)))


def _unread(fd: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(count)


def _fdinfo(fd: int) -> str:
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


def emptied(entry: Entry, fd: int) -> str:
    """Take out what is in a pipe, and take the connection that waits (fd borrowed). What isn't right; empty when all is."""
    content = entry.content
    if entry.kind is Kind.READ_END:
        content = os.read(fd, 65536)
    elif entry.kind is Kind.LISTENER:
        with socket.socket(fileno=os.dup(fd)) as listener, listener.accept()[0] as waiting:
            content = waiting.recv(65536)
    return "" if content == entry.content else f"entry {entry.name}: {content[:60]!r} was in it, not {entry.content[:60]!r}"
