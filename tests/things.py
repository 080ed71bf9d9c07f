"""Things to preserve, and how to see from outside that luod has let go of them.

The peer of a pipe or a socket sees its end when the last copy of the other end is closed, wherever that copy was.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Generator
from contextlib import contextmanager

import luod_client
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import SessionInfo
from processes import LIMIT_S


@contextmanager
def pipe() -> Generator[tuple[OwnedFd, OwnedFd]]:
    """A pipe: the end to read and the end to write."""
    read, write = os.pipe2(os.O_CLOEXEC)
    with OwnedFd(read) as reader, OwnedFd(write) as writer:
        yield reader, writer


@contextmanager
def watched_pipe(session: luod_client.Session, name: str = "pipe") -> Generator[OwnedFd]:
    """A pipe whose end to write only luod has, preserved in `session`; yields the end to read."""
    with pipe() as (read, write):
        session.preserve({name: write.fileno()})
        write.close()
        yield read


def memfd(content: bytes = b"", *, flags: int = os.MFD_ALLOW_SEALING) -> OwnedFd:
    """A memfd with `content`, its position at the end. The caller owns it."""
    fd = OwnedFd(os.memfd_create("test", flags | os.MFD_CLOEXEC))
    os.write(fd.fileno(), content)
    return fd


def eventfd(count: int = 0) -> OwnedFd:
    """An eventfd. The caller owns it."""
    return OwnedFd(os.eventfd(count, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def unix_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected stream sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def let_go(peer: OwnedFd | socket.socket, limit_s: float = LIMIT_S) -> bool:
    """Whether the other end of a pipe or socket, which nobody writes to, has no owner any more, at the latest in `limit_s` seconds."""
    poll = select.poll()
    poll.register(peer.fileno(), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(limit_s * 1000))


def same_file(first: int, second: int) -> bool:
    """Whether two fds (borrowed) are of one kernel object."""
    return os.path.sameopenfile(first, second)


def preserve_pipe(runtime_dir: str, name: str = "guest") -> tuple[OwnedFd, bytes]:
    """A preserved session whose one entry `pipe` is the end to write of a pipe. Returns the end to read, owned, and the session's id."""
    with luod_client.serialize(name, runtime_dir=runtime_dir) as session, pipe() as (read, write):
        session.preserve({"pipe": write.fileno()})
        session.finalize()
        return OwnedFd(read.take()), session.id


def find(runtime_dir: str, name: str = "guest") -> SessionInfo | None:
    """What `list` says of a session."""
    with luod_client.deserialize(runtime_dir=runtime_dir) as looker:
        return next((each for each in looker.list() if each.session == name), None)


def state(runtime_dir: str, name: str = "guest") -> str:
    """The state of a session; `gone` when there is none."""
    found = find(runtime_dir, name)
    return found.state if found else "gone"
