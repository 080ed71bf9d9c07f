"""Every cell of the protocol's table, and every cell that isn't in it, on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest

from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, REQUESTS
from luod_protocol.connection import (
    REPLY_TO,
    TABLE,
    TAKEOVER_FDS,
    ClientConnection,
    ServerConnection,
    State,
    agree,
    fault,
    fds_of_reply,
    fds_of_request,
    refused,
)
from luod_protocol.errors import Code, FaultCode, ProtocolFault, Refusal
from luod_protocol.limits import MAX_CLIENT_CHARACTERS, MAX_FDS_PER_PACKET, MAX_SEQ
from luod_protocol.messages import Endpoint
from luod_protocol.version import WIRE
from unit.generated import REPLY_KINDS, REQUEST_KINDS, plain

PLACES = [(endpoint, state) for endpoint in Endpoint for state in State]


def name_of(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


each_place = pytest.mark.parametrize(("endpoint", "state"), PLACES, ids=name_of)


def in_order(endpoint: Endpoint, state: State) -> Mapping[type[m.Request], State | None]:
    """The row of the table: empty where it has none."""
    return TABLE.get((endpoint, state), {})


def out_of_order(endpoint: Endpoint, state: State) -> list[type[m.Request]]:
    """Every request that isn't in order there."""
    return [kind for kind in REQUEST_KINDS if kind not in in_order(endpoint, state)]


def client_in(endpoint: Endpoint, state: State) -> ClientConnection:
    client = ClientConnection(endpoint)
    client.state = state
    return client


def answer(request: m.Request, kind: type[m.Reply] | None = None) -> m.Reply:
    """A reply to `request`, by default the one that grants it."""
    reply = plain(kind or REPLY_TO[type(request)])
    answered: m.Reply = reply if isinstance(reply, m.Fault) else attrs.evolve(reply, seq=request.seq)
    return answered


def refusal_of(request: m.Request) -> m.Reply:
    return refused(request.seq, Refusal(Code.NO_SUCH_SESSION, "no"))


def test_the_table_is_whole() -> None:
    """What is in order where: the words of docs/protocol.md, once more by hand."""
    said = {(str(endpoint), str(state)): {kind.type for kind in row} for (endpoint, state), row in TABLE.items()}
    always, look = {"status", "capabilities", "update"}, {"status", "capabilities", "update", "list", "show"}
    assert said == {
        ("serialize", "new"): {"hello"},
        ("serialize", "ready"): always | {"open", "finalize"},
        ("serialize", "open"): always | {"preserve", "unpreserve", "finalize", "cancel"},
        ("deserialize", "new"): {"hello"},
        ("deserialize", "ready"): look | {"claim", "finish", "discard"},
        ("deserialize", "claimed"): look | {"retrieve", "finish", "release"},
        ("control", "new"): {"hello"},
        ("control", "ready"): look | {"monitor", "upgrade", "takeover", "preflight", "prepare", "freeze", "cancel-update"},
    }
    moves = {(str(e), kind.type, str(state), str(to)) for (e, state), row in TABLE.items() for kind, to in row.items() if to is not None}
    assert moves == {
        ("serialize", "hello", "new", "ready"),
        ("serialize", "open", "ready", "open"),
        ("serialize", "finalize", "ready", "ended"),
        ("serialize", "finalize", "open", "ended"),
        ("serialize", "cancel", "open", "ended"),
        ("deserialize", "hello", "new", "ready"),
        ("deserialize", "claim", "ready", "claimed"),
        ("deserialize", "finish", "claimed", "ready"),
        ("deserialize", "release", "claimed", "ready"),
        ("control", "hello", "new", "ready"),
        ("control", "monitor", "ready", "monitoring"),
        ("control", "takeover", "ready", "handed-over"),
    }
    assert set(REPLY_TO) == set(REQUEST_KINDS)
    assert set(REPLY_TO.values()) == set(REPLY_KINDS) - {m.Event, m.Notice, m.Refused, m.Fault}


# ---- the server's side


@each_place
def test_a_granted_request_moves_the_server(endpoint: Endpoint, state: State) -> None:
    for kind in in_order(endpoint, state):
        request = plain(kind)
        server = ServerConnection(endpoint, state=state)
        assert server.receive(REQUESTS.encode(request), fds_of_request(request)) == request
        server.begin(request)
        assert server.state is state
        reply = answer(request)
        assert REPLIES.decode(server.send(reply)) == reply
        assert server.state is (TABLE[endpoint, state][kind] or state)
        assert server.version == (reply.version if isinstance(reply, m.Welcome) else 0)


@each_place
def test_a_refused_request_leaves_the_server(endpoint: Endpoint, state: State) -> None:
    for kind in in_order(endpoint, state):
        request = plain(kind)
        server = ServerConnection(endpoint, version=1, state=state)
        server.begin(server.receive(REQUESTS.encode(request), fds_of_request(request)))
        server.send(refusal_of(request))
        assert (server.state, server.version) == (state, 1)


@each_place
def test_a_fault_ends_the_server(endpoint: Endpoint, state: State) -> None:
    for kind in in_order(endpoint, state):
        request = plain(kind)
        server = ServerConnection(endpoint, state=state)
        server.begin(request)
        server.send(fault(ProtocolFault(FaultCode.INTERNAL, "a bug")))
        assert server.state is State.ENDED


@each_place
def test_a_request_out_of_order_does_nothing_to_the_server(endpoint: Endpoint, state: State) -> None:
    for kind in out_of_order(endpoint, state):
        request = plain(kind)
        server = ServerConnection(endpoint, state=state)
        data = REQUESTS.encode(request)
        if (state is State.NEW) or kind is m.Hello:
            with pytest.raises(ProtocolFault, match="hello") as ended:
                server.receive(data, fds_of_request(request))
            assert ended.value.code is FaultCode.UNEXPECTED_MESSAGE
        else:
            assert server.receive(data, fds_of_request(request)) == request
            with pytest.raises(Refusal, match=kind.type) as caught:
                server.begin(request)
            elsewhere = not any(kind in row for (place, _), row in TABLE.items() if place is endpoint)
            assert caught.value.code is (Code.WRONG_ENDPOINT if elsewhere else Code.OUT_OF_ORDER)
            assert ("connect to" if elsewhere else "in order now are" if (endpoint, state) in TABLE else "another connection") in str(
                caught.value
            )
            # It is answered, and the connection goes on.
            server.send(refused(request.seq, caught.value))
        assert server.state is state


def test_events_do_not_answer_the_request_that_is_due() -> None:
    server = ServerConnection(Endpoint.CONTROL, state=State.READY)
    request = plain(m.Monitor)
    server.begin(request)
    states: list[State] = []
    for reply in (plain(m.Event), answer(request), plain(m.Event)):
        server.send(reply)
        states.append(server.state)
    assert states == [State.READY, State.MONITORING, State.MONITORING]


def test_a_reply_without_a_request_moves_nothing() -> None:
    server = ServerConnection(Endpoint.SERIALIZE, state=State.READY)
    server.send(plain(m.Opened))
    assert server.state is State.READY


@pytest.mark.parametrize("kind", REQUEST_KINDS, ids=name_of)
def test_the_server_counts_the_fds(kind: type[m.Request]) -> None:
    request = plain(kind)
    endpoint, state = next(place for place, row in TABLE.items() if kind in row)
    for came in {0, 1, 2, MAX_FDS_PER_PACKET} - {fds_of_request(request)}:
        server = ServerConnection(endpoint, state=state)
        with pytest.raises(ProtocolFault, match=f"{kind.type} takes {fds_of_request(request)} fds, {came} came") as caught:
            server.receive(REQUESTS.encode(request), came)
        assert caught.value.code is FaultCode.FD_COUNT


@pytest.mark.parametrize("seq", [-1, MAX_SEQ + 1, 2**64 - 1])
def test_a_seq_out_of_range_is_a_fault(seq: int) -> None:
    for state, kind in ((State.NEW, m.Hello), (State.READY, m.Status)):
        server = ServerConnection(Endpoint.CONTROL, state=state)
        with pytest.raises(ProtocolFault, match=f"{kind.type}.seq is {seq}") as caught:
            server.receive(REQUESTS.encode(attrs.evolve(plain(kind), seq=seq)), 0)
        assert caught.value.code is FaultCode.MALFORMED


@pytest.mark.parametrize("seq", [0, MAX_SEQ])
def test_a_seq_in_range_is_taken(seq: int) -> None:
    request = m.Status(seq=seq)
    assert ServerConnection(Endpoint.CONTROL, state=State.READY).receive(REQUESTS.encode(request), 0) == request


def test_a_client_calls_itself_something_short() -> None:
    hello = m.Hello(seq=1, low=1, high=1, client="x" * MAX_CLIENT_CHARACTERS)
    assert ServerConnection(Endpoint.CONTROL).receive(REQUESTS.encode(hello), 0) == hello
    with pytest.raises(ProtocolFault, match="256 characters") as caught:
        ServerConnection(Endpoint.CONTROL).receive(REQUESTS.encode(attrs.evolve(hello, client=hello.client + "x")), 0)
    assert caught.value.code is FaultCode.MALFORMED


def test_only_preserve_brings_fds() -> None:
    assert {kind for kind in REQUEST_KINDS if fds_of_request(plain(kind))} == {m.Preserve}
    spec = m.EntrySpec(name="ram")
    assert fds_of_request(m.Preserve(seq=1, entries=(spec, spec, spec))) == 3


def test_only_retrieved_and_the_takeover_bring_fds_back() -> None:
    assert {kind: fds_of_reply(plain(kind)) for kind in REPLY_KINDS if fds_of_reply(plain(kind))} == {
        m.Retrieved: 1,
        m.TakeoverOffered: TAKEOVER_FDS,
    }
    assert fds_of_reply(m.Retrieved(seq=1, names=("a", "b"))) == 2


@pytest.mark.parametrize(("low", "high"), [(WIRE.low, WIRE.high), (0, WIRE.high + 5), (WIRE.high, WIRE.high)])
def test_the_highest_common_version_is_used(low: int, high: int) -> None:
    assert agree(m.Hello(seq=1, low=low, high=high)) == WIRE.high


@pytest.mark.parametrize(
    ("low", "high"), [(WIRE.high + 1, WIRE.high + 9), (0, WIRE.low - 1), (WIRE.high, WIRE.low - 1), (2**63, 2**64 - 1)]
)
def test_without_a_common_version_they_part(low: int, high: int) -> None:
    with pytest.raises(ProtocolFault, match="update the older") as caught:
        agree(m.Hello(seq=1, low=low, high=high))
    assert caught.value.code is FaultCode.NO_COMMON_VERSION


# ---- the client's side


def sent(client: ClientConnection, request: m.Request) -> m.Request:
    """`request`, sent by `client` with what it needs."""
    assert REQUESTS.decode(client.send(request, fds_of_request(request))) == request
    return request


def come(client: ClientConnection, reply: m.Reply) -> m.Reply:
    """What `client` makes of a reply."""
    return client.receive(REPLIES.encode(reply), fds_of_reply(reply))


@each_place
def test_a_granted_request_moves_the_client(endpoint: Endpoint, state: State) -> None:
    for kind in in_order(endpoint, state):
        client = client_in(endpoint, state)
        request = sent(client, plain(kind))
        assert client.state is state
        assert come(client, answer(request)) == answer(request)
        assert client.state is (TABLE[endpoint, state][kind] or state)


@each_place
def test_a_refused_request_leaves_the_client(endpoint: Endpoint, state: State) -> None:
    for kind in in_order(endpoint, state):
        client = client_in(endpoint, state)
        request = sent(client, plain(kind))
        assert isinstance(come(client, refusal_of(request)), m.Refused)
        assert client.state is state


@each_place
def test_a_request_that_luod_must_refuse_and_grants_is_a_fault(endpoint: Endpoint, state: State) -> None:
    for kind in out_of_order(endpoint, state):
        client = client_in(endpoint, state)
        request = sent(client, plain(kind))
        with pytest.raises(ProtocolFault) as caught:
            come(client, answer(request))
        assert caught.value.code is FaultCode.UNEXPECTED_MESSAGE
        assert client.state is state


@each_place
def test_a_request_out_of_order_may_be_refused(endpoint: Endpoint, state: State) -> None:
    for kind in out_of_order(endpoint, state):
        client = client_in(endpoint, state)
        request = sent(client, plain(kind))
        assert isinstance(come(client, refusal_of(request)), m.Refused)
        assert client.state is state


@pytest.mark.parametrize("kind", REQUEST_KINDS, ids=name_of)
def test_no_other_reply_answers_a_request(kind: type[m.Request]) -> None:
    endpoint, state = next(place for place, row in TABLE.items() if kind in row)
    for other in REPLY_KINDS:
        if other in (REPLY_TO[kind], m.Refused, m.Fault) or (kind, other) == (m.Open, m.Notice):
            continue
        client = client_in(endpoint, state)
        request = sent(client, plain(kind))
        with pytest.raises(ProtocolFault, match=f"{other.type} {request.seq} came in answer to {kind.type}") as caught:
            come(client, answer(request, other))
        assert caught.value.code is FaultCode.UNEXPECTED_MESSAGE


def test_a_reply_with_another_seq_is_a_fault() -> None:
    client = client_in(Endpoint.CONTROL, State.READY)
    sent(client, m.Status(seq=1))
    with pytest.raises(ProtocolFault, match="came in answer to status 1"):
        come(client, attrs.evolve(plain(m.DaemonStatus), seq=2))


def test_a_reply_that_nobody_asked_for_is_a_fault() -> None:
    client = client_in(Endpoint.CONTROL, State.READY)
    with pytest.raises(ProtocolFault, match="no request is waiting") as caught:
        come(client, plain(m.DaemonStatus))
    assert caught.value.code is FaultCode.UNEXPECTED_MESSAGE


def test_pipelined_requests_are_answered_in_their_order() -> None:
    client = ClientConnection(Endpoint.DESERIALIZE)
    requests: list[m.Request] = [
        m.Hello(seq=client.next_seq(), low=1, high=1),
        m.Claim(seq=client.next_seq(), session="guest"),
        m.Retrieve(seq=client.next_seq(), names=("ram",)),
        m.Finish(seq=client.next_seq(), session_id=bytes(16)),
    ]
    assert [request.seq for request in requests] == [1, 2, 3, 4]
    for request in requests:
        sent(client, request)
    assert client.state is State.NEW
    states: list[State] = []
    for request in requests:
        come(client, answer(request))
        states.append(client.state)
    assert states == [State.READY, State.CLAIMED, State.CLAIMED, State.READY]


def test_a_request_that_was_not_sent_needs_no_answer() -> None:
    client = client_in(Endpoint.CONTROL, State.READY)
    first = sent(client, m.Status(seq=1))
    second = sent(client, m.Capabilities(seq=2))
    assert list(client.waiting) == [first, second]
    client.withdraw()
    assert list(client.waiting) == [first]
    come(client, answer(first))
    assert list(client.waiting) == []


def test_events_come_while_monitoring_only() -> None:
    event = plain(m.Event)
    client = client_in(Endpoint.CONTROL, State.READY)
    with pytest.raises(ProtocolFault):
        come(client, event)
    request = sent(client, m.Monitor(seq=1))
    come(client, answer(request))
    assert [come(client, event), come(client, event)] == [event, event]
    assert client.state is State.MONITORING


@pytest.mark.parametrize("kind", [kind for kind in REPLY_KINDS if kind is not m.Fault], ids=name_of)
def test_the_client_counts_the_fds(kind: type[m.Reply]) -> None:
    reply = plain(kind)
    for came in {0, 1, 2, MAX_FDS_PER_PACKET} - {fds_of_reply(reply)}:
        client = client_in(Endpoint.CONTROL, State.READY)
        sent(client, m.Status(seq=1))
        with pytest.raises(ProtocolFault, match=f"{kind.type} takes {fds_of_reply(reply)} fds, {came} came") as caught:
            client.receive(REPLIES.encode(reply), came)
        assert caught.value.code is FaultCode.FD_COUNT


@pytest.mark.parametrize("code", [*FaultCode, "a-later-code"])
def test_a_fault_from_luod_ends_the_client(code: str) -> None:
    client = client_in(Endpoint.CONTROL, State.NEW)
    with pytest.raises(ProtocolFault, match="luod ended the connection: because") as caught:
        client.receive(REPLIES.encode(m.Fault(code=code, errno=5, message="because")), 0)
    assert caught.value.code == (code if code in set(FaultCode) else FaultCode.UNEXPECTED_MESSAGE)
    assert client.state is State.ENDED


@pytest.mark.parametrize("fds", [0, 2])
def test_the_client_sends_no_other_count_of_fds(fds: int) -> None:
    client = client_in(Endpoint.SERIALIZE, State.OPEN)
    with pytest.raises(Refusal, match=f"takes 1 fds, {fds} were given") as caught:
        client.send(m.Preserve(seq=1, entries=(m.EntrySpec(name="ram"),)), fds)
    assert caught.value.code is Code.BAD_REQUEST
    with pytest.raises(ProtocolFault, match="no request is waiting"):
        come(client, plain(m.Preserved))


def test_the_client_sends_no_more_fds_than_a_packet_takes() -> None:
    def preserve(count: int) -> m.Preserve:
        return m.Preserve(seq=1, entries=tuple(m.EntrySpec(name=str(number)) for number in range(count)))

    client = client_in(Endpoint.SERIALIZE, State.OPEN)
    sent(client, preserve(MAX_FDS_PER_PACKET))
    with pytest.raises(Refusal, match="several requests") as caught:
        client.send(preserve(MAX_FDS_PER_PACKET + 1), MAX_FDS_PER_PACKET + 1)
    assert caught.value.code is Code.TOO_LARGE
