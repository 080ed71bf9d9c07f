"""What the model does at the places where a mistake could hide, and what is looked at. A mutation is the same with one of these changed."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TypeVar

import attrs

from luod.succession import new_table, old_table
from luod.succession.new_table import NewEvent, NewState
from luod.succession.old_table import OldEvent, OldState
from luod_protocol.errors import LuodError
from model.world import Stage

_State = TypeVar("_State")
_Event = TypeVar("_Event")


class Verb(enum.Flag):
    """What clients ask for."""

    FINALIZE = enum.auto()
    FINISH = enum.auto()
    RETRIEVE = enum.auto()


ALL = Verb.FINALIZE | Verb.FINISH | Verb.RETRIEVE


@attrs.frozen(kw_only=True)
class Scenario:
    """What is explored.

    Attributes:
        stages: of the sessions, at the beginning.
        verbs: what clients ask for.
        managed: whether there is a service manager.
        attempts: how many upgrades are begun.
        room: messages that a socket holds.
        crashes: whether processes are killed.
        late: whether waiting for the other side, or for the manager, may take too long, and the manager's store may be full.
        stops: whether the daemon is told to stop during an upgrade.
    """

    stages: tuple[Stage, ...]
    verbs: Verb
    managed: bool = False
    attempts: int = 1
    room: int = 2
    crashes: bool = True
    late: bool = True
    stops: bool = False


@attrs.frozen(kw_only=True)
class Rules:
    """What the code does. Every field is one line of it, which a mutation takes away."""

    old_step: Callable[[OldState, OldEvent], OldState] = old_table.step
    new_step: Callable[[NewState, NewEvent], NewState] = new_table.step
    log_before_reply: bool = True
    """old.py tell"""
    let_go_before_reply: bool = True
    """old.py _tell: a Departure waits for `let-go`."""
    departures_wait_for_the_end: bool = True
    """old.py tell: a Departure waits until a successor that failed is gone."""
    close_before_reply: bool = True
    """server.py settle"""
    alone_before_reply: bool = True
    """server.py settle"""
    store_before_reply: bool = True
    """server.py perform, keeping.py keep: the barrier."""
    remove_before_reply: bool = True
    """keeping.py forget: the barrier."""
    ledger_before_removal: bool = True
    """keeping.py forget: `Ending` is written first."""
    staying: bool = True
    """keeping.py _stay: the ledger takes an `Ending` back."""
    removal_is_heard: bool = True
    """fdstore.py remove: makes sure that the manager listens to this process."""
    again_waits: bool = True
    """server.py settle: an answer that is asked for again isn't given before the first."""
    retrieval_waits_until_kept: bool = True
    """keeping.py note_retrieval: who retrieved is told when it can be written down."""
    upgrade_waits_until_alone: bool = True
    """old.py _settle: no handover while the predecessor lives, or before the manager knows this process."""
    deafen_before_thaw: bool = True
    """old.py _commit"""
    drain_before_thaw: bool = True
    """old.py _commit: the queue is read to its end."""
    kill_the_untold: bool = True
    """old.py run: a successor that can't be sent a last word is killed before this daemon serves again."""
    see_off: bool = True
    """old.py _see_off"""
    freeze_waits: bool = True
    """old.py _freeze: gate.still"""
    confirmed_before_exit: bool = True
    """old.py _release: MAINPID= and BARRIER=1"""
    read_to_the_end: bool = True
    """new.py _next: what a dead predecessor had sent is read first."""


def with_cell(
    step: Callable[[_State, _Event], _State], state: _State, event: _Event, following: _State | None
) -> Callable[[_State, _Event], _State]:
    """A table with one cell changed, or (None) taken out."""

    def mutated(now: _State, happened: _Event) -> _State:
        if (now, happened) != (state, event):
            return step(now, happened)
        if following is None:
            raise LuodError(f"{event} can't happen in {state}")
        return following

    return mutated


def without(*fields: str) -> Rules:
    """The rules without some."""
    off: Mapping[str, bool] = dict.fromkeys(fields, False)
    return attrs.evolve(Rules(), **off)  # type: ignore[arg-type]
