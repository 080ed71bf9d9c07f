"""A successor, up to the moment at which it serves or leaves."""

from __future__ import annotations

from luod.succession.new_table import NewEvent, NewState
from model.moves import Kind, Moves
from model.world import Manager, Message, New, Old, Ready, Stage, World, names


class Successor(Moves):
    """new.py, up to the commit or a predecessor's death."""

    def _succeed(self, world: World, new: New) -> None:
        """new.py run and _next."""
        if new.at == "begin":
            self._step("sends meet", self._reply(world, new._replace(at="run"), ("meet", 0)), "successor")
        elif new.at == "run":
            dead_unread = not self._rules.read_to_the_end and not world.old.up
            if new.inbox and not dead_unread:
                self._take(world, new)
            elif new.eof:
                self._step("sees the end of the socket", world._replace(new=new._replace(at="lost", inbox=())), "successor")
            if world.old.up and new.state is not NewState.STARTING and self._scenario.crashes:
                # FAILURES: something that came can't be used, and the old daemon isn't dead
                self._add(Kind.CRASH, "successor", "declines", self._left(world, new))
        elif new.at == "lost":
            self._lost(world, new)
        else:
            self._step("ends", self._kill_new(world), "successor")

    def _reply(self, world: World, new: New, message: Message) -> World:
        """new.py _send: EPIPE is ignored."""
        old = world.old
        if old.up and old.end and not old.deaf:
            old = old._replace(inbox=(*old.inbox, message))
        return world._replace(old=old, new=new)

    def _take(self, world: World, new: New) -> None:
        """new.py _take."""
        (kind, session), new = new.inbox[0], new._replace(inbox=new.inbox[1:])
        text = f"takes {kind}({names(session)})" if session else f"takes {kind}"
        broken = ""
        if kind == "offer":
            then = world._replace(new=new._replace(state=self._rules.new_step(new.state, NewEvent.OFFERED), ended=world.old.ended))
        elif kind.startswith("box"):
            broken = f"the box of {names(session)} came twice" if new.held & session else ""
            known = new.retrieved | (session if kind != "box" else 0)
            then = world._replace(new=new._replace(held=new.held | session, retrieved=known))
        elif kind == "gone":
            dropped = new._replace(held=new.held & ~session, ended=new.ended | session)
            then = self._reply(world, dropped, ("let-go", session))
        elif kind == "retrieved":
            then = world._replace(new=new._replace(retrieved=new.retrieved | (session & new.held)))
        elif kind == "copied":
            then = self._reply(world, new._replace(state=self._rules.new_step(new.state, NewEvent.COPIED)), ("verified", 0))
        elif kind == "open":
            then = world._replace(new=new._replace(opened=new.opened | session))
        elif kind == "declined":
            then = self._enter(world, new, NewEvent.REFUSED)
        else:
            then, broken = self._take_frozen(world, new, kind)
        self._add(Kind.STEP, "successor", text, then, broken)

    def _take_frozen(self, world: World, new: New, kind: str) -> tuple[World, str]:
        """new.py _take_frozen: the commit."""
        here = new.held.bit_count() + new.opened.bit_count()
        if kind != f"frozen, {here} sessions":
            return self._left(world, new), f"{here} sessions came: {kind}"
        holding = new._replace(state=self._rules.new_step(new.state, NewEvent.FROZEN))
        old = world.old
        if not (old.up and old.end and not old.deaf):
            return world._replace(new=holding), ""
        told = world._replace(old=old._replace(inbox=(*old.inbox, ("serving", 0))))
        lost = [number for number, stage in enumerate(world.stages) if stage is Stage.OPEN and not new.opened >> number & 1]
        return self._enter(told, holding, NewEvent.COMMITTED), "an open session did not come along" if lost else ""

    def _lost(self, world: World, new: New) -> None:
        """new.py _lost."""
        if world.old.up or new.state is NewState.STARTING:
            # No offer, no pidfd; else the old daemon's death is waited for.
            kind = Kind.STEP if new.state is NewState.STARTING else Kind.LATE
            self._add(kind, "successor", "its predecessor lives", self._enter(world, new, NewEvent.LOST_ALIVE))
        elif world.manager is not None:
            self._step("its predecessor is dead", self._enter(world, new, NewEvent.OLD_DIED_MANAGED), "successor")
        else:
            self._step("its predecessor is dead", self._enter(world, new, NewEvent.OLD_DIED), "successor")

    def _enter(self, world: World, new: New, event: NewEvent) -> World:
        before, state = new.state, self._rules.new_step(new.state, event)
        new = new._replace(state=state)
        if state is NewState.SERVING:
            return self._promote(world, new, before, event)
        if state is NewState.LEFT:
            return self._left(world, new)
        return world._replace(new=new)

    def _left(self, world: World, new: New) -> World:
        """new.py run: a last word, the socket is closed; the process ends later."""
        return self._reply(world, new._replace(at="left", end=False, inbox=()), ("declined", 0))

    def _promote(self, world: World, new: New, before: NewState, event: NewEvent) -> World:
        """server.py thaw. The successor is the daemon from here on, and its predecessor, if it lives, one that is replaced."""
        old, stages = world.old, list(world.stages)
        for number, stage in enumerate(stages):
            kept = new.opened >> number & 1 and (event is NewEvent.COMMITTED or before is NewState.HOLDING)
            if stage is Stage.OPEN and not kept:
                stages[number] = Stage.LOST
        ghost = old._replace(out=(), todo=0, ended=0, retrieved=0, names=0, ledger=None, ready=Ready.YES)
        heir = Old(
            held=new.held,
            ended=new.ended,
            retrieved=new.retrieved,
            promoted=event is not NewEvent.COMMITTED,
            alone=not old.up,
            names=old.names & new.held,
            ready=Ready.YES if world.manager is None else Ready.WAIT,
        )
        manager = world.manager
        if manager is not None and old.up:
            manager = renamed(manager, world)
        return world._replace(
            old=heir, new=None, ghosts=(*world.ghosts, ghost) if old.up else world.ghosts, stages=tuple(stages), manager=manager
        )


def renamed(manager: Manager, world: World) -> Manager:
    """The manager, now that the daemon is one that is replaced."""
    renaming = {"old": "replaced", "replaced": "replaced2", "replaced2": "replaced3"}
    written = world.old.ledger or (0, 0)
    return Manager(
        main=renaming.get(manager.main, manager.main),
        queue=tuple(
            (renaming.get(who, who), f"main={renaming.get(what[5:], what[5:])}" if what.startswith("main=") else what, session)
            for who, what, session in manager.queue
        ),
        held=manager.held,
        ledgers=tuple(written if each == "old" else each for each in manager.ledgers),
    )
