"""Sockets of the families unix, inet and inet6: listening, connected, or neither.

Told by the file type; family, type and protocol are asked of the socket (socket(7): SO_DOMAIN, SO_TYPE, SO_PROTOCOL, SO_ACCEPTCONN).

Preserved: the socket with its backlog, its buffers and its connection; peers notice nothing. Options stay. A path in the file system that a
unix socket is bound to isn't the socket's: nobody must unlink it.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Final

from luod.handlers.base import Mismatch, Probe
from luod.handlers.kernel import printable
from luod_protocol.records import Fact

FAMILIES: Final[Mapping[int, str]] = {socket.AF_UNIX: "unix", socket.AF_INET: "inet", socket.AF_INET6: "inet6"}

_TYPES: Final[Mapping[int, str]] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "dgram",
    socket.SOCK_SEQPACKET: "seqpacket",
    socket.SOCK_RAW: "raw",
}


class Socket:
    """Unix and inet sockets."""

    kind: ClassVar[str] = "socket"
    compatible: ClassVar[str] = "socket-v1"

    def recognize(self, probe: Probe) -> bool:
        """By file type and family."""
        return probe.type == stat.S_IFSOCK and probe.opened and family(probe.fd) in FAMILIES

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Family, type, protocol number, whether it listens and whether it is connected (1 or 0), and its local address as text."""
        with _borrowed(probe.fd) as sock:
            return {
                **_nature(sock),
                "listening": sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
                "connected": int(_is_connected(sock)),
                "address": _text(sock.getsockname()),
            }

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """Family, type and protocol are the same; whether it listens and where it is bound is its owners' to change."""
        with _borrowed(probe.fd) as sock:
            now = _nature(sock)
        for fact, value in now.items():
            before = facts.get(fact)
            if value != before and (fact, before, value) != _LEFT_INET6:
                raise Mismatch(f"the socket's {fact} is {value}, it was {before}")


_LEFT_INET6: Final = ("family", "inet6", "inet")
"""The one change of family that the owner of a socket can make: IPV6_ADDRFORM of ipv6(7)."""


def family(fd: int) -> int:
    """The address family of a socket (borrowed)."""
    with _borrowed(fd) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)


@contextmanager
def _borrowed(fd: int) -> Generator[socket.SocketType]:
    # The plain C class and all four arguments: so the constructor is quick and asks the kernel next to nothing.
    sock = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    try:
        yield sock
    finally:
        sock.detach()


def _nature(sock: socket.SocketType) -> dict[str, Fact]:
    domain, kind = (sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_DOMAIN, socket.SO_TYPE))
    return {
        "family": FAMILIES[domain],
        "type": _TYPES.get(kind, str(kind)),
        "protocol": sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
    }


def _is_connected(sock: socket.SocketType) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _text(address: object) -> str:
    if isinstance(address, bytes):
        return "@" + printable(address[1:])
    if isinstance(address, tuple):
        host, port = str(address[0]), str(address[1])  # pyright: ignore[reportUnknownArgumentType]  # typeshed: getsockname() is Any
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return printable(os.fsencode(str(address)))
