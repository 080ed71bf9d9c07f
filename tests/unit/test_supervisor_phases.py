"""Every cell of the supervisor's life."""

from __future__ import annotations

from itertools import product

import pytest

from luod.supervisor.phases import TABLE, Event, IllegalEvent, Phase, can, step

EXPECTED = {
    ("waiting", "due"): "starting",
    ("waiting", "stop"): "ended",
    ("starting", "said-ready"): "ready",
    ("starting", "said-stopping"): "leaving",
    ("starting", "said-trigger"): "aborting",
    ("starting", "due"): "clearing",
    ("starting", "died"): "clearing",
    ("starting", "stop"): "stopping",
    ("ready", "said-stopping"): "leaving",
    ("ready", "said-trigger"): "aborting",
    ("ready", "due"): "aborting",
    ("ready", "died"): "clearing",
    ("ready", "stop"): "stopping",
    ("leaving", "said-trigger"): "aborting",
    ("leaving", "due"): "clearing",
    ("leaving", "died"): "clearing",
    ("leaving", "stop"): "stopping",
    ("aborting", "due"): "killing",
    ("aborting", "died"): "clearing",
    ("aborting", "stop"): "clearing",
    ("stopping", "due"): "killing",
    ("stopping", "died"): "clearing",
    ("clearing", "due"): "killing",
    ("clearing", "alone"): "waiting",
    ("killing", "due"): "killing",
    ("killing", "alone"): "waiting",
}


@pytest.mark.parametrize(("phase", "event"), [*product(Phase, Event)])
def test_cell(phase: Phase, event: Event) -> None:
    following = EXPECTED.get((phase.value, event.value))
    assert can(phase, event) == (following is not None)
    if following is None:
        with pytest.raises(IllegalEvent, match=f"{event.value} can't happen to a supervisor that is {phase.value}"):
            step(phase, event)
    else:
        assert step(phase, event).value == following


def test_expected_rows_name_what_there_is() -> None:
    assert {phase for phase, _ in EXPECTED} | set(EXPECTED.values()) == {phase.value for phase in Phase}
    assert {event for _, event in EXPECTED} == {event.value for event in Event}
    assert len(TABLE) == len(EXPECTED)


def test_nothing_is_started_while_a_process_of_the_daemon_is_left() -> None:
    assert {cell for cell, following in TABLE.items() if following is Phase.STARTING} == {(Phase.WAITING, Event.DUE)}
    assert {event for (_, event), following in TABLE.items() if following is Phase.WAITING} == {Event.ALONE}


def test_no_phase_is_for_ever() -> None:
    assert {phase for phase in Phase if (phase, Event.DUE) not in TABLE} == {Phase.ENDED}
