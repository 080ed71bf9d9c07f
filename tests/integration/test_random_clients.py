"""Several clients at random against a living luod: requests in order and out of order, pipelined, with the wrong fds, cut off or changed,
and connections that end in every way, while answers are unread and sessions are open or claimed.

Whatever they do, luod serves others, complains of no bug, and in the end holds nothing of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import attrs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import luod_client
from harness import LIMIT_S, Daemon, readable
from integration.test_random_input import PACKETS, VALID, Sent, all_fds, send
from luod_protocol import messages as m
from luod_protocol.codec import REPLIES, pack
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint
from raw import Raw
from things import memfd

T = TypeVar("T")

MOST: Final = 100
CLIENTS: Final = 4
NAMES: Final = ("guest", "other")

Message = dict[str, Any]


def in_order(endpoint: Endpoint, state: str, name: str, session_id: bytes) -> Sequence[tuple[Message, Sequence[str], str]]:
    """What may be said, with which fds, and the state that follows when it is granted."""
    seen = {"session": name, "session_id": b"", "force": True}
    match endpoint, state:
        case _, "new":
            return [(VALID[0], (), "ready")]
        case Endpoint.SERIALIZE, "ready":
            return [
                ({"type": "open", "seq": 2, "session": name, "session_id": session_id, "notices": True}, (), "open"),
                ({"type": "finalize", "seq": 2, "session_id": session_id}, (), "ended"),
            ]
        case Endpoint.SERIALIZE, "open":
            return [
                ({"type": "preserve", "seq": 3, "entries": [{"name": "a"}, {"name": "b", "needs": ["a"]}]}, ("memfd", "write"), "open"),
                ({"type": "preserve", "seq": 3, "entries": [{"name": "c", "metadata": bytes(99)}]}, ("eventfd",), "open"),
                ({"type": "unpreserve", "seq": 4, "names": ["a"]}, (), "open"),
                ({"type": "finalize", "seq": 5, "session_id": session_id}, (), "ended"),
                ({"type": "finalize", "seq": 5, "session_id": session_id, "seal": {"a": ["grow", "shrink"]}}, (), "ended"),
                ({"type": "cancel", "seq": 6}, (), "ended"),
            ]
        case Endpoint.DESERIALIZE, "ready":
            return [
                ({"type": "claim", "seq": 2, **seen}, (), "claimed"),
                ({"type": "discard", "seq": 2, **seen}, (), "ready"),
                ({"type": "finish", "seq": 2, "session_id": session_id}, (), "ready"),
                ({"type": "list", "seq": 2}, (), "ready"),
            ]
        case Endpoint.DESERIALIZE, "claimed":
            return [
                ({"type": "retrieve", "seq": 3, "names": ["a", "b", "a"]}, (), "claimed"),
                ({"type": "retrieve", "seq": 3, "names": ["c"] * 200}, (), "claimed"),
                ({"type": "show", "seq": 3, "session": name}, (), "claimed"),
                ({"type": "release", "seq": 3}, (), "ready"),
                ({"type": "finish", "seq": 3, "session_id": session_id}, (), "ready"),
            ]
        case Endpoint.CONTROL, "ready":
            kinds = ("status", "capabilities", "update", "preflight", "freeze", "cancel-update", "monitor")
            return [({"type": kind, "seq": 2}, (), "ready") for kind in kinds]
        case _:
            return [({"type": "status", "seq": 9}, (), state)]


@attrs.frozen
class Right:
    """The client says so many things that are in order, one behind the other; `which` of them."""

    client: int
    which: Sequence[int]


@attrs.frozen
class Wrong:
    """The client sends this."""

    client: int
    packet: Sent


@attrs.frozen
class Hears:
    """The client reads what is there."""

    client: int


@attrs.frozen
class Ends:
    """The client's connection ends, or half of it; another one comes, here."""

    client: int
    how: str
    endpoint: Endpoint


@attrs.frozen
class Play:
    """How far each client is at the beginning, whether there is something to claim, what they do, and how they end."""

    beginnings: Sequence[int]
    kept: bool
    steps: Sequence[Right | Wrong | Hears | Ends]
    ends: Sequence[str]


def each_client(strategy: st.SearchStrategy[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(strategy, min_size=CLIENTS, max_size=CLIENTS)


WHO: Final = st.integers(0, CLIENTS - 1)
HOW: Final = st.sampled_from(["answered", "closed", "no more said", "no more heard", "both"])
RIGHT: Final = st.builds(Right, WHO, st.lists(st.integers(0, 6), min_size=1, max_size=6))
OTHER: Final = st.builds(Wrong, WHO, PACKETS) | st.builds(Hears, WHO) | st.builds(Ends, WHO, HOW, st.sampled_from(list(Endpoint)))
PLAYS: Final = st.builds(Play, each_client(st.integers(0, 3)), st.booleans(), st.lists(RIGHT | OTHER, max_size=25), each_client(HOW))


class Client:
    """One of them: a connection, and what state it is in when all was granted that was said."""

    def __init__(self, daemon: Daemon, endpoint: Endpoint, number: int, ids: Sequence[bytes], fds: Mapping[str, OwnedFd]) -> None:
        self._fds = fds
        self.endpoint = endpoint
        self.state = "new"
        self._name, self._id = NAMES[number % 2], ids[number % 2]
        self.raw = Raw(daemon.runtime_dir, endpoint, greet=False)
        self.raw.sock.setblocking(False)

    def right(self, which: int) -> None:
        """Say something that is in order."""
        choices = in_order(self.endpoint, self.state, self._name, self._id)
        message, kinds, following = choices[which % len(choices)]
        if send(self.raw, Sent(pack(message), kinds, bulk=False), self._fds):
            self.state = following

    def hear(self) -> set[str]:
        """Take what is there. Which messages it was."""
        heard: set[str] = set()
        while readable(self.raw.sock.fileno(), 0) and (packet := self.raw.packet()) is not None:
            with packet:
                heard.add(self._checked(REPLIES.decode(packet.data)))
        return heard

    def _checked(self, reply: m.Reply) -> str:
        assert not isinstance(reply, m.Fault) or reply.code != "internal", reply
        return reply.type

    def end(self, how: str) -> set[str]:
        """End, or begin to. Which messages came last."""
        sock = self.raw.sock
        match how:
            case "no more said":
                sock.shutdown(socket.SHUT_WR)
                return self.hear()
            case "no more heard":
                sock.shutdown(socket.SHUT_RD)
                self.right(0)
            case "both":
                sock.shutdown(socket.SHUT_RDWR)
            case "answered":
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(LIMIT_S)
                return {self._checked(reply) for reply in self.raw.rest()}
            case _:
                pass
        return set()

    def close(self) -> None:
        """No more of it."""
        self.raw.sock.close()


def play(daemon: Daemon, what: Play, ids: Sequence[bytes], fds: Mapping[str, OwnedFd]) -> set[str]:
    """Have the clients do all this, and end. What luod answered."""
    heard: set[str] = set()
    if what.kept:
        with luod_client.serialize(NAMES[1], session_id=ids[1], runtime_dir=daemon.runtime_dir) as session:
            session.preserve({"a": fds["memfd"].fileno(), "b": fds["eventfd"].fileno(), "c": fds["read"].fileno()})
            session.finalize()
    clients = [Client(daemon, list(Endpoint)[number % 3], number, ids, fds) for number in range(CLIENTS)]
    try:
        for client, many in zip(clients, what.beginnings, strict=True):
            for _ in range(many):
                client.right(0)
        for step in what.steps:
            client = clients[step.client]
            match step:
                case Right(which=which):
                    for each in which:
                        client.right(each)
                case Wrong(packet=packet):
                    send(client.raw, packet, fds)
                case Hears():
                    heard |= client.hear()
                case Ends(how=how, endpoint=endpoint):
                    heard |= client.end(how)
                    client.close()
                    clients[step.client] = Client(daemon, endpoint, step.client, ids, fds)
        for client, how in zip(clients, what.ends, strict=True):
            heard |= client.end(how)
    finally:
        for client in clients:
            client.close()
    return heard


def well_behaved(daemon: Daemon) -> None:
    """A client's whole business, and nothing of others is left behind it."""
    with memfd(b"mine") as mine, luod_client.serialize("well-behaved", runtime_dir=daemon.runtime_dir) as session:
        session.preserve({"mine": mine.fileno()})
        session.finalize()
    with luod_client.deserialize(runtime_dir=daemon.runtime_dir) as luod:
        with luod.claim("well-behaved") as claim:
            claim.retrieve("mine")["mine"].close()
            claim.finish()
        for each in luod.list():
            # What others have finalized; those that are open or claimed are just ending.
            with suppress(luod_client.Refusal):
                luod.discard(session_id=each.session_id, force=True)


MUST_BE_HEARD: Final = frozenset({"opened", "preserved", "claimed", "retrieved", "refused"})
GOES: Final = 10


def test_random_clients(daemon: Daemon) -> None:
    tried = 0
    heard: set[str] = set()
    fds = all_fds()

    # Not made smaller: that would take longer than a test may.
    @settings(
        max_examples=MOST,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate],
    )
    @given(PLAYS)
    def converse(what: Play) -> None:
        nonlocal tried
        tried += 1
        heard.update(play(daemon, what, (os.urandom(16), os.urandom(16)), fds))
        well_behaved(daemon)
        daemon.check_idle()

    try:
        # Chance decides how far they get; it has several goes, and then something keeps them from it.
        for _ in range(GOES):
            converse()
            if heard >= MUST_BE_HEARD:
                break
    finally:
        close_all(fds.values())
    assert tried >= MOST
    assert heard >= MUST_BE_HEARD
    assert " bug" not in daemon.stderr
    assert daemon.status().generation == 1
