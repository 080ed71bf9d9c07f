"""What a store had, adopted: by what the boxes say, whatever their names and their order."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager

import attrs
import msgpack
import pytest

from entries import entry_of
from luod import manifest
from luod.manifest import Manifest
from luod.store import Ended
from luod.succession import ledger
from luod.succession.adoption import Adopted, adopt
from luod.succession.fdstore import WITNESS
from luod.succession.ledger import Ending, Ledger, Record, Retrieval, Staying
from luod.system import Process, System
from luod_protocol import box, wire
from luod_protocol.fds import OwnedFd, close_all, duplicate
from things import memfd

BOOT = System().boot_id
ID = {name: name.encode().ljust(16, b"-") for name in ("one", "two", "three")}


def described(name: str, fd: int, *, session_id: bytes = b"", at: float = 1.0, boot_id: str = BOOT) -> Manifest:
    entry = entry_of(fd, "ram")
    return Manifest(
        version=1,
        session_id=session_id or ID[name],
        session=name,
        owner=1000,
        metadata=b"about it",
        boot_id=boot_id,
        generation=3,
        opened_at=0.5,
        finalized_at=at,
        entries=(entry,),
    )


@contextmanager
def stored_box(name: str, *, session_id: bytes = b"", at: float = 1.0, boot_id: str = BOOT) -> Generator[tuple[str, OwnedFd]]:
    with memfd(name.encode()) as fd:
        description = described(name, fd.fileno(), session_id=session_id, at=at, boot_id=boot_id)
        with box.seal(manifest.encode(description), [fd.fileno()]) as sealed:
            yield f"b{description.session_id[0]}", sealed


@contextmanager
def of_layout(layout: int, data: bytes, fds: Sequence[int]) -> Generator[OwnedFd]:
    """A box of another layout than there is."""
    keep, give = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with give, OwnedFd(keep.detach()) as sealed:
        wire.send(give, struct.pack("<8sBxxxIQ", b"luodbox1", layout, len(fds), len(data)) + data, fds)
        yield sealed


@contextmanager
def stored_ledger(generation: int, records: Sequence[Record]) -> Generator[tuple[str, OwnedFd]]:
    kept = Ledger(records)
    try:
        yield ledger.name(generation), kept.memfd
    finally:
        kept.close()


@contextmanager
def adopted(*stored: tuple[str, OwnedFd]) -> Generator[Adopted]:
    """Adopt duplicates of what is stored, as a luod gets them."""
    result = adopt([(name, duplicate(fd.fileno())) for name, fd in stored], BOOT)
    try:
        yield result
    finally:
        for session in result.sessions:
            close_all(session.take_fds())
        close_all(each.box for each in result.opaque)


def test_nothing() -> None:
    with adopted() as result:
        assert result == Adopted(generation=0, sessions=[], opaque=[], retrieved={}, ended=[], others=[], leaving=[])


def test_sessions_come_back_oldest_first_whatever_their_order() -> None:
    with ExitStack() as stack:
        boxes = [stack.enter_context(stored_box(name, at=at)) for name, at in (("three", 3.0), ("one", 1.0), ("two", 2.0))]
        with adopted(*boxes) as result:
            assert [session.name for session in result.sessions] == ["one", "two", "three"]
            assert all(
                session.stored == f"b{session.session_id[0]}" and session.state == "preserved" and session.owner == 1000
                for session in result.sessions
            )
            assert not result.others
            sealed = result.sessions[0].sealed
            assert sealed is not None
            (fd,) = box.look(sealed.box.fileno())
            with fd:
                assert os.pread(fd.fileno(), 9, 0) == b"one"


def test_the_newest_ledger_says_what_ended_and_who_has_retrieved() -> None:
    gone = Ended(session_id=ID["one"], owner=1000, finished=True)
    stayed = Ended(session_id=ID["two"], owner=1000, finished=True)
    process = Process(pid=7, start=8)
    records: list[Record] = [
        Retrieval(session_id=ID["two"], process=process),
        Retrieval(session_id=ID["one"], process=process),
        Ending(ended=stayed),
        Staying(session_id=ID["two"]),
        Ending(ended=gone),
    ]
    with (
        stored_ledger(4, records) as newest,
        stored_ledger(3, [Ending(ended=stayed)]) as older,
        stored_box("one") as one,
        stored_box("two") as two,
        adopted(two, older, one, newest) as result,
    ):
        assert result.generation == 4
        assert [session.name for session in result.sessions] == ["two"]
        assert result.sessions[0].retrieved_by == {process}
        assert result.ended == [gone]
        assert set(result.others) == {"luod-ledger-3", "luod-ledger-4", one[0]}
        assert set(result.leaving) == set(result.others)


def test_who_retrieved_before_another_boot_is_somebody_else_now() -> None:
    records = [Retrieval(session_id=ID["one"], process=Process(pid=7, start=8))]
    with stored_ledger(1, records) as kept, stored_box("one", boot_id="another") as one, adopted(kept, one) as result:
        assert result.sessions[0].retrieved_by == set()


def test_a_witness_is_of_an_operation_that_was_cut_off() -> None:
    with memfd() as fd, adopted((WITNESS, fd)) as result:
        assert result.others == result.leaving == [WITNESS]


def test_what_can_not_be_used_stays_in_the_store(caplog: pytest.LogCaptureFixture) -> None:
    with (
        memfd(b"no box") as other,
        stored_box("one") as one,
        memfd(b"ram") as ram,
        box.seal(manifest.encode(described("two", ram.fileno())), [other.fileno()]) as wrong,
        adopted(("luod-x", other), ("b7", wrong), one) as result,
    ):
        assert [session.name for session in result.sessions] == ["one"]
        assert set(result.others) == {"luod-x", "b7"}
        assert (result.opaque, result.leaving) == ([], [])
    for words in ("luod-x in the service manager's store can't be used and stays there", "is another object"):
        assert words in caplog.text


def test_what_another_luod_may_read_is_kept_and_stays_in_the_store() -> None:
    process = Process(pid=7, start=8)
    with memfd(b"ram") as ram, stored_box("one") as one:
        strange = attrs.evolve(described("three", ram.fileno()).entries[0], compatible="memfd-v9")
        with (
            stored_ledger(1, [Retrieval(session_id=b"of the later one", process=process)]) as kept,
            box.seal(msgpack.packb({"type": "manifest", "version": 99, "new": "fields"}), [ram.fileno()] * 3) as later,
            box.seal(manifest.encode(attrs.evolve(described("three", ram.fileno()), entries=(strange,))), [ram.fileno()]) as kind,
            of_layout(9, manifest.encode(described("two", ram.fileno())), [ram.fileno()]) as layout,
            adopted(kept, ("b3", later), ("b4", kind), one, ("b5", layout)) as result,
        ):
            assert [session.name for session in result.sessions] == ["one"]
            assert {(each.stored, each.fds, each.manifest) for each in result.opaque} == {("b3", 3, None), ("b4", 1, None), ("b5", 1, None)}
            assert set(result.others) == {"luod-ledger-1", "b3", "b4", "b5"}
            assert result.leaving == ["luod-ledger-1"]
            assert result.retrieved == {b"of the later one": {process}}
            why = {each.stored: each.why for each in result.opaque}
            assert why["b3"] == "a manifest of version 99, this luod reads 1"
            assert "memfd-v9, which this luod can't verify" in why["b4"]
            assert "layout 9, which this luod doesn't know" in why["b5"]


def test_a_session_that_is_there_twice_is_adopted_once() -> None:
    with (
        stored_box("one", at=1.0) as first,
        stored_box("one", at=2.0) as same_id,
        stored_box("one", session_id=b"another id......", at=3.0) as same_name,
        stored_box("two", at=4.0) as renamed,
        adopted(same_name, same_id, ("luod-whatever", renamed[1]), first) as result,
    ):
        session, other = result.sessions
        assert session.sealed is not None
        assert session.sealed.manifest.finalized_at == 1.0
        assert other.stored == "luod-whatever"
        assert sorted(result.others) == sorted([same_id[0], same_name[0]])
        assert result.leaving == []
        assert sorted(each.stored for each in result.opaque) == sorted(result.others)
        assert {each.why for each in result.opaque} == {f"session {ID['one'].hex()} is there already", "uid 1000 has another session 'one'"}


def test_a_ledger_that_can_not_be_read_stays_and_counts_for_the_generation(caplog: pytest.LogCaptureFixture) -> None:
    with memfd(b"no ledger") as other, stored_ledger(1, []) as older, stored_box("one") as one:
        with adopted(("luod-ledger-9", other), older, one) as result:
            assert result.generation == 9
            assert len(result.sessions) == 1
            assert result.leaving == ["luod-ledger-1"]
        assert "luod-ledger-9 in the service manager's store can't be used" in caplog.text
