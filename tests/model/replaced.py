"""A daemon whose successor has committed, and whether it knows so or not."""

from __future__ import annotations

from typing import Protocol

from luod.succession.old_table import OldEvent, OldState
from model.moves import HEARD, Kind, Moves, ghost_name
from model.world import DEAD, At, Old, World


class _Changed(Protocol):
    def __call__(self, **changes: object) -> World: ...


class Replaced(Moves):
    """old.py from `_commit` on, and server.py _outlive on the other side."""

    def _leave(self, world: World, index: int) -> None:
        """A daemon whose successor has committed: old.py _commit to _release, then __main__.py _leave_when_replaced."""
        ghost = world.ghosts[index]

        def now(**changes: object) -> World:
            ghosts = list(world.ghosts)
            ghosts[index] = ghost._replace(**changes)  # type: ignore[arg-type]
            return world._replace(ghosts=tuple(ghosts))

        who = ghost_name(world, index)
        if ghost.listens:
            if ghost.inbox:
                (kind, _), rest = ghost.inbox[0], ghost.inbox[1:]
                if kind == "serving":
                    ear = (*ghost.ear, OldEvent.SERVING_READ)
                    self._step("hears serving", now(inbox=rest, listens=False, heard=True, ear=ear), who)
                elif kind == "let-go":
                    self._step("hears let-go", now(inbox=rest), who)
                else:
                    self._step(f"hears {kind}", now(inbox=rest, ear=(*ghost.ear, HEARD[kind])), who)
            else:
                self._step("hears the end", now(listens=False, ear=(*ghost.ear, OldEvent.LOST)), who)
        if ghost.at is At.LIVE:
            self._step("can't send: EPIPE", now(at=At.DECIDE, todo=0), who)
        if ghost.at in (At.LIVE, At.DECIDE):
            event = OldEvent.LATE
            if ghost.at is At.DECIDE and ghost.ear:
                event = OldEvent.DECLINED if ghost.ear[0] in (OldEvent.ACCEPTED, OldEvent.VERIFIED) else ghost.ear[0]
                self._step(f"takes {event}", self._replaced(now, ghost, event), who)
            self._add(Kind.LATE, who, "the commit is late", self._replaced(now, ghost, OldEvent.LATE))
        elif ghost.at is At.DRAIN and (not ghost.listens or not self._rules.drain_before_thaw):
            found = OldEvent.SERVING_READ if ghost.heard else OldEvent.QUEUE_EMPTY
            self._step("has read its queue", self._replaced(now, ghost, found), who)
        elif ghost.at is At.ANNOUNCE:
            if world.manager is None:
                self._step("needs no manager's word", now(state=self._rules.old_step(ghost.state, OldEvent.CONFIRMED), at=At.EXIT), who)
            else:
                heir = "old" if index == len(world.ghosts) - 1 else ghost_name(world, index + 1)
                if heir == "old" and not world.old.up:
                    heir = DEAD
                told = now(at=At.CONFIRM)
                told = told._replace(manager=world.manager._replace(queue=(*world.manager.queue, (who, f"main={heir}", 0))))
                self._step("tells the manager its successor", told, who)
        elif ghost.at is At.CONFIRM:
            assert world.manager is not None
            taken = not any(sender == who for sender, _, _ in world.manager.queue)
            if taken or not self._rules.confirmed_before_exit:
                self._step("is confirmed", now(state=self._rules.old_step(ghost.state, OldEvent.CONFIRMED), at=At.EXIT), who)
        elif ghost.at is At.EXIT:
            main = world.manager is not None and world.manager.main == who
            broken = "it ends as the main process of the service, with which the manager ends everything" if main else ""
            self._add(Kind.STEP, who, "ends", self._ghost_gone(world, index), broken)

    def _replaced(self, now: _Changed, ghost: Old, event: OldEvent) -> World:
        state = self._rules.old_step(ghost.state, event)
        if state is OldState.DRAINING:
            return now(state=state, at=At.DRAIN, deaf=True, ear=())
        if state is OldState.REPLACED:
            return now(state=state, at=At.ANNOUNCE, ear=(), inbox=())
        return now(state=state, at=At.SEE_OFF, ear=(), inbox=(), listens=False)

    def _outlive(self, world: World) -> None:
        """server.py _outlive: a predecessor that doesn't end is killed."""
        if not world.old.alone:
            self._add(Kind.LATE, "daemon", "kills its predecessor", self._ghost_gone(world, len(world.ghosts) - 1))
