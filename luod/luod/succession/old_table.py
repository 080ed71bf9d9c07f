"""The old daemon's side of a handover, as a table.

Theory. Until it has read `serving` the old daemon is the only authority; from then on it must never serve again. Between the freeze and
that moment it waits, within a bound. Whatever ends the wait otherwise, it closes its ear (shutdown(SHUT_RD)), so that a `serving` that
isn't in the queue yet can't be sent any more, and then reads the queue to its end. Found: replaced. Not found: it thaws.

Happy path: serving, meeting, copying, freezing, frozen, replaced, released.

Unhappy paths:
1. The successor declines, dies or is late before the freeze: back to serving, as if nothing had happened.
2. A request that was read before the freeze isn't answered in time: thaw.
3. Frozen, and the successor declines, dies or says nothing: drain, then thaw, or find that it had committed.
4. Replaced, and the service manager doesn't confirm the successor as the service's main process: it stays, and does nothing, for the
   manager would end the successor with it.

Invariants: `replaced` is entered by reading `serving` and in no other way, and leads to `released` only. The process ends in `released`.
From `frozen` the only way back to serving leads through `draining`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from luod_protocol.errors import LuodError


class OldState(enum.StrEnum):
    """Where the old daemon is."""

    SERVING = "serving"
    MEETING = "meeting"
    COPYING = "copying"
    FREEZING = "freezing"
    FROZEN = "frozen"
    DRAINING = "draining"
    REPLACED = "replaced"
    RELEASED = "released"


class OldEvent(enum.StrEnum):
    """What can happen to it. LOST: the successor's end is closed and all that it sent is read. CONFIRMED: the service manager knows the
    successor as the main process, or there is no manager."""

    SUCCESSOR_STARTED = "successor-started"
    ACCEPTED = "accepted"
    VERIFIED = "verified"
    ALL_PARKED = "all-parked"
    SERVING_READ = "serving-read"
    DECLINED = "declined"
    LOST = "lost"
    LATE = "late"
    QUEUE_EMPTY = "queue-empty"
    CONFIRMED = "confirmed"


class IllegalOldEvent(LuodError):
    """An event that can't happen in this state."""


_S = OldState
_E = OldEvent

TABLE: Final[Mapping[tuple[OldState, OldEvent], OldState]] = {
    (_S.SERVING, _E.SUCCESSOR_STARTED): _S.MEETING,
    (_S.MEETING, _E.ACCEPTED): _S.COPYING,
    (_S.MEETING, _E.DECLINED): _S.SERVING,
    (_S.MEETING, _E.LOST): _S.SERVING,
    (_S.MEETING, _E.LATE): _S.SERVING,
    (_S.COPYING, _E.VERIFIED): _S.FREEZING,
    (_S.COPYING, _E.DECLINED): _S.SERVING,
    (_S.COPYING, _E.LOST): _S.SERVING,
    (_S.COPYING, _E.LATE): _S.SERVING,
    (_S.FREEZING, _E.ALL_PARKED): _S.FROZEN,
    (_S.FREEZING, _E.DECLINED): _S.SERVING,
    (_S.FREEZING, _E.LOST): _S.SERVING,
    (_S.FREEZING, _E.LATE): _S.SERVING,
    (_S.FROZEN, _E.SERVING_READ): _S.REPLACED,
    (_S.FROZEN, _E.DECLINED): _S.DRAINING,
    (_S.FROZEN, _E.LOST): _S.DRAINING,
    (_S.FROZEN, _E.LATE): _S.DRAINING,
    (_S.DRAINING, _E.SERVING_READ): _S.REPLACED,
    (_S.DRAINING, _E.QUEUE_EMPTY): _S.SERVING,
    (_S.REPLACED, _E.CONFIRMED): _S.RELEASED,
}


def step(state: OldState, event: OldEvent) -> OldState:
    """The state after `event`.

    Raises:
        IllegalOldEvent: it can't happen in `state`.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalOldEvent(f"{event} can't happen to an old daemon that is {state}") from None
