"""A live connection as it crosses a handover: described by the old daemon, revived by its successor.

What crosses is the socket itself and where the conversation is; who is at the other end the kernel still knows (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from luod.connection import Connection, Host, Unread
from luod.custody import Client
from luod.lifecycle import SessionEvent, SessionState
from luod.succession.messages import Connection as LiveConnection
from luod.succession.messages import Handover, UnreadFds, UnreadReply
from luod_protocol.connection import ServerConnection, State
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint

_UCRED = struct.Struct("iII")
"""struct ucred: pid, uid, gid."""


def peer(sock: socket.socket) -> tuple[int, int]:
    """Pid and uid of the process that connected, as they were then; pid 0 when it can't be seen from here."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


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
    )
    return [*parts, (live, [connection.raw.fileno()])]


def revive(host: Host, live: LiveConnection, fd: OwnedFd, unread: Unread | None) -> Connection:
    """The connection that `live` describes; it owns `fd` and the fds of `unread` from here."""
    sock = socket.socket(fileno=fd.take())
    session = host.custody.store.by_id(live.session_id) if live.session_id else None
    client = Client(uid=peer(sock)[1], process=live.client, session=session)
    if session is not None and session.state is SessionState.PRESERVED:
        session.step(SessionEvent.CLAIM)
        session.claimer = live.client
    protocol = ServerConnection(Endpoint(live.endpoint), version=live.version, state=State(live.state))
    connection = Connection(host=host, sock=sock, client=client, protocol=protocol)
    connection.unread = unread
    connection.upgrade_seq = live.upgrade_seq
    connection.lost_events = live.lost
    return connection
