"""The parent's life, as a table.

Theory. There is at most one main process. It is started, becomes ready, and is lost in one of many ways; all of them lead through
`clearing`, which ends what it left behind, and back to `waiting`. `due` is the end of a phase's time: of the back-off, of the patience
with a start, of the watchdog, or of a bound for dying.

Invariants: nothing is started but from `waiting`, which is entered when no process of the daemon is left. `ended` is entered from
`waiting`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class Phase(enum.StrEnum):
    """What the parent is doing.

    LEAVING: the daemon said that it ends. ABORTING: it got SIGABRT, for it hangs. STOPPING: it got SIGTERM, for the parent was told to end.
    CLEARING: what is left of it got SIGTERM. KILLING: and then SIGKILL.
    """

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    ABORTING = "aborting"
    STOPPING = "stopping"
    CLEARING = "clearing"
    KILLING = "killing"
    ENDED = "ended"


class Event(enum.StrEnum):
    """What can happen. ALONE: no process of the daemon is left. STOP: the parent was told to end, or has no reason to go on."""

    DUE = "due"
    SAID_READY = "said-ready"
    SAID_STOPPING = "said-stopping"
    SAID_TRIGGER = "said-trigger"
    DIED = "died"
    ALONE = "alone"
    STOP = "stop"


class IllegalEvent(Exception):
    """An event that can't happen in this phase."""


_P = Phase
_E = Event

TABLE: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (_P.WAITING, _E.DUE): _P.STARTING,
    (_P.WAITING, _E.STOP): _P.ENDED,
    (_P.STARTING, _E.SAID_READY): _P.READY,
    (_P.STARTING, _E.SAID_STOPPING): _P.LEAVING,
    (_P.STARTING, _E.SAID_TRIGGER): _P.ABORTING,
    (_P.STARTING, _E.DUE): _P.CLEARING,
    (_P.STARTING, _E.DIED): _P.CLEARING,
    (_P.STARTING, _E.STOP): _P.STOPPING,
    (_P.READY, _E.SAID_STOPPING): _P.LEAVING,
    (_P.READY, _E.SAID_TRIGGER): _P.ABORTING,
    (_P.READY, _E.DUE): _P.ABORTING,
    (_P.READY, _E.DIED): _P.CLEARING,
    (_P.READY, _E.STOP): _P.STOPPING,
    (_P.LEAVING, _E.SAID_TRIGGER): _P.ABORTING,
    (_P.LEAVING, _E.DUE): _P.CLEARING,
    (_P.LEAVING, _E.DIED): _P.CLEARING,
    (_P.LEAVING, _E.STOP): _P.STOPPING,
    (_P.ABORTING, _E.DUE): _P.KILLING,
    (_P.ABORTING, _E.DIED): _P.CLEARING,
    (_P.ABORTING, _E.STOP): _P.CLEARING,
    (_P.STOPPING, _E.DUE): _P.KILLING,
    (_P.STOPPING, _E.DIED): _P.CLEARING,
    (_P.CLEARING, _E.DUE): _P.KILLING,
    (_P.CLEARING, _E.ALONE): _P.WAITING,
    (_P.KILLING, _E.DUE): _P.KILLING,
    (_P.KILLING, _E.ALONE): _P.WAITING,
}


def can(phase: Phase, event: Event) -> bool:
    """Whether `event` means anything in `phase`."""
    return (phase, event) in TABLE


def step(phase: Phase, event: Event) -> Phase:
    """The phase after `event`.

    Raises:
        IllegalEvent: it can't happen in `phase`.
    """
    try:
        return TABLE[phase, event]
    except KeyError:
        raise IllegalEvent(f"{event} can't happen to a supervisor that is {phase}") from None
