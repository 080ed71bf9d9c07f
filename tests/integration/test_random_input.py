"""Random packets against a living luod: nonsense, messages with one thing changed, and fds where they don't belong."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import luod_client
from harness import Daemon
from luod_protocol import messages as m
from luod_protocol.codec import encode_bulk, pack
from luod_protocol.fds import OwnedFd, close_all, own
from luod_protocol.messages import Endpoint
from luod_protocol.sealed import seal_bytes
from raw import HELLO, SESSION_ID, Raw
from things import eventfd, memfd

MOST: Final = 150

VALID: Final[Sequence[dict[str, Any]]] = (
    dict(HELLO),
    {"type": "status", "seq": 1},
    {"type": "capabilities", "seq": 1},
    {"type": "open", "seq": 2, "session": "guest", "session_id": SESSION_ID, "metadata": b"x", "owner": None},
    {"type": "preserve", "seq": 3, "entries": [{"name": "a", "metadata": b"x", "needs": []}]},
    {"type": "preserve", "seq": 3, "entries": [{"name": "b", "needs": ["a"]}, {"name": "c"}]},
    {"type": "unpreserve", "seq": 4, "names": ["a"]},
    {"type": "finalize", "seq": 5, "session_id": SESSION_ID, "require": [], "seal": {}},
    {"type": "cancel", "seq": 6},
    {"type": "list", "seq": 7, "owner": None},
    {"type": "show", "seq": 8, "session": "guest", "session_id": b"", "owner": None},
    {"type": "claim", "seq": 9, "session": "", "session_id": SESSION_ID, "owner": None, "force": True},
    {"type": "retrieve", "seq": 10, "names": ["a", "b"]},
    {"type": "release", "seq": 11},
    {"type": "finish", "seq": 12, "session_id": SESSION_ID},
    {"type": "discard", "seq": 13, "session": "guest", "force": True},
    {"type": "monitor", "seq": 14},
)
"""Requests that do no harm when they are right, too; not `upgrade` and `takeover`."""

VALUES: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.sampled_from(["a", "guest", "luod", "x" * 300, "write", "kexec", SESSION_ID, b""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@attrs.frozen
class Sent:
    """A packet: its bytes, the kinds of its fds, and whether it goes as bulk."""

    data: bytes
    fds: Sequence[str]
    bulk: bool


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A valid request, mostly with something changed."""
    message = dict(draw(st.sampled_from(VALID)))
    change = draw(st.sampled_from(["nothing", "nothing", "value", "more", "less", "cut", "byte"]))
    key = draw(st.sampled_from(sorted(message)))
    if change == "value":
        message[key] = draw(VALUES)
    elif change == "more":
        message[draw(st.text(max_size=8))] = draw(VALUES)
    elif change == "less":
        del message[key]
    data = pack(message)
    place = draw(st.integers(0, len(data) - 1))
    if change == "cut":
        return data[:place]
    if change == "byte":
        return data[:place] + draw(st.binary(min_size=1, max_size=2)) + data[place + 1 :]
    return data


PACKETS: Final = st.builds(
    Sent,
    changed() | changed() | st.binary(max_size=200) | VALUES.map(msgpack.packb) | st.just(b"\0" * 70_000),
    st.lists(st.sampled_from(["memfd", "eventfd", "read", "write", "file", "epoll", "place"]), max_size=3),
    st.sampled_from([False, False, False, True]),
)
BEGINNINGS: Final[Sequence[Sequence[dict[str, Any]]]] = ((), (VALID[0],), (VALID[0], VALID[3]), (VALID[0], VALID[11]))
"""Nothing, hello, with open, with claim."""
CONVERSATIONS: Final = st.tuples(st.sampled_from(list(Endpoint)), st.sampled_from(BEGINNINGS), st.lists(PACKETS, min_size=1, max_size=6))


def all_fds() -> dict[str, OwnedFd]:
    """One of each kind. The caller owns them."""
    read, write = own(os.pipe2(os.O_CLOEXEC))
    with select.epoll() as epoll:
        poll = OwnedFd(os.dup(epoll.fileno()))
    file = OwnedFd(os.open(__file__, os.O_RDONLY | os.O_CLOEXEC))
    place = OwnedFd(os.open(__file__, os.O_PATH | os.O_CLOEXEC))
    return {"memfd": memfd(b"x"), "eventfd": eventfd(), "read": read, "write": write, "file": file, "epoll": poll, "place": place}


def send(raw: Raw, packet: Sent, fds: Mapping[str, OwnedFd]) -> bool:
    """Send it, with these fds by their kinds (borrowed). Whether luod took it."""
    numbers = [fds[kind].fileno() for kind in packet.fds]
    if not packet.bulk or not packet.data:
        return raw.try_put(packet.data, numbers)
    with seal_bytes(packet.data, "bulk") as memfd_of:
        return raw.try_put(encode_bulk(len(packet.data)), [memfd_of.fileno(), *numbers])


def test_random_packets(daemon: Daemon) -> None:
    tried = 0
    answers: set[str] = set()
    fds = all_fds()

    @settings(max_examples=MOST, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(CONVERSATIONS)
    def converse(conversation: tuple[Endpoint, Sequence[dict[str, Any]], Sequence[Sent]]) -> None:
        nonlocal tried
        tried += 1
        endpoint, beginning, packets = conversation
        with Raw(daemon.runtime_dir, endpoint, greet=False) as raw:
            for message in beginning:
                raw.try_put(pack(message))
            for packet in packets:
                if not send(raw, packet, fds):
                    break
            raw.sock.shutdown(socket.SHUT_WR)  # what was sent is still answered
            for reply in raw.rest():
                assert not isinstance(reply, m.Fault) or reply.code != "internal", (reply, daemon.stderr)
                answers.add(reply.type)
        assert other.status().generation == 1

    try:
        with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as other:
            converse()
    finally:
        close_all(fds.values())
    assert tried >= MOST
    assert "fault" in answers
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as looker:
        for each in looker.list():
            looker.discard(session_id=each.session_id, force=True)
