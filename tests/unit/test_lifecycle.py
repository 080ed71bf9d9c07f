"""Every cell of the table of a session's life."""

from __future__ import annotations

from itertools import product

import pytest

from luod.lifecycle import TABLE, IllegalEvent, SessionEvent, SessionState, step
from luod.session import Session

EXPECTED = {
    ("open", "preserve"): "open",
    ("open", "unpreserve"): "open",
    ("open", "finalize"): "preserved",
    ("open", "cancel"): "gone",
    ("open", "serializer-lost"): "gone",
    ("preserved", "claim"): "claimed",
    ("preserved", "discard"): "gone",
    ("claimed", "retrieve"): "claimed",
    ("claimed", "release"): "preserved",
    ("claimed", "claimer-lost"): "preserved",
    ("claimed", "finish"): "gone",
}


@pytest.mark.parametrize(("state", "event"), [*product(SessionState, SessionEvent)])
def test_cell(state: SessionState, event: SessionEvent) -> None:
    session = Session(session_id=bytes(16), name="s", owner=0, metadata=b"", opened_at=0.0, state=state)
    following = EXPECTED.get((state.value, event.value))
    if following is None:
        with pytest.raises(IllegalEvent, match=f"{event.value} can't happen to a session that is {state.value}"):
            session.step(event)
        assert session.state is state
    else:
        session.step(event)
        assert session.state.value == following


def test_expected_rows_name_what_there_is() -> None:
    assert {state for state, _ in EXPECTED} | set(EXPECTED.values()) == {state.value for state in SessionState}
    assert {event for _, event in EXPECTED} == {event.value for event in SessionEvent}
    assert len(TABLE) == len(EXPECTED)


def test_gone_is_the_end() -> None:
    assert not [event for state, event in TABLE if state is SessionState.GONE]


def test_only_the_client_that_has_it_or_discard_ends_a_finalized_session() -> None:
    ends = {
        (state, event) for (state, event), following in TABLE.items() if following is SessionState.GONE and state is not SessionState.OPEN
    }
    assert ends == {(SessionState.PRESERVED, SessionEvent.DISCARD), (SessionState.CLAIMED, SessionEvent.FINISH)}


def test_nothing_opens_a_finalized_session_again() -> None:
    assert {state for (state, _), following in TABLE.items() if following is SessionState.OPEN} == {SessionState.OPEN}


def test_a_lost_client_rolls_back_what_is_open_and_loses_nothing_that_is_finalized() -> None:
    assert step(SessionState.OPEN, SessionEvent.SERIALIZER_LOST) is SessionState.GONE
    assert step(SessionState.CLAIMED, SessionEvent.CLAIMER_LOST) is SessionState.PRESERVED
    assert {state for state, event in TABLE if event is SessionEvent.SERIALIZER_LOST} == {SessionState.OPEN}
    assert {state for state, event in TABLE if event is SessionEvent.CLAIMER_LOST} == {SessionState.CLAIMED}


def test_claimed_is_entered_by_claim_alone() -> None:
    entries = {
        (state, event) for (state, event), following in TABLE.items() if following is SessionState.CLAIMED and state is not following
    }
    assert entries == {(SessionState.PRESERVED, SessionEvent.CLAIM)}
