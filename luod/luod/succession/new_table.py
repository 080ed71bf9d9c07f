"""The successor's side of a handover, as a table.

Theory. The successor owns nothing until it commits by one send, or until its predecessor is dead. What it was sent is a copy: leaving is
always safe while the old daemon lives.

Happy path: starting, copying, ready, holding, serving.

Unhappy paths:
1. It can't or won't (a version, a box that isn't what its manifest says): it declines and leaves.
2. The old daemon declines, or lets the connection end while it lives, or dies before it offered anything: it leaves.
3. The old daemon dies before `frozen`: everything finalized that was sent is the successor's, boxes and log; the clients' connections died.
   It serves.
4. The old daemon dies after `frozen`: the connections too are the successor's. It serves.
5. The old daemon dies, and a service manager watches: it leaves. The manager ends the whole service with its main process and starts it
   again from its store, which is the truth.
6. The commit can't be sent (EPIPE) and the old daemon lives, having thawed: it leaves without having served.

Invariant: `serving` is entered by a commit that was sent, or, without a service manager, by the old daemon's death; `left` and `serving`
have no way out.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from luod_protocol.errors import LuodError


class NewState(enum.StrEnum):
    """Where the successor is. READY: all that was preserved is here; HOLDING: and all that is live."""

    STARTING = "starting"
    COPYING = "copying"
    READY = "ready"
    HOLDING = "holding"
    SERVING = "serving"
    LEFT = "left"


class NewEvent(enum.StrEnum):
    """What can happen to it."""

    OFFERED = "offered"
    COPIED = "copied"
    FROZEN = "frozen"
    COMMITTED = "committed"
    REFUSED = "refused"
    LOST_ALIVE = "lost-alive"
    OLD_DIED = "old-died"
    OLD_DIED_MANAGED = "old-died-managed"


class IllegalNewEvent(LuodError):
    """An event that can't happen in this state."""


_S = NewState
_E = NewEvent

TABLE: Final[Mapping[tuple[NewState, NewEvent], NewState]] = {
    (_S.STARTING, _E.OFFERED): _S.COPYING,
    (_S.STARTING, _E.REFUSED): _S.LEFT,
    (_S.STARTING, _E.LOST_ALIVE): _S.LEFT,
    (_S.COPYING, _E.COPIED): _S.READY,
    (_S.COPYING, _E.REFUSED): _S.LEFT,
    (_S.COPYING, _E.LOST_ALIVE): _S.LEFT,
    (_S.COPYING, _E.OLD_DIED): _S.SERVING,
    (_S.COPYING, _E.OLD_DIED_MANAGED): _S.LEFT,
    (_S.READY, _E.FROZEN): _S.HOLDING,
    (_S.READY, _E.REFUSED): _S.LEFT,
    (_S.READY, _E.LOST_ALIVE): _S.LEFT,
    (_S.READY, _E.OLD_DIED): _S.SERVING,
    (_S.READY, _E.OLD_DIED_MANAGED): _S.LEFT,
    (_S.HOLDING, _E.COMMITTED): _S.SERVING,
    (_S.HOLDING, _E.REFUSED): _S.LEFT,
    (_S.HOLDING, _E.LOST_ALIVE): _S.LEFT,
    (_S.HOLDING, _E.OLD_DIED): _S.SERVING,
    (_S.HOLDING, _E.OLD_DIED_MANAGED): _S.LEFT,
}


def step(state: NewState, event: NewEvent) -> NewState:
    """The state after `event`.

    Raises:
        IllegalNewEvent: it can't happen in `state`.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalNewEvent(f"{event} can't happen to a successor that is {state}") from None
