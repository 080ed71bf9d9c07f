"""What becomes of boxes that an earlier luod could not read, when all sessions are there."""

from __future__ import annotations

import pytest

from luod.manifest import Manifest
from luod.session import Session
from luod.store import Opaque, Store
from luod.succession.opaque import as_session, decide, tell
from luod.system import Process
from luod_protocol.fds import OwnedFd, duplicate
from things import memfd

PROCESS = Process(pid=7, start=8)


def described(name: str, *, session_id: bytes = b"", owner: int = 0, at: float = 1.0) -> Manifest:
    return Manifest(
        version=1,
        session_id=session_id or name.encode(),
        session=name,
        owner=owner,
        metadata=b"",
        boot_id="this one",
        generation=1,
        opened_at=0.0,
        finalized_at=at,
        entries=(),
    )


@pytest.fixture(name="box")
def any_box() -> OwnedFd:
    return memfd()


def opened(name: str, *, session_id: bytes = b"", owner: int = 0) -> Session:
    return Session(session_id=session_id or name.encode(), name=name, owner=owner, metadata=b"", opened_at=0.0)


def test_the_oldest_of_a_name_and_those_that_nobody_is_in_the_way_of(box: OwnedFd) -> None:
    with box:

        def found(name: str, *, session_id: bytes = b"", owner: int = 0, at: float = 1.0) -> Opaque:
            return Opaque(box=box, stored=name, manifest=described(name, session_id=session_id, owner=owner, at=at))

        unread = Opaque(box=box, stored="", why="unread")
        later, first = found("a", session_id=b"x", at=3.0), found("a", at=2.0)
        same_id = found("b", session_id=b"a", at=9.0)
        taken, taken_id, another_owner = (
            found("open", session_id=b"z"),
            found("c", session_id=b"open"),
            found("open", session_id=b"y", owner=5),
        )
        gone = found("gone")
        boxes = [
            later,
            unread,
            first,
            taken,
            taken_id,
            another_owner,
            gone,
            same_id,
        ]
        decided = decide(boxes, [opened("open")], {b"gone"})
        assert [each for each, _ in decided.sessions] == [another_owner, first]
        assert decided.ended == [gone]
        assert {each.why for each in decided.opaque} == {
            "unread",
            "uid 0 has another session 'a'",
            "uid 0 has another session 'open'",
            "session 6f70656e is there already",
            "session 61 is there already",
        }
        assert len(decided.opaque) == 5


def test_who_has_retrieved_counts_on_the_same_boot_only(box: OwnedFd) -> None:
    with box:
        opaque, retrieved = Opaque(box=box, stored="b1"), {b"a": {PROCESS}}
        assert as_session(opaque, described("a"), retrieved, "this one").retrieved_by == {PROCESS}
        assert as_session(opaque, described("a"), retrieved, "another").retrieved_by == set()
        session = as_session(opaque, described("b"), retrieved, "this one")
        assert (session.retrieved_by, session.stored, session.state) == (set(), "b1", "preserved")


def test_retrievals_are_remembered_for_what_can_not_be_read_only(box: OwnedFd) -> None:
    store = Store()
    store.add(opened("a"))
    store.note_retrieval(b"a", PROCESS)
    store.note_retrieval(b"b", PROCESS)
    assert store.retrieved == {}
    with box:
        store.opaque.append(Opaque(box=duplicate(box.fileno()), stored=""))
        store.note_retrieval(b"b", PROCESS)
        assert store.retrieved == {b"b": {PROCESS}}
        store.opaque.pop().box.close()


def test_a_few_are_named_in_the_log(box: OwnedFd, caplog: pytest.LogCaptureFixture) -> None:
    tell([])
    assert caplog.text == ""
    with box:
        tell([Opaque(box=box, stored=f"b{number}", why="why") for number in range(7)])
    assert "b0 (why), b1 (why), b2 (why) and 4 more" in caplog.text
