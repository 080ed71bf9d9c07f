"""A peer that says what a test wants: for answers that a real luod never gives, or loses. It speaks the real protocol otherwise."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from luod_protocol import messages as m
from luod_protocol.connection import ServerConnection, State
from luod_protocol.limits import MAX_FDS_PER_PACKET, MAX_PACKET_BYTES
from luod_protocol.messages import Endpoint
from luod_protocol.wire import receive, send

R = TypeVar("R", bound=m.Request)

LIMITS = m.Limits(
    packet_bytes=MAX_PACKET_BYTES,
    bulk_bytes=16 << 20,
    fds_per_packet=MAX_FDS_PER_PACKET,
    name_bytes=255,
    metadata_bytes=32 << 10,
    entries_per_session=16_384,
    preserved_fds=100_000,
)
STALLED_SECONDS = 10.0
"""A script that waits this long for the client has found a fault in it."""

SESSION_ID = bytes(range(16))


def info(name: str = "guest") -> m.SessionInfo:
    """A preserved session."""
    return m.SessionInfo(
        session_id=SESSION_ID,
        session=name,
        owner=0,
        state="preserved",
        entries=0,
        opened_at=1.0,
        finalized_at=2.0,
        generation=1,
        claimed_by=0,
        retrieved_by=(),
        survives=(),
    )


def entry(name: str) -> m.EntryInfo:
    """A preserved memfd."""
    return m.EntryInfo(name=name, kind="memfd", compatible="memfd-v1", metadata=b"", needs=(), facts={})


def welcome(seq: int) -> m.Welcome:
    """The answer to hello."""
    return m.Welcome(seq=seq, version=1, luod="0", generation=1, limits=LIMITS)


def status(seq: int) -> m.DaemonStatus:
    """The answer to status."""
    return m.DaemonStatus(
        seq=seq,
        luod="0",
        pid=1,
        generation=1,
        started_at=0.0,
        sessions_open=0,
        sessions_preserved=0,
        sessions_claimed=0,
        preserved_fds=0,
        staged_fds=0,
        connections=1,
        open_fds=9,
        last_pause_us=0,
        manager="",
        stored_fds=0,
        store_limit=0,
        sessions_opaque=0,
    )


class Peer:
    """One accepted connection."""

    def __init__(self, sock: socket.socket, endpoint: Endpoint) -> None:
        self.sock = sock
        self._server = ServerConnection(endpoint)

    def take(self) -> m.Request:
        """The next request. Its fds are closed."""
        packet = receive(self.sock)
        assert packet is not None, "the client has left"
        with packet:
            request = self._server.receive(packet.data, len(packet.fds))
        self._server.begin(request)
        return request

    def say(self, reply: m.Reply, fds: Sequence[int] = ()) -> None:
        """Send a message, right or wrong."""
        send(self.sock, self._server.send(reply), fds)

    def greet(self) -> None:
        """Take hello and answer it."""
        hello = self.take()
        assert isinstance(hello, m.Hello)
        self.say(welcome(hello.seq))

    def opened(self) -> None:
        """Take hello and open, and answer them."""
        self.greet()
        request = self.taken(m.Open)
        self.say(m.Opened(seq=request.seq, session_id=request.session_id))

    def claimed(self, *names: str) -> None:
        """Take hello and claim, and answer them: the session has memfds with these names."""
        self.greet()
        request = self.taken(m.Claim)
        self.say(m.Claimed(seq=request.seq, info=info(), metadata=b"", entries=tuple(entry(name) for name in names)))

    def taken(self, kind: type[R]) -> R:
        """The next request, which must be of this kind."""
        request = self.take()
        assert isinstance(request, kind), f"{request} came, not {kind}"
        return request

    def unread(self) -> None:
        """Wait until a request is there, and leave it."""
        assert self.sock.recv(1, socket.MSG_PEEK)

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._server.state

    def gone(self) -> None:
        """Wait for the client to close the connection."""
        packet = receive(self.sock)
        assert packet is None, f"{packet.data!r} came, not the end"


@contextmanager
def scripted(directory: Path, endpoint: Endpoint, script: Callable[[Peer], None]) -> Generator[str]:
    """Serve one connection in `directory` with `script`, in a thread; the connection is closed when it returns.

    Yields:
        The runtime directory. At the end of the block the script must have ended, without an error.
    """
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(STALLED_SECONDS)
                script(Peer(sock, endpoint))
        except BaseException as error:
            failures.append(error)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / endpoint.value))
        listener.listen()
        listener.settimeout(STALLED_SECONDS)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(directory)
        finally:
            thread.join()
            if failures:
                raise failures[0]
