"""Sockets of the families unix, inet, inet6, netlink, vsock and packet: listening, connected, or neither.

Told by the file type; family, type and protocol are asked of the socket (socket(7): SO_DOMAIN, SO_TYPE, SO_PROTOCOL, SO_ACCEPTCONN).

Preserved: the socket with its backlog, its buffers and its connection; peers notice nothing. Options stay. A path in the file system that a
unix socket is bound to isn't the socket's: nobody must unlink it.

By family, while luod has the socket:
* netlink: it stays in its groups under its port id. Notifications fill its receive buffer, then are lost, and the first read says ENOBUFS:
  the client must ask for the whole state again. Where the kernel waits for answers (NFQUEUE), nobody answers.
* vsock: as inet. The guest's end of a connection to the host lives as long as the guest does.
* packet: it goes on receiving, up to its buffer or ring; the ring is the socket's, and is mapped anew. Taken because a VMM may have one as
  the other side of a network card, it can't be opened again without CAP_NET_RAW, and there is nothing in it that the others don't have. Not
  taken: AF_XDP, whose packets are in the memory of the process that made it.

Addresses are told only where the kernel tells them without waiting for the owners of the socket, see `luod.handlers.kernel`: not those of
inet and vsock sockets.
"""

from __future__ import annotations

import socket
import stat
import struct
from collections.abc import Collection, Mapping
from typing import ClassVar, Final

from luod.handlers.base import Mismatch, Probe
from luod.handlers.kernel import printable, socket_name, socket_option
from luod_protocol.records import Fact

_VSOCK: Final = 40
"""AF_VSOCK, for which a Python may have been built without a name."""

FAMILIES: Final[Mapping[int, str]] = {
    socket.AF_UNIX: "unix",
    socket.AF_INET: "inet",
    socket.AF_INET6: "inet6",
    socket.AF_NETLINK: "netlink",
    socket.AF_PACKET: "packet",
    _VSOCK: "vsock",
}

_TYPES: Final[Mapping[int, str]] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "dgram",
    socket.SOCK_SEQPACKET: "seqpacket",
    socket.SOCK_RAW: "raw",
}


class Socket:
    """Sockets of these families."""

    kind: ClassVar[str] = "socket"
    compatible: ClassVar[str] = "socket-v1"

    def recognize(self, probe: Probe) -> bool:
        """By file type and family."""
        return probe.type == stat.S_IFSOCK and probe.opened and family(probe.fd) in FAMILIES

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Family, type, protocol number, and whether it listens (1 or 0).

        Of a unix socket also whether it is connected (1 or 0) and its address as text, of a netlink socket its port id and its first 32
        groups as a bit mask, of a packet socket the index of its interface (0: all).
        """
        return {
            **_nature(probe.fd),
            "listening": socket_option(probe.fd, socket.SO_ACCEPTCONN),
            **_address(probe.fd),
        }

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """Family, type and protocol are the same; whether it listens and where it is bound is its owners' to change."""
        for fact, value in _nature(probe.fd).items():
            before = facts.get(fact)
            if value != before and (fact, before, value) != _LEFT_INET6:
                raise Mismatch(f"the socket's {fact} is {value}, it was {before}")


_LEFT_INET6: Final = ("family", "inet6", "inet")
"""The one change of family that the owner of a socket can make: IPV6_ADDRFORM of ipv6(7)."""


def ends_at(fd: int, addresses: Collection[bytes]) -> bool:
    """Whether a unix socket (borrowed) has one of these addresses (struct sockaddr), or is connected to one that has: a listening socket,
    what it accepted, and what connected to it."""
    if not addresses or family(fd) != socket.AF_UNIX:
        return False
    names = [socket_name(fd)]
    if _is_connected(fd):
        names.append(socket_name(fd, peer=True))
    return any(name in addresses for name in names)


def family(fd: int) -> int:
    """The address family of a socket (borrowed)."""
    return socket_option(fd, socket.SO_DOMAIN)


def _nature(fd: int) -> dict[str, Fact]:
    kind = socket_option(fd, socket.SO_TYPE)
    return {
        "family": FAMILIES[family(fd)],
        "type": _TYPES.get(kind, str(kind)),
        "protocol": socket_option(fd, socket.SO_PROTOCOL),
    }


def _address(fd: int) -> dict[str, Fact]:
    match family(fd):
        case socket.AF_UNIX:
            return {"connected": int(_is_connected(fd)), "address": _path(socket_name(fd)[2:])}
        case socket.AF_NETLINK:
            port, groups = struct.unpack_from("=4xII", socket_name(fd))
            return {"port": port, "groups": groups}
        case socket.AF_PACKET:
            (interface,) = struct.unpack_from("=4xi", socket_name(fd))
            return {"interface": interface}
        case _:
            return {}


def _is_connected(fd: int) -> bool:
    try:
        socket_name(fd, peer=True)
    except OSError:
        return False
    return True


def _path(path: bytes) -> str:
    """What unix(7) calls sun_path: nothing, an abstract name after a NUL, or a path with a NUL behind it."""
    if path.startswith(b"\0"):
        return "@" + printable(path[1:])
    return printable(path.partition(b"\0")[0])
