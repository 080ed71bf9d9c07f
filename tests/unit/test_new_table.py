"""Every cell of the successor's side of a handover."""

from __future__ import annotations

from itertools import product

import pytest

from luod.succession.new_table import TABLE, IllegalNewEvent, NewEvent, NewState, step

EXPECTED = {
    ("starting", "offered"): "copying",
    ("starting", "refused"): "left",
    ("starting", "lost-alive"): "left",
    ("copying", "copied"): "ready",
    ("copying", "refused"): "left",
    ("copying", "lost-alive"): "left",
    ("copying", "old-died"): "serving",
    ("copying", "old-died-managed"): "left",
    ("ready", "frozen"): "holding",
    ("ready", "refused"): "left",
    ("ready", "lost-alive"): "left",
    ("ready", "old-died"): "serving",
    ("ready", "old-died-managed"): "left",
    ("holding", "committed"): "serving",
    ("holding", "refused"): "left",
    ("holding", "lost-alive"): "left",
    ("holding", "old-died"): "serving",
    ("holding", "old-died-managed"): "left",
}


@pytest.mark.parametrize(("state", "event"), [*product(NewState, NewEvent)])
def test_cell(state: NewState, event: NewEvent) -> None:
    following = EXPECTED.get((state.value, event.value))
    if following is None:
        with pytest.raises(IllegalNewEvent, match=f"{event.value} can't happen to a successor that is {state.value}"):
            step(state, event)
    else:
        assert step(state, event).value == following


def test_expected_rows_name_what_there_is() -> None:
    assert {state for state, _ in EXPECTED} | set(EXPECTED.values()) == {state.value for state in NewState}
    assert {event for _, event in EXPECTED} == {event.value for event in NewEvent}
    assert len(TABLE) == len(EXPECTED)


@pytest.mark.parametrize("end", [NewState.SERVING, NewState.LEFT])
def test_an_end_has_no_way_out(end: NewState) -> None:
    assert not [event for state, event in TABLE if state is end]


def test_serving_is_entered_by_the_commit_or_by_the_old_daemons_death() -> None:
    assert {cell for cell, following in TABLE.items() if following is NewState.SERVING} == {
        (NewState.HOLDING, NewEvent.COMMITTED),
        (NewState.COPYING, NewEvent.OLD_DIED),
        (NewState.READY, NewEvent.OLD_DIED),
        (NewState.HOLDING, NewEvent.OLD_DIED),
    }


def test_the_commit_comes_after_all_that_is_live() -> None:
    assert {state for state, event in TABLE if event is NewEvent.COMMITTED} == {NewState.HOLDING}
    assert {cell for cell, following in TABLE.items() if following is NewState.HOLDING} == {(NewState.READY, NewEvent.FROZEN)}


@pytest.mark.parametrize("state", [each for each in NewState if each not in (NewState.SERVING, NewState.LEFT)])
def test_while_the_old_daemon_lives_the_end_of_the_socket_means_leaving(state: NewState) -> None:
    assert step(state, NewEvent.LOST_ALIVE) is NewState.LEFT
    assert step(state, NewEvent.REFUSED) is NewState.LEFT


def test_without_an_offer_there_is_nothing_to_promote() -> None:
    assert (NewState.STARTING, NewEvent.OLD_DIED) not in TABLE


def test_the_happy_path() -> None:
    state = NewState.STARTING
    for event in (NewEvent.OFFERED, NewEvent.COPIED, NewEvent.FROZEN, NewEvent.COMMITTED):
        state = step(state, event)
    assert state is NewState.SERVING
