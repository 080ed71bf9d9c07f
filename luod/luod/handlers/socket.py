"""Sockets of the families unix, inet and inet6: listening, connected, or neither.

Told by the file type; family, type and protocol are asked of the socket (socket(7): SO_DOMAIN, SO_TYPE, SO_PROTOCOL, SO_ACCEPTCONN).

Preserved: the socket with its backlog, its buffers and its connection; peers notice nothing. Options stay. A path in the file system that a
unix socket is bound to isn't the socket's: nobody must unlink it.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import ClassVar, Final

from luod.handlers.base import Mismatch, Probe
from luod_protocol.records import Fact

FAMILIES: Final = {socket.AF_UNIX: "unix", socket.AF_INET: "inet", socket.AF_INET6: "inet6"}

_TYPES: Final = {
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
        return probe.type == stat.S_IFSOCK and family(probe.fd) in FAMILIES

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Family, type, protocol number, whether it listens, and its local address as text."""
        # All four arguments: with them the constructor asks the kernel nothing.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=os.dup(probe.fd)) as sock:
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            facts: dict[str, Fact] = {
                "family": FAMILIES[socket.AddressFamily(sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN))],
                "type": _TYPES.get(socket.SocketKind(kind), str(kind)),
                "protocol": sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
                "listening": sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
                "address": _text(sock.getsockname()),
            }
        return facts

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """Family, type and protocol are the same; whether it listens and where it is bound is its owners' to change."""
        now = self.record(probe)
        for fact in ("family", "type", "protocol"):
            if now[fact] != facts.get(fact):
                raise Mismatch(f"the socket's {fact} is {now[fact]}, it was {facts.get(fact)}")


def family(fd: int) -> int:
    """The address family of a socket (borrowed)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=os.dup(fd)) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)


def _text(address: object) -> str:
    if isinstance(address, bytes):
        return "@" + address[1:].decode("utf-8", "replace")
    if isinstance(address, tuple):
        host, port = str(address[0]), str(address[1])  # pyright: ignore[reportUnknownArgumentType]  # typeshed: getsockname() is Any
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return str(address)
