"""The search: every world that can come, the shortest way to one that must not be, and what is reached from each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

import attrs

from luod.succession.new_table import NewState
from luod.succession.old_table import OldState
from luod_protocol.errors import LuodError
from model.model import Model
from model.moves import Kind, Move, heir_of
from model.rules import Rules, Scenario
from model.world import AT_WORK, OPEN_GATE, At, Manager, Ready, Stage, World, describe, names, serves

ANSWERED = frozenset({Stage.KEPT, Stage.TAKEN})
"""`finalized` was answered, and no `finish` was asked for since."""


class Counterexample(AssertionError):
    """A way to a world that must not be."""


@attrs.frozen(kw_only=True)
class Explored:
    """What a search saw.

    Attributes:
        worlds: in the order in which they were found; the first is where it begins.
        edges: for each, the kind and the actor of each move and the number of the world it leads to.
        came: for each but the first, the number of the world before it and the move that led from there.
    """

    worlds: list[World]
    edges: list[list[tuple[Kind, str, int]]]
    came: list[tuple[int, Move] | None]

    def told(self, number: int) -> str:
        """The shortest way to a world, for people."""
        return trace(self.worlds, self.came, number, "")

    def unable(self, good: Callable[[World], bool], take: Callable[[Kind, str], bool]) -> list[int]:
        """The worlds from which no good one is reached by the moves that are taken."""
        before: list[list[int]] = [[] for _ in self.worlds]
        for number, moves in enumerate(self.edges):
            for kind, actor, following in moves:
                if take(kind, actor):
                    before[following].append(number)
        reached = [good(world) for world in self.worlds]
        waiting = deque(number for number, is_good in enumerate(reached) if is_good)
        while waiting:
            for number in before[waiting.popleft()]:
                if not reached[number]:
                    reached[number] = True
                    waiting.append(number)
        return [number for number, is_reached in enumerate(reached) if not is_reached]


def explore(rules: Rules, scenario: Scenario) -> Explored:
    """See every world.

    Raises:
        Counterexample: one breaks an invariant, or a move does; with the shortest way there.
    """
    model = Model(rules, scenario)
    first = model.begin()
    numbers = {first: 0}
    worlds = [first]
    edges: list[list[tuple[Kind, str, int]]] = []
    came: list[tuple[int, Move] | None] = [None]
    for number, world in enumerate(worlds):
        reason = broken(world)
        if reason:
            raise Counterexample(trace(worlds, came, number, reason))
        try:
            moves = model.moves(world)
        except LuodError as error:
            raise Counterexample(trace(worlds, came, number, f"then: {error}")) from None
        here: list[tuple[Kind, str, int]] = []
        for move in moves:
            following = numbers.get(move.world)
            if following is None:
                following = numbers[move.world] = len(worlds)
                worlds.append(move.world)
                came.append((number, move))
            here.append((move.kind, move.actor, following))
            if move.broken:
                last = (*way(came, number), move)
                raise Counterexample(told(worlds[0], last, move.broken))
        edges.append(here)
    return Explored(worlds=worlds, edges=edges, came=came)


def way(came: list[tuple[int, Move] | None], number: int) -> list[Move]:
    """The moves that lead to a world."""
    moves: list[Move] = []
    step = came[number]
    while step is not None:
        moves.append(step[1])
        step = came[step[0]]
    return moves[::-1]


def told(first: World, moves: Collection[Move], reason: str) -> str:
    """A counterexample for people."""
    lines = [f"{reason}, after {len(moves)} steps", "    at first", describe(first)]
    for number, move in enumerate(moves, 1):
        lines += [f"{number:4}. {move.actor}: {move.text} ({move.kind.value})", describe(move.world)]
    return "\n".join(lines)


def trace(worlds: list[World], came: list[tuple[int, Move] | None], number: int, reason: str) -> str:
    """The shortest way to a world, for people."""
    return told(worlds[0], way(came, number), reason)


# ------------------------------------------------------------------------------------------------------ what must hold


def broken(world: World) -> str:
    """Why a world must not be; empty when it may."""
    old, ghosts = world.old, world.ghosts
    serving = serves(old) + sum(ghost.state in OPEN_GATE for ghost in ghosts)
    if serving > 1:
        return "two daemons serve"
    if world.new is not None and world.new.state is NewState.SERVING:
        return "a successor serves before the commit"
    if old.promoted and world.manager is not None:
        return "a successor promoted itself, and the service manager starts another one"
    for number, stage in enumerate(world.stages):
        session = 1 << number
        if stage in ANSWERED:
            reason = _not_owned(world, session)
        elif stage is Stage.DONE:
            reason = _owned(world, session)
        elif stage is Stage.NO_FINISH and world.manager is not None and serves(old):
            reason = (
                ""
                if (old.held | old.ended) & session
                else f"whoever asks finish({names(session)}) again is told that there was no such session"
            )
        else:
            continue
        if reason:
            return reason
        if stage in ANSWERED and world.seen & session and serves(old) and not old.retrieved & session:
            return f"{names(session)} was retrieved, and who serves does not know it"
    return ""


def _not_owned(world: World, session: int) -> str:
    """`finalized` was answered: who has it?"""
    what = names(session)
    if world.manager is not None and world.promised & session and not _kept(world, world.manager, session):
        return f"{what} is to survive a crash, and the service manager does not have it"
    if world.old.up:
        return "" if world.old.held & session else f"{what} was finalized, and who serves does not have it"
    if world.manager is not None:
        return ""
    heir = heir_of(world)
    if heir is not None and (heir.held & session or any(kind.startswith("box") and each == session for kind, each in heir.inbox)):
        return ""
    return f"{what} was finalized, and nobody has it who will serve"


def _kept(world: World, manager: Manager, session: int) -> bool:
    """Whether the next luod would get the session: when the manager has taken what the main process has sent, and by the newest ledger."""
    held, main = manager.held, manager.main
    for who, what, each in manager.queue:
        if who != main or each != session:
            continue
        held = held | each if what in ("store", "restore") else held & ~each
    newest = manager.ledgers[-1] if manager.ledgers else (0, 0)
    ended = newest[0] if not isinstance(newest, str) else (world.old.ledger or (0, 0))[0]
    return bool(held & ~ended & session)


def _owned(world: World, session: int) -> str:
    """`finished` was answered: who has it still?"""
    what = f"{names(session)} was finished"
    if world.old.up and world.old.held & session:
        return f"{what}, and the daemon has it"
    if any(ghost.held & session for ghost in world.ghosts):
        return f"{what}, and a daemon that was replaced has it"
    new = world.new
    if new is not None and new.up and (new.held & session or any(kind.startswith("box") and each == session for kind, each in new.inbox)):
        return f"{what}, and a successor has it"
    if world.manager is not None:
        if world.manager.held & session:
            return f"{what}, and the service manager has it"
        if any(who == world.manager.main and what in ("store", "restore") and each == session for who, what, each in world.manager.queue):
            return f"{what}, and the service manager will have it"
    return ""


def at_rest(world: World) -> bool:
    """One daemon serves, nothing is under way, nobody else is left; or nobody lives."""
    old, manager = world.old, world.manager
    if manager is not None and (manager.queue or manager.main != "old"):
        return False
    if world.new is not None or world.ghosts:
        return False
    if not old.up:
        return manager is None
    if old.at is not At.IDLE or old.state is not OldState.SERVING or old.ready not in (Ready.YES, Ready.FAULT):
        return False
    return not any(stage in AT_WORK for stage in world.stages)
