"""A client that says whatever a test wants, right or wrong, byte for byte."""

from __future__ import annotations

import array
import errno
import select
import socket
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final, Self

import luod_client
from harness import Daemon
from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, REQUESTS, pack
from luod_protocol.errors import Code, FaultCode
from luod_protocol.fds import OwnedFd
from luod_protocol.messages import Endpoint
from luod_protocol.wire import Packet, receive
from processes import LIMIT_S
from things import let_go, pipe

SESSION_ID: Final = bytes(range(16))
HELLO: Final[Mapping[str, Any]] = {"type": "hello", "seq": 1, "low": 1, "high": 1}
STATUS: Final[Mapping[str, Any]] = {"type": "status", "seq": 1}
SPEC: Final[Mapping[str, Any]] = {"name": "ram"}
PRESERVE: Final[Mapping[str, Any]] = {"type": "preserve", "seq": 3, "entries": [SPEC]}
FINALIZE: Final[Mapping[str, Any]] = {"type": "finalize", "seq": 3, "session_id": SESSION_ID}


def preserve_many(entries: int) -> Mapping[str, Any]:
    """A `preserve` of so many entries."""
    return {**PRESERVE, "entries": [{"name": str(index)} for index in range(entries)]}


class Raw:
    """A connection. Use it as a context manager.

    Args:
        runtime_dir: where luod is.
        endpoint: with what to connect.
        greet: say hello first.
        limit_s: how long it waits for luod, in seconds.
    """

    def __init__(self, runtime_dir: str, endpoint: Endpoint = Endpoint.SERIALIZE, *, greet: bool = True, limit_s: float = LIMIT_S) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.sock.settimeout(limit_s)
            self.sock.connect(f"{runtime_dir}/{endpoint}")
            if greet:
                assert isinstance(self.ask(HELLO), m.Welcome)
        except BaseException:
            self.sock.close()
            raise

    def put(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a packet of these bytes, with borrowed fds."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)

    def say(self, message: Mapping[str, Any] | m.Request, fds: Sequence[int] = ()) -> None:
        """Send a message."""
        self.put(pack(message) if isinstance(message, Mapping) else REQUESTS.encode(message), fds)

    def packet(self) -> Packet | None:
        """The next packet, None at the end. The caller owns it."""
        return receive(self.sock, resets=True)

    def hear(self) -> m.Reply:
        """The next message. Its fds are closed."""
        packet = self.packet()
        assert packet is not None, "luod has ended the connection"
        with packet:
            return REPLIES.decode(packet.data)

    def ask(self, message: Mapping[str, Any] | m.Request, fds: Sequence[int] = ()) -> m.Reply:
        """Send a message and hear the next one."""
        self.say(message, fds)
        return self.hear()

    def refused(self, message: Mapping[str, Any] | m.Request, code: Code, fds: Sequence[int] = (), *, entry: str = "") -> str:
        """Send a request, which must be refused with `code`. Returns the text."""
        reply = self.ask(message, fds)
        assert isinstance(reply, m.Refused), reply
        assert (reply.code, reply.errno, reply.entry) == (code, code.errno, entry), reply
        assert reply.message
        return reply.message

    def open(self, name: str = "guest", session_id: bytes = SESSION_ID) -> None:
        """Open a session."""
        opened = self.ask(m.Open(seq=2, session=name, session_id=session_id))
        assert isinstance(opened, m.Opened), opened

    def preserve(self, **fds: int) -> None:
        """Preserve borrowed fds."""
        kept = self.ask(m.Preserve(seq=3, entries=tuple(m.EntrySpec(name=name) for name in fds)), list(fds.values()))
        assert isinstance(kept, m.Preserved), kept

    def faulted(self, code: FaultCode) -> str:
        """The next message must be a fault with `code`, and then the end. Returns the text."""
        fault = self.hear()
        assert isinstance(fault, m.Fault), fault
        assert (fault.code, fault.errno) == (code, code.errno), fault
        assert fault.message
        self.ended()
        return fault.message

    def ended(self) -> None:
        """Nothing more comes, but the end."""
        packet = self.packet()
        assert packet is None, packet.data

    def fill(self, message: Mapping[str, Any] | m.Request) -> int:
        """Send a request again and again, and read no answer, until luod doesn't take any more. Returns how many were sent."""
        data = pack(message) if isinstance(message, Mapping) else REQUESTS.encode(message)
        sent = 0
        # luod may be slow to read the next one: when it takes none for so long, it waits for us.
        while select.select([], [self.sock], [], 0.3)[1]:
            with suppress(BlockingIOError):
                self.sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                sent += 1
        return sent

    def present(self) -> Iterator[m.Reply]:
        """Every message that is here already."""
        while select.select([self.sock], [], [], 0)[0]:
            yield self.hear()

    def rest(self) -> Iterator[m.Reply]:
        """Every message up to the end of the connection, which must come."""
        while (packet := self.packet()) is not None:
            with packet:
                yield REPLIES.decode(packet.data)

    def try_put(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send a packet, unless luod has ended the connection or doesn't take more just now. Whether it was sent."""
        try:
            self.put(data, fds)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            return False
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sock.close()


@contextmanager
def open_session(daemon: Daemon) -> Generator[tuple[Raw, OwnedFd]]:
    """A connection whose open session has the end to write of a pipe; yields the end to read as well."""
    with Raw(daemon.runtime_dir) as raw, pipe() as (read, write):
        raw.open()
        raw.preserve(pipe=write.fileno())
        write.close()
        yield raw, read


@contextmanager
def rolled_back(daemon: Daemon) -> Generator[Raw]:
    """A connection with an open session, which must be rolled back by what happens in the block, while others are served."""
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as other, open_session(daemon) as (raw, read):
        assert not let_go(read, 0)
        yield raw
        assert let_go(read)
        assert other.status().generation == 1


def faults(daemon: Daemon, code: FaultCode, says: str, act: Callable[[Raw], None]) -> None:
    """`act` on a connection with an open session must be answered with this fault, and cost the session."""
    with rolled_back(daemon) as raw:
        act(raw)
        text = raw.faulted(code)
        assert says in text, f"{text!r} doesn't say {says!r}"
