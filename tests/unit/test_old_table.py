"""Every cell of the old daemon's side of a handover."""

from __future__ import annotations

from itertools import product

import pytest

from luod.succession.old_table import TABLE, IllegalOldEvent, OldEvent, OldState, step

EXPECTED = {
    ("serving", "successor-started"): "meeting",
    ("meeting", "accepted"): "copying",
    ("meeting", "declined"): "serving",
    ("meeting", "lost"): "serving",
    ("meeting", "late"): "serving",
    ("copying", "verified"): "freezing",
    ("copying", "declined"): "serving",
    ("copying", "lost"): "serving",
    ("copying", "late"): "serving",
    ("freezing", "all-parked"): "frozen",
    ("freezing", "declined"): "serving",
    ("freezing", "lost"): "serving",
    ("freezing", "late"): "serving",
    ("frozen", "serving-read"): "replaced",
    ("frozen", "declined"): "draining",
    ("frozen", "lost"): "draining",
    ("frozen", "late"): "draining",
    ("draining", "serving-read"): "replaced",
    ("draining", "queue-empty"): "serving",
    ("replaced", "confirmed"): "released",
}


@pytest.mark.parametrize(("state", "event"), [*product(OldState, OldEvent)])
def test_cell(state: OldState, event: OldEvent) -> None:
    following = EXPECTED.get((state.value, event.value))
    if following is None:
        with pytest.raises(IllegalOldEvent, match=f"{event.value} can't happen to an old daemon that is {state.value}"):
            step(state, event)
    else:
        assert step(state, event).value == following


def test_expected_rows_name_what_there_is() -> None:
    assert {state for state, _ in EXPECTED} | set(EXPECTED.values()) == {state.value for state in OldState}
    assert {event for _, event in EXPECTED} == {event.value for event in OldEvent}
    assert len(TABLE) == len(EXPECTED)


def test_replaced_leads_to_the_end_and_nowhere_else() -> None:
    assert {event for state, event in TABLE if state is OldState.REPLACED} == {OldEvent.CONFIRMED}
    assert not [event for state, event in TABLE if state is OldState.RELEASED]


def test_replaced_is_entered_by_reading_serving_and_only_after_the_freeze() -> None:
    assert {cell for cell, following in TABLE.items() if following is OldState.REPLACED} == {
        (OldState.FROZEN, OldEvent.SERVING_READ),
        (OldState.DRAINING, OldEvent.SERVING_READ),
    }
    assert {state for state, event in TABLE if event is OldEvent.SERVING_READ} == {OldState.FROZEN, OldState.DRAINING}


def test_from_frozen_the_only_way_back_to_serving_leads_through_the_drained_queue() -> None:
    ways_out = {event: following for (state, event), following in TABLE.items() if state is OldState.FROZEN}
    assert ways_out.pop(OldEvent.SERVING_READ) is OldState.REPLACED
    assert set(ways_out.values()) == {OldState.DRAINING}
    assert {event: following for (state, event), following in TABLE.items() if state is OldState.DRAINING} == {
        OldEvent.SERVING_READ: OldState.REPLACED,
        OldEvent.QUEUE_EMPTY: OldState.SERVING,
    }


@pytest.mark.parametrize("state", [OldState.MEETING, OldState.COPYING, OldState.FREEZING])
@pytest.mark.parametrize("event", [OldEvent.LOST, OldEvent.DECLINED, OldEvent.LATE])
def test_before_the_freeze_whatever_befalls_the_successor_leads_back_to_serving(state: OldState, event: OldEvent) -> None:
    assert step(state, event) is OldState.SERVING


def test_the_happy_path() -> None:
    state = OldState.SERVING
    for event in (OldEvent.SUCCESSOR_STARTED, OldEvent.ACCEPTED, OldEvent.VERIFIED, OldEvent.ALL_PARKED, OldEvent.SERVING_READ):
        state = step(state, event)
    assert state is OldState.REPLACED
