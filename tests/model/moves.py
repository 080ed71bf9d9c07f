"""What can happen next in a world. Each step names the method of luod whose code it follows.

What is one step here: what one process does up to and with the next thing that another process, or a crash, can tell from it. Between two
checkpoints of trio a daemon's tasks don't mix; two sends are two steps all the same, for it can be killed in between.

A process that hangs (SIGSTOP) has no step of its own: it is one that isn't scheduled, and no move here must be taken. What others do about
it are their time-outs. So every hang is in every interleaving; `test_model` looks in addition at what the others reach without it.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from luod.succession.new_table import NewState
from luod.succession.old_table import OldEvent, OldState
from model.rules import Rules, Scenario
from model.world import DEAD, GONE, Manager, New, Old, Stage, Told, World


class Kind(enum.Enum):
    """Why something happens."""

    STEP = "step"
    LATE = "time-out"
    CLIENT = "client"
    OPERATOR = "operator"
    CRASH = "crash"


class Move(NamedTuple):
    """One thing that can happen. `broken`: why it must not."""

    kind: Kind
    actor: str
    text: str
    world: World
    broken: str = ""


FAILURES = (OldEvent.DECLINED, OldEvent.LOST, OldEvent.LATE)
ENDING_STATES = (OldState.FROZEN, OldState.DRAINING, OldState.REPLACED, OldState.RELEASED)
HEARD = {"meet": OldEvent.ACCEPTED, "verified": OldEvent.VERIFIED, "declined": OldEvent.DECLINED}
UNANSWERED = {
    Stage.PUT: Stage.NO_ANSWER,
    Stage.SEALED: Stage.NO_ANSWER,
    Stage.TAKEN: Stage.KEPT,
    Stage.ENDING: Stage.NO_FINISH,
    Stage.REMOVING: Stage.NO_FINISH,
    Stage.GONE: Stage.NO_FINISH,
    Stage.CLOSING: Stage.NO_FINISH,
    Stage.NOT_ALONE: Stage.NO_FINISH,
}
"""What a client knows whose daemon died while it worked on the request."""
STORING = frozenset({Stage.PUT, Stage.REMOVING})


class Moves:
    """What all parts of the model share: the rules, the scenario, and the moves found in the world that is looked at."""

    def __init__(self, rules: Rules, scenario: Scenario) -> None:
        self._rules = rules
        self._scenario = scenario
        self._found: list[Move] = []

    def _add(self, kind: Kind, actor: str, text: str, world: World, broken: str = "") -> None:
        if kind is Kind.LATE and not self._scenario.late:
            return
        self._found.append(Move(kind, actor, text, world, broken))

    def _step(self, text: str, world: World, actor: str = "daemon") -> None:
        self._add(Kind.STEP, actor, text, world)

    def _tell(self, world: World, what: str, session: int) -> World:
        assert world.manager is not None
        return world._replace(manager=world.manager._replace(queue=(*world.manager.queue, ("old", what, session))))

    def _answer(self, world: World, session: int) -> World:
        return world._replace(promised=world.promised | session) if world.old.names & session else world

    def _kill_new(self, world: World) -> World:
        if world.old.up:
            return world._replace(new=GONE)
        stages = tuple(Stage.LOST if stage in (Stage.KEPT, Stage.OPEN) and world.manager is None else stage for stage in world.stages)
        return world._replace(new=None, stages=stages)

    def _ghost_gone(self, world: World, index: int) -> World:
        ghosts = tuple(ghost for number, ghost in enumerate(world.ghosts) if number != index)
        alone = world.old.alone or index == len(world.ghosts) - 1
        who = ghost_name(world, index)
        return world._replace(ghosts=ghosts, old=world.old._replace(alone=alone), manager=bury(world.manager, who, world.ghosts[index]))


def box(old: Old, session: int) -> str:
    """messages.py Box, with `retrieved_by` as it is when the message is made."""
    return "box, retrieved" if old.retrieved & session else "box"


def heir_of(world: World) -> New | None:
    """The successor, if it is to serve should the old daemon be dead: it has been offered, and not refused."""
    new = world.new
    if new is None or not new.up or new.at == "left" or world.manager is not None:
        return None
    if any(kind == "declined" for kind, _ in new.inbox):
        return None
    offered = new.state is not NewState.STARTING or any(kind == "offer" for kind, _ in new.inbox)
    return new if offered else None


def ghost_name(world: World, index: int) -> str:
    """The latest is `replaced`, one before it `replaced2`."""
    behind = len(world.ghosts) - 1 - index
    return "replaced" if not behind else f"replaced{behind + 1}"


def bury(manager: Manager | None, who: str, process: Old) -> Manager | None:
    """The manager, now that a process is dead: what it had sent is still taken, what it wrote into a stored ledger stays."""
    if manager is None:
        return None
    written = process.ledger or (0, 0)
    main = DEAD if manager.main == who else manager.main
    known = DEAD if manager.main == who else "nobody"
    queue: list[Told] = []
    for sender, what, session in manager.queue:
        if sender == who:
            queue.append((known, f"ledger {written[0]} {written[1]}" if what == "ledger" else what, session))
        else:
            queue.append((sender, f"main={DEAD}" if what == f"main={who}" else what, session))
    return manager._replace(main=main, queue=tuple(queue), ledgers=tuple(written if each == who else each for each in manager.ledgers))
