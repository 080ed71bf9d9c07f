"""The protocol of one connection, without any I/O: bytes in, messages out, and the other way round.

Theory. What may be said on a connection depends on its endpoint and on what was said before. That is one table, `TABLE`: endpoint and
state, and for each request that is in order there the state that follows when it is *granted*. A refused request changes nothing.
Both sides run the same table: `ServerConnection` in the daemon, `ClientConnection` in the client library.

Happy path, server: `receive(data, fds)` gives a request; the daemon does it; `send(reply)` gives the bytes and moves the state.
Happy path, client: `send(request)` gives the bytes; `receive(data, fds)` gives the reply to the oldest request not yet answered.

Unhappy paths:
1. The bytes are no message, or the number of fds isn't what the message says: `ProtocolFault`; the owner sends `fault` and closes.
2. `hello` is missing, or comes twice: `ProtocolFault`.
3. The request belongs to another endpoint, or isn't in order: `Refusal`; the connection goes on.
4. (client) A reply of another type or `seq` than is due: `ProtocolFault`. A `fault` from luod: `ProtocolFault` with its text.

Invariants: every request gets exactly one reply, in order; `state` changes only in `ServerConnection.send` (on the server) and in
`ClientConnection.receive` (on the client). A connection can be described by `endpoint`, `version` and `state` alone: that is what a
handover carries.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, REQUESTS
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.limits import MAX_CLIENT_CHARACTERS, MAX_FDS_PER_PACKET, MAX_SEQ
from luod_protocol.messages import Endpoint
from luod_protocol.version import WIRE, VersionRange


class State(enum.StrEnum):
    """Where a connection is."""

    NEW = "new"
    READY = "ready"
    OPEN = "open"
    CLAIMED = "claimed"
    MONITORING = "monitoring"
    HANDED_OVER = "handed-over"
    ENDED = "ended"


_ANY: Mapping[type[m.Request], State | None] = {m.Status: None, m.Capabilities: None, m.Update: None}
_LOOK: Mapping[type[m.Request], State | None] = {**_ANY, m.List: None, m.Show: None}

TABLE: Final[Mapping[tuple[Endpoint, State], Mapping[type[m.Request], State | None]]] = {
    (Endpoint.SERIALIZE, State.NEW): {m.Hello: State.READY},
    (Endpoint.SERIALIZE, State.READY): {**_ANY, m.Open: State.OPEN, m.Finalize: State.ENDED},
    (Endpoint.SERIALIZE, State.OPEN): {
        **_ANY,
        m.Preserve: None,
        m.Unpreserve: None,
        m.Finalize: State.ENDED,
        m.Cancel: State.ENDED,
    },
    (Endpoint.DESERIALIZE, State.NEW): {m.Hello: State.READY},
    (Endpoint.DESERIALIZE, State.READY): {**_LOOK, m.Claim: State.CLAIMED, m.Finish: None, m.Discard: None},
    (Endpoint.DESERIALIZE, State.CLAIMED): {**_LOOK, m.Retrieve: None, m.Finish: State.READY, m.Release: State.READY},
    (Endpoint.CONTROL, State.NEW): {m.Hello: State.READY},
    (Endpoint.CONTROL, State.READY): {
        **_LOOK,
        m.Monitor: State.MONITORING,
        m.Upgrade: None,
        m.Takeover: State.HANDED_OVER,
        m.Preflight: None,
        m.Prepare: None,
        m.Freeze: None,
        m.CancelUpdate: None,
    },
}
"""(endpoint, state) -> request that is in order -> the state after it was granted; None: the same."""

REPLY_TO: Final[Mapping[type[m.Request], type[m.Reply]]] = {
    m.Hello: m.Welcome,
    m.Status: m.DaemonStatus,
    m.Capabilities: m.DaemonCapabilities,
    m.Open: m.Opened,
    m.Preserve: m.Preserved,
    m.Unpreserve: m.Unpreserved,
    m.Finalize: m.Finalized,
    m.Cancel: m.Cancelled,
    m.List: m.Listed,
    m.Show: m.Shown,
    m.Claim: m.Claimed,
    m.Retrieve: m.Retrieved,
    m.Release: m.Released,
    m.Finish: m.Finished,
    m.Discard: m.Discarded,
    m.Monitor: m.Monitoring,
    m.Upgrade: m.Upgraded,
    m.Takeover: m.TakeoverOffered,
    m.Update: m.UpdateStatus,
    m.Preflight: m.PreflightReport,
    m.Prepare: m.UpdateStatus,
    m.Freeze: m.UpdateStatus,
    m.CancelUpdate: m.UpdateStatus,
}
"""What answers each request when it is granted; `Refused` answers any."""

_WHERE: Final[Mapping[type[m.Request], frozenset[Endpoint]]] = {
    kind: frozenset(endpoint for (endpoint, _), row in TABLE.items() if kind in row) for kind in REPLY_TO
}

TAKEOVER_FDS: Final = 1
"""The handover socket, with `takeover-offered`."""


def after(endpoint: Endpoint, state: State, request: m.Request) -> State:
    """The state that follows when `request` is granted.

    Raises:
        ProtocolFault: `hello` is missing or comes twice.
        Refusal: the request belongs to another endpoint, or isn't in order here.
    """
    kind = type(request)
    row = TABLE.get((endpoint, state), {})
    if kind in row:
        return row[kind] or state
    if (state is State.NEW) != (kind is m.Hello):
        what = "the first message must be hello" if state is State.NEW else "hello was said already"
        raise ProtocolFault(
            FaultCode.UNEXPECTED_MESSAGE, f"{what}, not {kind.type} again" if kind is m.Hello else f"{what}, not {kind.type}"
        )
    if endpoint not in _WHERE[kind]:
        belongs = " and ".join(sorted(_WHERE[kind]))
        raise Refusal(Code.WRONG_ENDPOINT, f"{kind.type} is not for the endpoint {endpoint}: connect to {belongs}")
    raise Refusal(Code.OUT_OF_ORDER, f"{kind.type} is not in order while this connection is {state}: {_in_order(row)}")


def _in_order(row: Mapping[type[m.Request], State | None]) -> str:
    if not row:
        return "open another connection"
    return "in order now are " + ", ".join(sorted(kind.type for kind in row))


def fds_of_request(request: m.Request) -> int:
    """How many fds must come with `request`."""
    return len(request.entries) if isinstance(request, m.Preserve) else 0


def fds_of_reply(reply: m.Reply) -> int:
    """How many fds come with `reply`."""
    if isinstance(reply, m.Retrieved):
        return len(reply.names)
    return TAKEOVER_FDS if isinstance(reply, m.TakeoverOffered) else 0


def _check_fds(tag: str, said: int, came: int) -> None:
    if came != said:
        raise ProtocolFault(FaultCode.FD_COUNT, f"{tag} takes {said} fds, {came} came with it")


def refused(seq: int, refusal: Refusal) -> m.Refused:
    """The reply that tells `refusal`."""
    return m.Refused(seq=seq, code=refusal.code, errno=refusal.errno, message=refusal.message, entry=refusal.entry)


def fault(error: ProtocolFault) -> m.Fault:
    """The last message that tells `error`."""
    return m.Fault(code=error.code, errno=error.errno, message=error.message)


class ServerConnection:
    """The daemon's side.

    Args:
        endpoint: the socket that the client connected to.
        version: the wire version agreed on, when the connection was taken over; 0 for a new one.
        state: where it is; likewise.
    """

    def __init__(self, endpoint: Endpoint, *, version: int = 0, state: State = State.NEW) -> None:
        self.endpoint = endpoint
        self.version = version
        self.state = state
        self._due: tuple[m.Request, State] | None = None

    def receive(self, data: bytes, fds: int) -> m.Request:
        """The request in a packet with `fds` fds. The caller owns the fds, whatever happens here.

        Raises:
            ProtocolFault: unhappy paths 1 and 2.
        """
        request = REQUESTS.decode(data)
        if not 0 <= request.seq <= MAX_SEQ:
            raise ProtocolFault(FaultCode.MALFORMED, f"{request.type}.seq is {request.seq}, it must be 0 to {MAX_SEQ}")
        if isinstance(request, m.Hello) and len(request.client) > MAX_CLIENT_CHARACTERS:
            raise ProtocolFault(FaultCode.MALFORMED, f"hello.client has {len(request.client)} characters, at most {MAX_CLIENT_CHARACTERS}")
        _check_fds(request.type, fds_of_request(request), fds)
        if (self.state is State.NEW) != isinstance(request, m.Hello):
            after(self.endpoint, self.state, request)
        return request

    def begin(self, request: m.Request) -> None:
        """Say that `request` is being worked on: the next `send` answers it.

        Raises:
            Refusal: unhappy path 3.
        """
        self._due = (request, self.state)
        self._due = (request, after(self.endpoint, self.state, request))

    def send(self, reply: m.Reply) -> bytes:
        """The bytes of `reply`; moves the state when it grants the request."""
        if self._due is not None and not isinstance(reply, (m.Event, m.Notice)):
            request, granted = self._due
            self._due = None
            if isinstance(reply, REPLY_TO[type(request)]):
                self.state = granted
        if isinstance(reply, m.Welcome):
            self.version = reply.version
        if isinstance(reply, m.Fault):
            self.state = State.ENDED
        return REPLIES.encode(reply)


def agree(hello: m.Hello) -> int:
    """The wire version to use with the sender of `hello`.

    Raises:
        ProtocolFault: there is none.
    """
    theirs = VersionRange(low=hello.low, high=hello.high)
    version = WIRE.common(theirs)
    if version is None:
        raise ProtocolFault(
            FaultCode.NO_COMMON_VERSION, f"the client speaks wire version {theirs}, this luod {WIRE}: update the older of them"
        )
    return version


class ClientConnection:
    """The client's side. Requests may be sent before earlier ones are answered."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.state = State.NEW
        self._seq = 0
        self._notices = False
        self._due: deque[m.Request] = deque()

    def next_seq(self) -> int:
        """A `seq` for the next request."""
        self._seq += 1
        return self._seq

    def send(self, request: m.Request, fds: int) -> bytes:
        """The bytes of `request`, to be sent with that many fds.

        Raises:
            Refusal: too many fds for one packet, or not as many as the request says.
        """
        if fds > MAX_FDS_PER_PACKET:
            raise Refusal(Code.TOO_LARGE, f"{fds} fds in one packet, the kernel passes {MAX_FDS_PER_PACKET}: send them in several requests")
        if fds != fds_of_request(request):
            raise Refusal(Code.BAD_REQUEST, f"{request.type} takes {fds_of_request(request)} fds, {fds} were given")
        data = REQUESTS.encode(request)
        self._due.append(request)
        self._notices = self._notices or (isinstance(request, m.Open) and request.notices)
        return data

    def withdraw(self) -> None:
        """The last request wasn't sent after all: no answer to it is due."""
        self._due.pop()

    @property
    def waiting(self) -> Sequence[m.Request]:
        """The requests without an answer, oldest first."""
        return self._due

    def receive(self, data: bytes, fds: int) -> m.Reply:
        """The message in a packet with `fds` fds: the reply that is due, `Refused` in its place, an `Event` while monitoring, or a
        `Notice`.

        Raises:
            ProtocolFault: unhappy path 4.
        """
        reply = REPLIES.decode(data)
        if isinstance(reply, m.Fault):
            self.state = State.ENDED
            try:
                code = FaultCode(reply.code)
            except ValueError:
                code = FaultCode.UNEXPECTED_MESSAGE
            raise ProtocolFault(code, f"luod ended the connection: {reply.message}")
        _check_fds(reply.type, fds_of_reply(reply), fds)
        if isinstance(reply, m.Event) and self.state is State.MONITORING:
            return reply
        if isinstance(reply, m.Notice) and self._notices:
            return reply
        if not self._due:
            raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, f"{reply.type} came, no request is waiting for an answer")
        request = self._due.popleft()
        if reply.seq != request.seq or not isinstance(reply, (REPLY_TO[type(request)], m.Refused)):
            raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, f"{reply.type} {reply.seq} came in answer to {request.type} {request.seq}")
        if not isinstance(reply, m.Refused):
            try:
                self.state = after(self.endpoint, self.state, request)
            except Refusal as error:
                raise ProtocolFault(FaultCode.UNEXPECTED_MESSAGE, f"{reply.type} came, but {error.message}") from None
        return reply


def refusal(reply: m.Refused) -> Refusal:
    """The exception that `reply` tells; a code that this client doesn't know yet reads as `bad-request`."""
    try:
        code = Code(reply.code)
    except ValueError:
        code = Code.BAD_REQUEST
    return Refusal(code, reply.message, entry=reply.entry)
