"""The checks of a session's content: what passes, what is refused, and that the refusal names the entry."""

from __future__ import annotations

import fcntl
import graphlib
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod import checks
from luod_protocol.errors import Code, Refusal
from luod_protocol.limits import MAX_METADATA_BYTES


@pytest.mark.parametrize("name", ["a", "x" * 255, "guest 7/ram~", "a-luod", "LUOD"])
def test_names_that_pass(name: str) -> None:
    checks.session_name(name)
    checks.entry_name(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("x" * 256, "256 characters"),
        ("x" * 10_240, "10240 characters"),
        ("a:b", "':'"),
        ("a\nb", "printable ASCII"),
        ("a\0", "printable ASCII"),
        ("a\x7f", "printable ASCII"),
        ("grün", "printable ASCII"),
    ],
)
def test_names_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason) as session:
        checks.session_name(name)
    with pytest.raises(Refusal, match=reason) as entry:
        checks.entry_name(name)
    for caught in (session, entry):
        assert caught.value.code is Code.BAD_NAME
        assert len(caught.value.message) < 300
        assert caught.value.message.isprintable()
    assert entry.value.entry == name[:64]


def test_luods_own_names_are_no_sessions_names_but_may_be_entries() -> None:
    for name in ("luod", "luod-7"):
        with pytest.raises(Refusal, match="luod's own"):
            checks.session_name(name)
        checks.entry_name(name)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_session_id_has_16_bytes(size: int) -> None:
    checks.session_id(bytes(16))
    with pytest.raises(Refusal, match=f"this has {size}") as caught:
        checks.session_id(bytes(size))
    assert caught.value.code is Code.BAD_REQUEST


def test_metadata_has_a_limit() -> None:
    checks.metadata(bytes(MAX_METADATA_BYTES), "entry 'ram'", "ram")
    with pytest.raises(Refusal, match=f"{MAX_METADATA_BYTES + 1} bytes of metadata for entry 'ram'") as caught:
        checks.metadata(bytes(MAX_METADATA_BYTES + 1), "entry 'ram'", "ram")
    assert (caught.value.code, caught.value.entry) == (Code.TOO_LARGE, "ram")


@given(st.lists(st.sampled_from("abcdef")))
def test_unique(names: list[str]) -> None:
    if len(set(names)) == len(names):
        checks.unique(names)
        return
    twice = next(name for index, name in enumerate(names) if name in names[:index])
    with pytest.raises(Refusal) as caught:
        checks.unique(names)
    assert (caught.value.code, caught.value.entry) == (Code.ENTRY_EXISTS, twice)


@given(st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.sampled_from("abcdefg"), max_size=4).map(tuple), max_size=7))
def test_needs_are_there_and_go_round_in_no_circle(graph: dict[str, tuple[str, ...]]) -> None:
    missing = {(name, need) for name, needs in graph.items() for need in needs if need not in graph}
    try:
        graphlib.TopologicalSorter(graph).prepare()
        circular = False
    except graphlib.CycleError:
        circular = True
    if not missing and not circular:
        checks.needs(graph)
        return
    with pytest.raises(Refusal) as caught:
        checks.needs(graph)
    assert caught.value.code is Code.BAD_NEEDS
    assert caught.value.entry in graph
    if missing:
        assert any(f"entry {name!r} needs {need!r}, which isn't" in caught.value.message for name, need in missing)
    else:
        circle = caught.value.message.partition("circle: ")[2].split(" -> ")
        assert circle[0] == circle[-1]
        assert len(circle) > 1
        assert all(need in graph[name] for name, need in pairwise(circle))


def test_needs_take_a_long_chain() -> None:
    chain = {f"e{index}": (f"e{index + 1}",) if index < 16_383 else () for index in range(16_384)}
    checks.needs(chain)
    with pytest.raises(Refusal, match="circle"):
        checks.needs({**chain, "e16383": ("e0",)})


def test_seal_bits_are_those_of_the_kernel() -> None:
    memfd = os.memfd_create("seals", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, checks.seal_bits("ram", ["shrink", "grow"]))
        with pytest.raises(PermissionError):
            os.ftruncate(memfd, 1)
        os.pwrite(memfd, b"", 0)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, checks.seal_bits("ram", ["write", "seal"]))
        assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    finally:
        os.close(memfd)
    assert checks.seal_bits("ram", []) == 0
    # include/uapi/linux/fcntl.h
    assert checks.seal_bits("ram", ["future-write", "exec"]) == 0x0010 | 0x0020


def test_an_unknown_seal_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        Refusal, match=r"unknown seal 'wax' for entry 'ram': there are seal, shrink, grow, write, future-write, exec"
    ) as caught:
        checks.seal_bits("ram", ["write", "wax"])
    assert (caught.value.code, caught.value.entry) == (Code.BAD_SEAL, "ram")
