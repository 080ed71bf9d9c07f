"""The verbs, with real descriptors, in whatever order clients of several users ask, and whatever becomes of what a verb waits for.

Theory. A machine (`clients`) plays the clients, the ends of connections, the service manager and the thread that adds seals, over the
real custody. Beside it `lives` says what must exist. Each request must be granted exactly when the model says so, and refused with the
model's code. After each step:

1. Every session that the model has is there, as it says, and no other: what was finalized and answered is there with its very objects until
   its finish or discard is answered, and what has ended is not there.
2. No owner has two sessions of one name, and each is found by its name and by its id.
3. The books say what the sessions cost, for each uid and for all.
4. luod has exactly the descriptors that the model counts: none is leaked, and none is closed that is somebody else's.
5. A pipe whose end is preserved nowhere any more, and which no client has, has hung up; no other has.

The mutations at the end prove that the machine can fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from luod.closing import NOTHING, Closing
from luod.custody import Custody, Pending
from luod.policy import Policy
from luod.quota import Quota
from luod.session import Session
from luod.store import Store
from luod_protocol.errors import Code
from model.clients import Machine
from model.lives import Wait

FIXED: Final = settings(max_examples=120, stateful_step_count=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate])

MUST_BE_SEEN: Final = frozenset(
    {
        *((wait.name, end) for wait in Wait if wait is not Wait.NOTHING for end in ("granted", "undone")),
        *(("open", code) for code in (Code.NOT_PERMITTED, Code.LIMIT_REACHED, Code.SESSION_EXISTS, Code.SESSION_FINISHED)),
        *(("preserve", code) for code in (Code.ENTRY_EXISTS, Code.LIMIT_REACHED)),
        *(("finalize", code) for code in (Code.BAD_NEEDS, Code.BAD_SEAL, Code.CANNOT_SURVIVE, Code.LIMIT_REACHED, Code.OUT_OF_ORDER)),
        *(("claim", code) for code in (Code.NO_SUCH_SESSION, Code.SESSION_CLAIMED, Code.SESSION_FINISHED, Code.STILL_HELD)),
        *(("discard", code) for code in (Code.NO_SUCH_SESSION, Code.NOT_PERMITTED, Code.SESSION_CLAIMED, Code.OUT_OF_ORDER)),
        *(("finish", code) for code in (Code.BAD_REQUEST, Code.NO_SUCH_SESSION, Code.OUT_OF_ORDER)),
        *((verb, "granted") for verb in ("open", "preserve", "unpreserve", "finalize", "cancel", "claim", "retrieve", "release", "finish")),
    }
)
"""Else the machine doesn't come far."""


def run(machine: type[Machine], fixed: settings) -> None:
    run_state_machine_as_test(machine, settings=fixed)  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_comes_back() -> None:
    Machine.seen.clear()
    run(Machine, FIXED)
    assert Machine.seen >= MUST_BE_SEEN, MUST_BE_SEEN - Machine.seen


# ------------------------------------------------------------------------------------------------------------ mutations


def nothing(*_: object, **__: object) -> None:
    """In place of something that is done."""


def not_rolled_back(patch: pytest.MonkeyPatch) -> None:
    """An open session stays when its connection ends."""

    def lost(*_: object) -> Closing:
        return NOTHING

    patch.setattr(Custody, "lost", lost)


def not_remembered(patch: pytest.MonkeyPatch) -> None:
    """What ended is forgotten."""
    patch.setattr(Store, "remember", nothing)


def not_uncharged(patch: pytest.MonkeyPatch) -> None:
    """A session that ended still costs something."""
    patch.setattr(Quota, "release", nothing)


def taken_twice(patch: pytest.MonkeyPatch) -> None:
    """What somebody has claimed, or discards, others may have as well."""
    patch.setattr(Custody, "refuse_unless_free", nothing)


def no_limits(patch: pytest.MonkeyPatch) -> None:
    """A uid may have more than its share."""
    patch.setattr(Quota, "refuse_beyond", nothing)


def everybody_sees_all(patch: pytest.MonkeyPatch) -> None:
    """Also what is others'."""

    def may_see(*_: object) -> bool:
        return True

    patch.setattr(Policy, "may_see", may_see)


def names_stay(patch: pytest.MonkeyPatch) -> None:
    """A name isn't free again."""

    def remove(self: Store, session: Session) -> None:
        del self._by_id[session.session_id]  # pyright: ignore[reportPrivateUsage]

    patch.setattr(Store, "remove", remove)


def not_as_it_was(patch: pytest.MonkeyPatch) -> None:
    """What was refused in the end leaves something behind."""

    def careless(*, waits_for: Any, act: Any, undo: object) -> Pending:
        return Pending(waits_for=waits_for, act=act, undo=nothing)

    patch.setattr("luod.deserializing.Pending", careless)


@pytest.mark.parametrize(
    "mutate", [not_rolled_back, not_remembered, not_uncharged, taken_twice, no_limits, everybody_sees_all, names_stay, not_as_it_was]
)
def test_a_mutation_is_found(mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever it breaks first
            run(Machine, FIXED)
