"""What a successor of another release can't carry is found before anything is frozen, item by item."""

from __future__ import annotations

import attrs

from luod import manifest
from luod.succession.messages import CODEC, VERSIONS, Meet
from luod.succession.skew import obstacles
from luod_protocol.codec import as_map, pack, unpack
from luod_protocol.version import WIRE, VersionRange

HELD = {("memfd", "memfd-v1"), ("eventfd", "eventfd-v1")}
MEET = Meet(
    luod="0.1.0",
    pid=1,
    handover=VERSIONS,
    wire=WIRE,
    manifest=manifest.VERSIONS,
    kinds={"memfd": ("memfd-v1",), "eventfd": ("eventfd-v1",), "pipe": ("pipe-v1",)},
)


def found(
    meet: Meet, *, manifests: set[int] | None = None, wires: set[int] | None = None, kinds: set[tuple[str, str]] | None = None
) -> list[str]:
    return obstacles(meet, manifests=manifests or set(), wires=wires or set(), kinds=kinds or set())


def test_nothing_is_in_the_way_of_an_equal() -> None:
    assert found(MEET, manifests={1}, wires={1}, kinds=HELD) == []


def test_a_wider_range_carries_what_is_held() -> None:
    wider = VersionRange(low=1, high=9)
    newer = attrs.evolve(MEET, handover=wider, wire=wider, manifest=wider, kinds={**MEET.kinds, "memfd": ("memfd-v1", "memfd-v2")})
    assert found(newer, manifests={1}, wires={1}, kinds=HELD) == []


def test_no_common_handover_version() -> None:
    (clause,) = found(attrs.evolve(MEET, handover=VersionRange(low=2, high=3)))
    assert clause == "it speaks handover version 2 to 3, this luod 1"


def test_a_manifest_that_it_does_not_read_counts_only_when_it_is_held() -> None:
    newer = attrs.evolve(MEET, manifest=VersionRange(low=2, high=4))
    assert found(newer) == []
    assert found(newer, manifests={1, 3, 5}) == [
        "it reads manifests of version 2 to 4, 1 is held",
        "it reads manifests of version 2 to 4, 5 is held",
    ]


def test_a_wire_version_that_it_does_not_speak_counts_only_when_a_client_does() -> None:
    newer = attrs.evolve(MEET, wire=VersionRange(low=2, high=2))
    assert found(newer) == []
    assert found(newer, wires={1, 2}) == ["it speaks wire version 2 to clients, one is connected with 1"]


def test_kinds_that_it_does_not_know_in_this_version() -> None:
    other = attrs.evolve(MEET, kinds={"memfd": ("memfd-v2", "memfd-v3")})
    assert found(other) == []
    assert found(other, kinds=HELD) == [
        "entries of kind eventfd are eventfd-v1, it knows no such kind",
        "entries of kind memfd are memfd-v1, it knows memfd-v2, memfd-v3",
    ]


def test_all_obstacles_are_told_at_once() -> None:
    far = VersionRange(low=8, high=9)
    stranger = Meet(luod="9", pid=1, handover=far, wire=far, manifest=far, kinds={})
    assert len(found(stranger, manifests={1}, wires={1}, kinds=HELD)) == 5


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
