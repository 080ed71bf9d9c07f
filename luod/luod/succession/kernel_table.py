"""A kernel's replacement as luod sees it, as a table.

Theory. Everything that takes long is done while clients are served: sessions are preserved in the kernel one after the other (`preparing`)
until each finalized session that travels is (`prepared`). `frozen` is for the moment before the reboot: nothing changes the set any
more. The next kernel's luod begins as `updated`, and is so until the last session that came is finished.

Happy path: normal, preparing, prepared, frozen, updated, normal.

Unhappy paths:
1. A session can't be preserved, or somebody cancels: `undoing`, which unpreserves everything, then `normal`; clients notice nothing.
2. A prepared set changes (a session is finalized, or one that lent a memfd to another ends): `preparing` again.
3. The reboot fails, or whoever froze luod is gone: `undoing`, as in 1.

Invariants: in `normal` and in `undoing`'s end the kernel holds nothing of this luod for the next kernel. `frozen` is entered from
`prepared` only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from luod_protocol.errors import LuodError


class UpdateState(enum.StrEnum):
    """Where the update is."""

    NORMAL = "normal"
    PREPARING = "preparing"
    PREPARED = "prepared"
    FROZEN = "frozen"
    UNDOING = "undoing"
    UPDATED = "updated"


class UpdateEvent(enum.StrEnum):
    """What can happen to it. LET_GO: the last session that the last kernel brought has ended."""

    PREPARE = "prepare"
    ALL_PRESERVED = "all-preserved"
    SET_CHANGED = "set-changed"
    FREEZE = "freeze"
    FAILED = "failed"
    CANCEL = "cancel"
    THAW = "thaw"
    UNDONE = "undone"
    KEXEC = "kexec"
    LET_GO = "let-go"


class IllegalUpdateEvent(LuodError):
    """An event that can't happen in this state."""


_S = UpdateState
_E = UpdateEvent

TABLE: Final[Mapping[tuple[UpdateState, UpdateEvent], UpdateState]] = {
    (_S.NORMAL, _E.PREPARE): _S.PREPARING,
    (_S.PREPARING, _E.ALL_PRESERVED): _S.PREPARED,
    (_S.PREPARING, _E.FAILED): _S.UNDOING,
    (_S.PREPARING, _E.CANCEL): _S.UNDOING,
    (_S.PREPARED, _E.SET_CHANGED): _S.PREPARING,
    (_S.PREPARED, _E.FREEZE): _S.FROZEN,
    (_S.PREPARED, _E.CANCEL): _S.UNDOING,
    (_S.FROZEN, _E.THAW): _S.UNDOING,
    (_S.FROZEN, _E.CANCEL): _S.UNDOING,
    (_S.UNDOING, _E.UNDONE): _S.NORMAL,
    (_S.FROZEN, _E.KEXEC): _S.UPDATED,
    (_S.UPDATED, _E.LET_GO): _S.NORMAL,
    (_S.UPDATED, _E.PREPARE): _S.PREPARING,
}


def step(state: UpdateState, event: UpdateEvent) -> UpdateState:
    """The state after `event`.

    Raises:
        IllegalUpdateEvent: it can't happen in `state`.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalUpdateEvent(f"{event} can't happen to an update that is {state}") from None
