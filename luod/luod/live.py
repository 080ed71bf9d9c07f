"""A live connection as it crosses a handover: described by the old daemon, revived by its successor.

What crosses is the socket itself and where the conversation is; who is at the other end the kernel still knows (SO_PEERCRED of unix(7),
and SO_PEERGROUPS).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import socket
import struct
from collections.abc import Sequence
from typing import Final

from luod.connection import Connection, Host, Unread
from luod.custody import Client
from luod.lifecycle import SessionEvent, SessionState
from luod.policy import Peer
from luod.succession.messages import Connection as LiveConnection
from luod.succession.messages import Handover, UnreadFds, UnreadReply
from luod_protocol.connection import ServerConnection, State
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint

_UCRED = struct.Struct("iII")
"""struct ucred: pid, uid, gid."""

SO_PEERGROUPS: Final = 59
"""include/uapi/asm-generic/socket.h: the supplementary groups of whoever connected, as gid_t."""

PYTHONS_MAX_OPTION_BYTES: Final = 1024
"""socket.getsockopt takes no larger buffer: room for 256 groups."""

NGROUPS_MAX: Final = 65_536
"""include/uapi/linux/limits.h."""

_GID = struct.Struct("I")
_libc = ctypes.CDLL(None, use_errno=True)


def peer(sock: socket.socket) -> tuple[int, Peer]:
    """The process that connected, as it was then: its pid (0 when it can't be seen from here), and who it was."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, Peer(uid=uid, groups=(frozenset(_other_groups(sock)) | {gid}) - _nobodys_groups())


def _other_groups(sock: socket.socket) -> Sequence[int]:
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, PYTHONS_MAX_OPTION_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        room = ctypes.create_string_buffer(NGROUPS_MAX * _GID.size)
        size = ctypes.c_int(len(room))
        if _libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, room, ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), "SO_PEERGROUPS") from None
        data = room.raw[: size.value]
    return [gid for (gid,) in _GID.iter_unpack(data)]


@functools.cache
def _nobodys_groups() -> frozenset[int]:
    """The gid as which the kernel shows all those that aren't mapped here, when there are any: no rule can mean them."""
    with open("/proc/self/gid_map", encoding="ascii") as mapped, open("/proc/sys/kernel/overflowgid", encoding="ascii") as overflow:
        return frozenset() if mapped.read().split() == ["0", "0", "4294967295"] else frozenset({int(overflow.read())})


def describe(connection: Connection) -> list[tuple[Handover, Sequence[int]]]:
    """What a successor needs of `connection`, message by message, with their fds (borrowed)."""
    session = connection.client.session
    parts: list[tuple[Handover, Sequence[int]]] = []
    if connection.unread is not None:
        parts.append((UnreadReply(data=connection.unread.data), ()))
        if connection.unread.fds:
            fds = [fd.fileno() for fd in connection.unread.fds]
            parts.append((UnreadFds(count=len(fds)), fds))
    live = LiveConnection(
        endpoint=connection.protocol.endpoint,
        version=connection.protocol.version,
        state=connection.protocol.state,
        client=connection.client.process,
        session_id=session.session_id if session else b"",
        upgrade_seq=connection.upgrade_seq,
        lost=connection.lost_events,
        notices=connection.client.notices,
    )
    return [*parts, (live, [connection.raw.fileno()])]


def revive(host: Host, live: LiveConnection, fd: OwnedFd, unread: Unread | None) -> Connection:
    """The connection that `live` describes; it owns `fd` and the fds of `unread` from here."""
    sock = socket.socket(fileno=fd.take())
    session = host.custody.store.by_id(live.session_id) if live.session_id else None
    client = Client(peer=peer(sock)[1], process=live.client, session=session, notices=live.notices)
    if session is not None and session.state is SessionState.PRESERVED:
        session.step(SessionEvent.CLAIM)
        session.claimer = live.client
    protocol = ServerConnection(Endpoint(live.endpoint), version=live.version, state=State(live.state))
    connection = Connection(host=host, sock=sock, client=client, protocol=protocol)
    connection.unread = unread
    connection.upgrade_seq = live.upgrade_seq
    connection.lost_events = live.lost
    return connection
