"""The sessions of a daemon, and its memory of those that ended."""

from __future__ import annotations

import pytest

from luod.session import Session
from luod.store import MAX_REMEMBERED, Ended, Store


def session(number: int, name: str, owner: int = 0) -> Session:
    return Session(session_id=number.to_bytes(16, "big"), name=name, owner=owner, metadata=b"", opened_at=0.0)


def ended(number: int, *, finished: bool = True) -> Ended:
    return Ended(session_id=number.to_bytes(16, "big"), owner=0, finished=finished)


def test_a_session_is_found_by_id_and_by_owner_and_name() -> None:
    store = Store()
    mine, theirs = session(1, "a"), session(2, "a", owner=7)
    store.add(mine)
    store.add(theirs)
    assert store.by_id(mine.session_id) is mine
    assert store.by_name(0, "a") is mine
    assert store.by_name(7, "a") is theirs
    assert store.by_name(8, "a") is None
    assert store.by_name(0, "b") is None
    assert store.by_id(bytes(16)) is None
    assert len(store) == 2


def test_a_removed_session_is_in_neither_index_and_its_name_is_free() -> None:
    store = Store()
    first, second = session(1, "a"), session(2, "a")
    store.add(first)
    store.remove(first)
    assert (store.by_id(first.session_id), store.by_name(0, "a"), len(store), list(store)) == (None, None, 0, [])
    store.add(second)
    assert store.by_name(0, "a") is second
    with pytest.raises(KeyError):
        store.remove(first)


def test_sessions_come_oldest_first_and_may_change_meanwhile() -> None:
    store = Store()
    sessions = [session(number, f"s{number}") for number in (3, 1, 2)]
    for each in sessions:
        store.add(each)
    seen: list[Session] = []
    for each in store:
        seen.append(each)
        store.remove(each)
    assert seen == sessions
    assert not len(store)


def test_an_end_is_remembered_by_id() -> None:
    store = Store()
    store.remember(ended(1))
    store.remember(ended(2, finished=False))
    assert store.ended(ended(1).session_id) == ended(1)
    assert store.ended(ended(2).session_id) == ended(2, finished=False)
    assert store.ended(ended(3).session_id) is None
    assert list(store.all_ended) == [ended(1), ended(2, finished=False)]


def test_the_oldest_end_is_forgotten_first() -> None:
    store = Store()
    for number in range(MAX_REMEMBERED + 3):
        store.remember(ended(number))
    assert [store.ended(ended(number).session_id) for number in range(3)] == [None] * 3
    assert list(store.all_ended) == [ended(number) for number in range(3, MAX_REMEMBERED + 3)]


def test_an_end_that_is_told_twice_takes_one_place() -> None:
    store = Store()
    for _ in range(2):
        for number in range(MAX_REMEMBERED):
            store.remember(ended(number))
    assert len(list(store.all_ended)) == MAX_REMEMBERED
