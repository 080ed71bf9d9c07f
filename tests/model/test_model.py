"""Nothing is lost and nothing served twice, whatever order things happen in: both tables of the handover, explored together.

Theory. The model (`world`, `moves` and the modules that `model` puts together) is two daemons, the socket between them, clients that
finalize, retrieve and finish, and perhaps a service manager. It drives the real tables, `old_table.step` and `new_table.step`, and follows
`old.py`, `new.py`, `server.py`, `keeping.py` and `fdstore.py` method by method. The search sees every interleaving of their steps with
every crash, hang and time-out, within the bounds of a scenario: sessions, upgrades begun, messages that a socket holds.

What must hold in each world (`search.broken`):

1. At most one daemon serves. A successor serves after a commit that was sent, or, without a manager, after its predecessor's death; one
   that was replaced never again.
2. A session for which `finalized` was answered has an owner. *Owned* is one of which the daemon that serves has the box; or, when that is
   dead, the successor that is to serve has it, or has it in the queue that it still reads. One that was said to survive a crash
   is in the manager's store as well, or will be when the manager has taken what the main process sent, and no ledger says that it ended.
   Only a crash can take an owner away, and only of what no other was sent: without a manager, what the copy had not come to.
3. One for which `finished` was answered has none: no process that lives has the box or has it unread in its socket, nor has the manager.
4. Whoever was answered a retrieval is known as a holder to the one that serves next.
5. A process that ends of itself isn't the main process of its service.

And from each world the rest is reached: one daemon that serves, nobody else, nothing under way. A hang is a process that takes no step; so
that is asked again with the steps of the successor left out, and with those of the one that was replaced.

What is not in it: versions and bad boxes (a successor declines for any reason at any time instead), claims, which end with their
connection, and a process that is killed and takes longer than DEATH_S to be gone.

The mutations at the end prove that the search can fail: for each line of the code that keeps a promise, without it a promise is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import pytest

from luod.succession import new_table, old_table
from luod.succession.new_table import NewEvent, NewState
from luod.succession.old_table import OldEvent, OldState
from model.moves import Kind
from model.rules import ALL, Rules, Scenario, Verb, with_cell, without
from model.search import Counterexample, Explored, at_rest, explore
from model.world import At, Stage, World, serves

KEPT, OPEN = Stage.KEPT, Stage.OPEN

ALONE: Final = Scenario(stages=(OPEN,), verbs=ALL, attempts=2)
MANAGED: Final = Scenario(stages=(OPEN,), verbs=ALL, attempts=2, managed=True)
TWO: Final = Scenario(stages=(KEPT, OPEN), verbs=Verb.FINALIZE | Verb.FINISH)
NARROW: Final = attrs.evolve(TWO, room=1)
STOPPED: Final = Scenario(stages=(KEPT,), verbs=ALL, stops=True)
TWO_MANAGED: Final = attrs.evolve(TWO, managed=True)
BRIEF: Final = attrs.evolve(ALONE, attempts=1)
BRIEF_MANAGED: Final = attrs.evolve(MANAGED, attempts=1)

SCENARIOS: Final[Mapping[str, tuple[Scenario, int]]] = {
    "one session": (BRIEF, 4_000),
    "finalize, a manager": (attrs.evolve(BRIEF_MANAGED, verbs=Verb.FINALIZE), 2_000),
    "finish, a manager": (attrs.evolve(BRIEF_MANAGED, stages=(KEPT,), verbs=Verb.FINISH), 3_500),
    "told to stop": (STOPPED, 8_000),
}
"""Each with how many worlds there are at least."""

SLOW: Final[Mapping[str, tuple[Scenario, int]]] = {
    "one session, a manager": (BRIEF_MANAGED, 13_000),
    "two upgrades": (ALONE, 18_000),
    "two upgrades, a manager": (MANAGED, 40_000),
    "two sessions": (TWO, 25_000),
    "two sessions, a socket for one message": (NARROW, 20_000),
    "two sessions in the copy": (attrs.evolve(TWO, stages=(KEPT, KEPT)), 16_000),
    "two sessions, a manager, nobody killed": (attrs.evolve(TWO_MANAGED, crashes=False), 32_000),
    "two finalized, a manager": (attrs.evolve(TWO_MANAGED, stages=(OPEN, OPEN), verbs=Verb.FINALIZE), 26_000),
    "two finished, a manager": (attrs.evolve(TWO_MANAGED, stages=(KEPT, KEPT)), 80_000),
}


def by_itself(kind: Kind, _: str) -> bool:
    """Nobody does anything to the daemons."""
    return kind in (Kind.STEP, Kind.LATE)


def without_the_successor(kind: Kind, actor: str) -> bool:
    """The successor hangs until it is killed."""
    return by_itself(kind, actor) and actor != "successor"


def without_the_replaced(kind: Kind, actor: str) -> bool:
    """One that was replaced hangs until it is killed."""
    return by_itself(kind, actor) and not actor.startswith("replaced")


def nobody_waits_for_the_successor(world: World) -> bool:
    """None is there, or nobody else: that is hoped for."""
    return world.new is None or not world.new.up or not world.old.up


def shown(explored: Explored, numbers: list[int]) -> str:
    """The first of these worlds, for an assertion's message."""
    return explored.told(numbers[0]) if numbers else ""


def check(scenario: Scenario, at_least: int) -> None:
    explored = explore(Rules(), scenario)
    print(f"{len(explored.worlds)} worlds, {sum(map(len, explored.edges))} moves")
    found = len(explored.worlds)
    assert found >= at_least
    never = explored.unable(at_rest, by_itself)
    assert not never, f"nothing comes to rest from here: {shown(explored, never)}"
    stuck = explored.unable(nobody_waits_for_the_successor, without_the_successor)
    assert not stuck, f"a successor that hangs keeps the daemon from serving: {shown(explored, stuck)}"
    bound = [each for each in explored.unable(lambda world: not world.ghosts, without_the_replaced) if explored.worlds[each].old.up]
    assert not bound, f"a predecessor that hangs is never gone: {shown(explored, bound)}"


@pytest.mark.parametrize(("scenario", "at_least"), SCENARIOS.values(), ids=SCENARIOS)
def test_nothing_is_lost(scenario: Scenario, at_least: int) -> None:
    check(scenario, at_least)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "at_least"), SLOW.values(), ids=SLOW)
def test_nothing_is_lost_with_more(scenario: Scenario, at_least: int) -> None:
    check(scenario, at_least)


@pytest.mark.parametrize("managed", [False, True])
def test_nothing_waits_for_a_time_out_where_nobody_fails(managed: bool) -> None:
    """Without crashes and time-outs every upgrade comes through, and every request is answered."""
    scenario = attrs.evolve(BRIEF, crashes=False, late=False, managed=managed)
    explored = explore(Rules(), scenario)
    never = explored.unable(at_rest, by_itself)
    assert not never, f"nothing comes to rest from here: {shown(explored, never)}"
    assert not [world for world in explored.worlds if world.old.at is At.SEE_OFF or not world.old.up]
    ends = [world for world in explored.worlds if at_rest(world) and not world.attempts]
    assert all(serves(world.old) for world in ends)
    assert {stage for world in ends for stage in world.stages} == {Stage.OPEN, Stage.KEPT, Stage.DONE}


def test_every_cell_of_the_tables_is_used_but_those_that_no_code_needs() -> None:
    """So a cell that is added, or one that the code comes to use, is explored or noticed."""
    used: set[tuple[Any, Any]] = set()

    def noting(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def noted(state: Any, event: Any) -> Any:
            following = step(state, event)
            used.add((state, event))
            return following

        return noted

    rules = Rules(old_step=noting(old_table.step), new_step=noting(new_table.step))
    for scenario in (STOPPED, BRIEF_MANAGED):
        explore(rules, attrs.evolve(scenario, stages=(KEPT,), verbs=Verb.FINISH))
    assert {*old_table.TABLE, *new_table.TABLE} - used == {
        # old.py _freeze hears of nothing but its bound; what came meanwhile it takes when it is frozen.
        (OldState.FREEZING, OldEvent.LOST),
        # old.py run: a successor is told, or killed.
        (NewState.COPYING, NewEvent.LOST_ALIVE),
        (NewState.READY, NewEvent.LOST_ALIVE),
        (NewState.HOLDING, NewEvent.LOST_ALIVE),
    }


# ------------------------------------------------------------------------------------------------------------ mutations


def old_cell(state: OldState, event: OldEvent, following: OldState | None) -> Rules:
    return Rules(old_step=with_cell(old_table.step, state, event, following))


def new_cell(state: NewState, event: NewEvent, following: NewState | None) -> Rules:
    return Rules(new_step=with_cell(new_table.step, state, event, following))


MUTATIONS: Final[Mapping[str, tuple[Rules, Scenario, str]]] = {
    # The tables.
    "it thaws at once when the commit is late": (old_cell(OldState.FROZEN, OldEvent.LATE, OldState.SERVING), BRIEF, "two daemons serve"),
    "it thaws at once when it is told to stop": (
        old_cell(OldState.FROZEN, OldEvent.DECLINED, OldState.SERVING),
        STOPPED,
        "two daemons serve",
    ),
    "it serves though it read serving": (old_cell(OldState.DRAINING, OldEvent.SERVING_READ, OldState.SERVING), BRIEF, "two daemons serve"),
    "it is never confirmed": (old_cell(OldState.REPLACED, OldEvent.CONFIRMED, None), BRIEF, "confirmed can't happen"),
    "a successor that is refused serves": (new_cell(NewState.READY, NewEvent.REFUSED, NewState.SERVING), BRIEF, "two daemons serve"),
    "a successor promotes itself while the old one lives": (
        attrs.evolve(new_cell(NewState.COPYING, NewEvent.LOST_ALIVE, NewState.SERVING), kill_the_untold=False),
        attrs.evolve(NARROW, stages=(OPEN, OPEN), crashes=False),
        "two daemons serve",
    ),
    "a successor leaves when the old one died": (new_cell(NewState.READY, NewEvent.OLD_DIED, NewState.LEFT), BRIEF, "nobody has it"),
    "a successor leaves though it holds everything": (
        new_cell(NewState.HOLDING, NewEvent.OLD_DIED, NewState.LEFT),
        BRIEF,
        "nobody has it",
    ),
    "a successor promotes itself before the manager": (
        new_cell(NewState.HOLDING, NewEvent.OLD_DIED_MANAGED, NewState.SERVING),
        BRIEF_MANAGED,
        "promoted itself",
    ),
    # The log.
    "finalized before the log": (without("log_before_reply"), BRIEF, "nobody has it"),
    "finished before let-go": (without("let_go_before_reply"), BRIEF, "a successor has it"),
    "finished while a successor that failed lives": (without("departures_wait_for_the_end"), BRIEF, "a successor has it"),
    "finished before the close": (without("close_before_reply"), BRIEF, "the daemon has it"),
    "finished while the predecessor lives": (without("alone_before_reply"), BRIEF, "replaced has it"),
    "an answer is given again before it is given": (without("again_waits"), BRIEF, ""),
    "what was queued is not read": (without("read_to_the_end"), BRIEF, "nobody has it"),
    # The commit, and the way back from it.
    "the freeze does not wait for requests": (without("freeze_waits"), BRIEF, "sessions came"),
    "it is not deaf when it thaws": (without("deafen_before_thaw"), BRIEF, "two daemons serve"),
    "it does not read its queue to the end": (without("drain_before_thaw"), BRIEF, "two daemons serve"),
    "a successor that can't be told lives on": (without("kill_the_untold"), NARROW, "nobody has it"),
    "a successor is not seen off": (without("see_off"), BRIEF, "a successor has it"),
    "an upgrade begins while the predecessor lives": (
        without("upgrade_waits_until_alone"),
        attrs.evolve(ALONE, stages=(KEPT,), verbs=Verb.FINISH),
        "replaced has it",
    ),
    # The service manager.
    "finalized before it is stored": (without("store_before_reply"), TWO_MANAGED, "the service manager does not have it"),
    "finished before it is removed": (without("remove_before_reply"), BRIEF_MANAGED, "the service manager has it"),
    "a removal is not made sure of": (
        without("removal_is_heard"),
        attrs.evolve(BRIEF_MANAGED, stages=(KEPT,), verbs=Verb.FINISH),
        "the service manager has it",
    ),
    "an ending is not written first": (without("ledger_before_removal"), BRIEF_MANAGED, "told that there was no such session"),
    "an ending is not taken back": (without("staying"), BRIEF_MANAGED, "the service manager does not have it"),
    "a retrieval is not written down": (
        without("retrieval_waits_until_kept"),
        attrs.evolve(BRIEF_MANAGED, stages=(KEPT,), verbs=Verb.RETRIEVE),
        "does not know it",
    ),
    "it ends before its successor is confirmed": (without("confirmed_before_exit"), BRIEF_MANAGED, "as the main process"),
}


@pytest.mark.parametrize(("rules", "scenario", "reason"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutation_is_found(rules: Rules, scenario: Scenario, reason: str) -> None:
    with pytest.raises(Counterexample) as caught:
        explore(rules, scenario)
    assert reason in str(caught.value).splitlines()[0]


def test_every_rule_is_taken_away_once() -> None:
    taken = {field.name for rules, _, _ in MUTATIONS.values() for field in attrs.fields(Rules) if getattr(rules, field.name) is False}
    assert taken == {field.name for field in attrs.fields(Rules) if field.default is True}


def test_a_counterexample_can_be_read() -> None:
    with pytest.raises(Counterexample) as caught:
        explore(without("let_go_before_reply"), attrs.evolve(BRIEF, stages=(KEPT,), verbs=Verb.FINISH))
    text = str(caught.value)
    assert text.startswith("a was finished, and a successor has it, after 9 steps\n    at first\n        sessions  a finalized\n")
    assert "\n   1. operator: upgrades (operator)\n" in text
    assert text.splitlines()[-3:] == [
        "        sessions  a finished",
        "        daemon    copying _copy, has -, to send: gone(a)",
        "        successor starting run, has -, unread: offer box(a)",
    ]
