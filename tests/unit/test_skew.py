"""What a successor of another release can't carry is found before anything is frozen, item by item, and named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
import pytest

from luod import manifest
from luod.manifest import Entry, Identity, Manifest
from luod.notify import ManagerInfo
from luod.session import Sealed, Session, Staged
from luod.store import Ended
from luod.succession.messages import CODEC, VERSIONS, Copied, Declined, Handover, Meet, Offer
from luod.succession.skew import obstacles
from luod_protocol.codec import as_map, pack, unpack
from luod_protocol.errors import ProtocolFault
from luod_protocol.version import WIRE, VersionRange
from standins.other_release import more
from things import memfd

MEET = Meet(
    luod="0.1.0",
    pid=1,
    handover=VERSIONS,
    wire=WIRE,
    manifest=manifest.VERSIONS,
    kinds={"memfd": ("memfd-v1",), "eventfd": ("eventfd-v1",), "pipe": ("pipe-v1",)},
)
OFFER = Offer(
    luod="0.1.0",
    pid=1,
    handover=1,
    generation=3,
    directory="/run/luod",
    endpoints=("control",),
    bound=(),
    ended=(Ended(session_id=b"id", owner=0, finished=True),),
    manager=ManagerInfo(name="systemd", address="/run/systemd/notify"),
)


class Held:
    """Sessions without content."""

    def __init__(self, stack: ExitStack) -> None:
        self.sessions: list[Session] = []
        self._stack = stack

    def add(self, name: str, *kinds: str, version: int | None = 1) -> None:
        """A session with an entry for each of `kinds`; an open one where `version` is None."""
        entries = tuple(
            Entry(
                name=f"{kind} {place}",
                kind=kind.split("-")[0],
                compatible=kind,
                metadata=b"",
                needs=(),
                identity=Identity(device=0, inode=0),
                facts={},
            )
            for place, kind in enumerate(kinds)
        )
        session = Session(session_id=name.encode(), name=name, owner=7, metadata=b"", opened_at=0.0)
        if version is None:
            session.staged = {each.name: Staged(entry=each, fd=self._stack.enter_context(memfd())) for each in entries}
        else:
            described = Manifest(
                version=version,
                session_id=name.encode(),
                session=name,
                owner=7,
                metadata=b"",
                boot_id="",
                generation=1,
                opened_at=0.0,
                finalized_at=0.0,
                entries=entries,
            )
            session.sealed = Sealed.of(described, self._stack.enter_context(memfd()))
        self.sessions.append(session)


@pytest.fixture
def held() -> Iterator[Held]:
    with ExitStack() as stack:
        yield Held(stack)


def found(meet: Meet, held: Held, speakers: Sequence[tuple[int, int]] = ()) -> list[str]:
    return obstacles(meet, sessions=held.sessions, speakers=speakers)


def test_nothing_is_in_the_way_of_an_equal(held: Held) -> None:
    held.add("a", "memfd-v1", "eventfd-v1")
    held.add("b", "memfd-v1", version=None)
    assert found(MEET, held, [(1, 8)]) == []


def test_a_wider_range_carries_what_is_held(held: Held) -> None:
    held.add("a", "memfd-v1", "eventfd-v1")
    wider = VersionRange(low=1, high=9)
    newer = attrs.evolve(MEET, handover=wider, wire=wider, manifest=wider, kinds={**MEET.kinds, "memfd": ("memfd-v1", "memfd-v2")})
    assert found(newer, held, [(1, 8)]) == []


def test_no_common_handover_version(held: Held) -> None:
    (clause,) = found(attrs.evolve(MEET, handover=VersionRange(low=2, high=3)), held)
    assert clause == "it speaks handover version 2 to 3, this luod 1"


def test_a_manifest_that_it_does_not_read_counts_only_when_it_is_held(held: Held) -> None:
    newer = attrs.evolve(MEET, manifest=VersionRange(low=2, high=4))
    held.add("open", "memfd-v1", version=None)
    held.add("three", version=3)
    assert found(newer, held) == []
    for number in range(5):
        held.add(f"one {number}")
    held.add("five", version=5)
    assert found(newer, held) == [
        "it reads manifests of version 2 to 4, and version 1 is that of session 'one 0' of uid 7, session 'one 1' of uid 7, "
        "session 'one 2' of uid 7 and 2 more",
        "it reads manifests of version 2 to 4, and version 5 is that of session 'five' of uid 7",
    ]


def test_a_wire_version_that_it_does_not_speak_counts_only_when_a_client_does(held: Held) -> None:
    newer = attrs.evolve(MEET, wire=VersionRange(low=2, high=2))
    assert found(newer, held) == []
    assert found(newer, held, [(2, 8), (1, 9), (1, 10)]) == [
        "it speaks wire version 2 to clients, and version 1 is that of process 9, process 10"
    ]


@pytest.mark.parametrize("version", [1, None])
def test_kinds_that_it_does_not_know_in_this_version(held: Held, version: int | None) -> None:
    other = attrs.evolve(MEET, kinds={"memfd": ("memfd-v2", "memfd-v3")})
    held.add("new", "memfd-v2", version=version)
    assert found(other, held) == []
    held.add("old", "memfd-v1", "memfd-v2", "eventfd-v1", version=version)
    held.add("all", *5 * ["memfd-v1"], version=version)
    assert found(other, held) == [
        "entries of kind eventfd are eventfd-v1, it knows no such kind: 'eventfd-v1 2' of session 'old' of uid 7",
        "entries of kind memfd are memfd-v1, it knows memfd-v2, memfd-v3: 'memfd-v1 0' of session 'old' of uid 7, "
        "'memfd-v1 0' of session 'all' of uid 7, 'memfd-v1 1' of session 'all' of uid 7 and 3 more",
    ]


def test_all_obstacles_are_told_at_once_and_not_more_than_a_packet_takes(held: Held) -> None:
    far = VersionRange(low=8, high=9)
    stranger = Meet(luod="9", pid=1, handover=far, wire=far, manifest=far, kinds={})
    for number in range(100):
        held.add(f"{number:03d}".ljust(255, "x"), "memfd-v1", "eventfd-v1")
    clauses = found(stranger, held, [(1, pid) for pid in range(1000)])
    assert len(clauses) == 5
    assert sum(map(len, clauses)) < 2000


# What can be read for ever.


def test_meet_keeps_its_fields_for_ever() -> None:
    assert as_map(unpack(CODEC.encode(MEET))) == {
        "type": "meet",
        "luod": "0.1.0",
        "pid": 1,
        "handover": {"low": 1, "high": 1},
        "wire": {"low": 1, "high": 1},
        "manifest": {"low": 1, "high": 1},
        "kinds": {"memfd": ["memfd-v1"], "eventfd": ["eventfd-v1"], "pipe": ["pipe-v1"]},
    }
    assert CODEC.decode(pack(as_map(unpack(CODEC.encode(MEET))))) == MEET


@pytest.mark.parametrize("message", [MEET, OFFER, Declined(reason="no")])
def test_what_a_later_release_adds_before_a_version_is_agreed_on_is_ignored(message: Handover) -> None:
    fields = as_map(unpack(CODEC.encode(message)))
    kinds = fields.pop("kinds", None)  # a map that is no record
    widened = more(fields)
    if kinds is not None:
        widened["kinds"] = kinds
    assert CODEC.decode(pack(widened)) == message


@pytest.mark.parametrize("change", [{"pid": "1"}, {"handover": {"low": 1}}, {"handover": None}])
def test_in_all_else_these_are_strict(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolFault):
        CODEC.decode(pack({**as_map(unpack(CODEC.encode(MEET))), **change}))


def test_all_others_are_strict() -> None:
    with pytest.raises(ProtocolFault):
        CODEC.decode(pack({**as_map(unpack(CODEC.encode(Copied()))), "more": 1}))
