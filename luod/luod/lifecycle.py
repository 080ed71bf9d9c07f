"""The life of a session, as a table.

Theory. A session is `open` while its `serialize` connection lives, `preserved` once finalized, `claimed` while a `deserialize` connection
has the exclusive right to it, and `gone` at the end. What may happen in which state, and what follows, is `TABLE` and nothing else.

Happy path: open, preserve..., finalize, claim, retrieve..., finish.

Unhappy paths:
1. The serialize connection ends before finalize, or cancels: `gone`, every fd is released.
2. The claimer ends or releases before finish: `preserved` again, nothing is lost.
3. An event that isn't in the table: `IllegalEvent`, and nothing changed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from luod_protocol.errors import LuodError


class SessionState(enum.StrEnum):
    """Where a session is in its life."""

    OPEN = "open"
    PRESERVED = "preserved"
    CLAIMED = "claimed"
    GONE = "gone"


class SessionEvent(enum.StrEnum):
    """What happens to a session."""

    PRESERVE = "preserve"
    UNPRESERVE = "unpreserve"
    FINALIZE = "finalize"
    CANCEL = "cancel"
    SERIALIZER_LOST = "serializer-lost"
    CLAIM = "claim"
    RETRIEVE = "retrieve"
    RELEASE = "release"
    CLAIMER_LOST = "claimer-lost"
    FINISH = "finish"
    DISCARD = "discard"


class IllegalEvent(LuodError):
    """An event that can't happen in this state."""


_S = SessionState
_E = SessionEvent

TABLE: Final[Mapping[tuple[SessionState, SessionEvent], SessionState]] = {
    (_S.OPEN, _E.PRESERVE): _S.OPEN,
    (_S.OPEN, _E.UNPRESERVE): _S.OPEN,
    (_S.OPEN, _E.FINALIZE): _S.PRESERVED,
    (_S.OPEN, _E.CANCEL): _S.GONE,
    (_S.OPEN, _E.SERIALIZER_LOST): _S.GONE,
    (_S.PRESERVED, _E.CLAIM): _S.CLAIMED,
    (_S.PRESERVED, _E.DISCARD): _S.GONE,
    (_S.CLAIMED, _E.RETRIEVE): _S.CLAIMED,
    (_S.CLAIMED, _E.RELEASE): _S.PRESERVED,
    (_S.CLAIMED, _E.CLAIMER_LOST): _S.PRESERVED,
    (_S.CLAIMED, _E.FINISH): _S.GONE,
}


def step(state: SessionState, event: SessionEvent) -> SessionState:
    """The state after `event`.

    Raises:
        IllegalEvent: it can't happen in `state`.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalEvent(f"{event} can't happen to a session that is {state}") from None
