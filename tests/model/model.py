"""The whole model: everything that can happen next in a world."""

from __future__ import annotations

from model.handover import Handover
from model.moves import UNANSWERED, Kind, Move, bury, ghost_name, heir_of
from model.replaced import Replaced
from model.requests import Requests
from model.service import Service
from model.successor import Successor
from model.world import SEALED, At, Manager, Old, Ready, Stage, World


class Model(Requests, Handover, Replaced, Successor, Service):
    """Everything that can happen, under some rules, in a scenario."""

    def begin(self) -> World:
        """Where it begins: one daemon, which serves."""
        sealed = 0
        for number, stage in enumerate(self._scenario.stages):
            if stage in SEALED:
                sealed |= 1 << number
        if not self._scenario.managed:
            return World(old=Old(held=sealed), stages=self._scenario.stages, attempts=self._scenario.attempts)
        return World(
            old=Old(held=sealed, names=sealed, ledger=(0, 0)),
            stages=self._scenario.stages,
            manager=Manager(held=sealed),
            promised=sealed,
            attempts=self._scenario.attempts,
        )

    def moves(self, world: World) -> list[Move]:
        """What can happen next.

        Raises:
            LuodError: a table was given an event that it doesn't know.
        """
        self._found = []
        if world.old.up:
            self._verbs(world)
            if world.old.at is At.IDLE:
                self._begin_upgrade(world)
            else:
                self._hand_over(world)
            if world.old.ready not in (Ready.YES, Ready.FAULT):
                self._begin_keeping(world)
            if world.ghosts:
                self._outlive(world)
        for index in range(len(world.ghosts)):
            self._leave(world, index)
        if world.new is not None and world.new.up:
            self._succeed(world, world.new)
        if world.manager is not None:
            self._manage(world, world.manager)
        if self._scenario.crashes:
            self._crash(world)
        return self._found

    def _crash(self, world: World) -> None:
        """SIGKILL."""
        if world.old.up:
            self._add(Kind.CRASH, "daemon", "is killed", self._kill_old(world))
        if world.new is not None and world.new.up:
            self._add(Kind.CRASH, "successor", "is killed", self._kill_new(world))
        for index in range(len(world.ghosts)):
            self._add(Kind.CRASH, ghost_name(world, index), "is killed", self._ghost_gone(world, index))

    def _kill_old(self, world: World) -> World:
        old, new = world.old, world.new
        heir = heir_of(world)
        unsent = old.todo | sum(session for kind, session, own in old.out if own and kind.startswith("box"))
        stages = [UNANSWERED.get(stage, stage) for stage in world.stages]
        for number, stage in enumerate(stages):
            if stage is Stage.OPEN and heir is None:
                stages[number] = Stage.LOST
            elif stage is Stage.KEPT and (heir is None or unsent >> number & 1) and not world.promised >> number & 1:
                # It was the only owner: of all, or of what it had not come to in its copy.
                stages[number] = Stage.LOST
        dead = Old(up=False, ended=old.ended)
        if new is not None:
            new = new._replace(eof=True) if new.up else None
        return world._replace(old=dead, new=new, stages=tuple(stages), manager=bury(world.manager, "old", old))
