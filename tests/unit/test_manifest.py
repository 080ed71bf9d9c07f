"""The manifest's bytes: round trips, the future, and what is no manifest."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod import manifest
from luod.manifest import Entry, ForeignManifest, Identity, Manifest, ManifestFault
from luod_protocol.codec import as_map, pack, unpack

NUMBERS = st.integers(min_value=0, max_value=2**63 - 1)
TEXT = st.text(max_size=20)
ENTRIES = st.builds(
    Entry,
    name=TEXT,
    kind=TEXT,
    compatible=TEXT,
    metadata=st.binary(max_size=50),
    needs=st.lists(TEXT, max_size=3).map(tuple),
    identity=st.builds(Identity, device=NUMBERS, inode=NUMBERS),
    facts=st.dictionaries(TEXT, st.one_of(NUMBERS, TEXT), max_size=4),
)
MANIFESTS = st.builds(
    Manifest,
    version=st.just(1),
    session_id=st.binary(min_size=16, max_size=16),
    session=TEXT,
    owner=st.integers(min_value=0, max_value=2**32 - 1),
    metadata=st.binary(max_size=50),
    boot_id=TEXT,
    generation=NUMBERS,
    opened_at=st.floats(min_value=0, max_value=4e9),
    finalized_at=st.floats(min_value=0, max_value=4e9),
    entries=st.lists(ENTRIES, max_size=4).map(tuple),
)
SAMPLE = Manifest(
    version=1,
    session_id=bytes(16),
    session="guest-7",
    owner=1000,
    metadata=b"\xff",
    boot_id="0d1e",
    generation=3,
    opened_at=1.5,
    finalized_at=2.5,
    entries=(
        Entry(
            name="ram",
            kind="memfd",
            compatible="memfd-v1",
            metadata=b"",
            needs=(),
            identity=Identity(device=1, inode=2),
            facts={"size": 4096, "name": "ram"},
        ),
    ),
)


def fields(of: Manifest = SAMPLE) -> dict[str, Any]:
    return as_map(unpack(manifest.encode(of)))


@given(MANIFESTS)
def test_round_trip(written: Manifest) -> None:
    assert manifest.decode(manifest.encode(written)) == written


def test_the_tag_and_the_version_are_where_every_later_luod_finds_them() -> None:
    assert fields()["type"] == "manifest"
    assert fields()["version"] == 1


@pytest.mark.parametrize("more", [{}, {"colour": "red"}])
def test_a_newer_version_is_told_from_a_broken_one(more: dict[str, Any]) -> None:
    newer = {**fields(), "version": 2, **more}
    with pytest.raises(ForeignManifest, match="version 2, this luod reads 1"):
        manifest.decode(pack(newer))
    with pytest.raises(ForeignManifest):
        manifest.decode(pack({"version": 7}))


@pytest.mark.parametrize(
    "change",
    [
        {"type": "box"},
        {"version": "2"},
        {"version": True},
        {"version": None},
        {"colour": "red"},
        {"owner": "1000"},
        {"session_id": "text"},
        {"metadata": "text"},
        {"opened_at": "now"},
        {"entries": None},
        {"entries": [{"name": "ram"}]},
        {"entries": {}},
    ],
)
def test_what_is_no_manifest(change: dict[str, Any]) -> None:
    with pytest.raises(ManifestFault):
        manifest.decode(pack({**fields(), **change}))


@pytest.mark.parametrize("missing", [field.name for field in attrs.fields(Manifest)])
def test_no_field_may_be_missing(missing: str) -> None:
    partial = fields()
    del partial[missing]
    with pytest.raises(ManifestFault):
        manifest.decode(pack(partial))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x80", b"\x90", b"\x01", pack({1: 2}), manifest.encode(SAMPLE)[:-1], manifest.encode(SAMPLE) + b"\0"]
)
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(ManifestFault):
        manifest.decode(data)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_manifest_or_an_error_of_ours(data: bytes) -> None:
    try:
        manifest.decode(data)
    except (ManifestFault, ForeignManifest):
        pass
    else:
        raise AssertionError("random bytes were a manifest")


@given(st.data())
def test_a_damaged_manifest_gives_a_manifest_or_an_error_of_ours(data: st.DataObject) -> None:
    whole = bytearray(manifest.encode(SAMPLE))
    place = data.draw(st.integers(min_value=0, max_value=len(whole) - 1))
    whole[place] ^= data.draw(st.integers(min_value=1, max_value=255))
    with suppress(ManifestFault, ForeignManifest):
        assert manifest.decode(bytes(whole)) != SAMPLE
