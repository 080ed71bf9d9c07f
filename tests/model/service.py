"""The service manager, and how a daemon begins to keep things there."""

from __future__ import annotations

from model.moves import UNANSWERED, Kind, Moves
from model.world import DEAD, At, Manager, Old, Ready, Stage, World, names


class Service(Moves):
    """The manager's side, and keeping.py begin, which talks to it."""

    def _begin_keeping(self, world: World) -> None:
        """server.py _outlive, managing.py and keeping.py begin."""
        old, manager = world.old, world.manager
        assert manager is not None
        if old.ready is Ready.WAIT and old.alone:
            old = old._replace(ready=Ready.LEDGER, ledger=(old.ended, old.retrieved))
            self._step("has the manager keep its ledger", self._tell(world._replace(old=old), "ledger", 0))
        elif old.ready is Ready.LEDGER and ("old", "ledger", 0) not in manager.queue:
            if "old" in manager.ledgers:
                old = old._replace(ready=Ready.LEAVE)
                self._step("has the manager let go of what is over", self._tell(world._replace(old=old), "sweep", manager.held & old.ended))
            else:
                # NotKept
                old = old._replace(ready=Ready.YES if old.names else Ready.FAULT)
                self._step("sees that the manager does not keep its ledger", world._replace(old=old))
        elif old.ready is Ready.LEAVE and not any(told[:2] == ("old", "sweep") for told in manager.queue):
            old = old._replace(ready=Ready.YES, at=At.IDLE if old.at is At.BOOT else old.at)
            self._step("is ready", world._replace(old=old))

    def _manage(self, world: World, manager: Manager) -> None:
        """systemd: messages are taken in order, and from the main process only; a barrier behind them tells nothing of that."""
        if manager.queue:
            (who, what, session), rest = manager.queue[0], manager.queue[1:]
            then = manager._replace(queue=rest)
            if who != manager.main:
                self._step(f"does not listen to {who}: {what}", world._replace(manager=then), "manager")
                return
            if what in ("store", "restore"):
                if what == "store":
                    self._add(Kind.LATE, "manager", f"has no room for {names(session)}", world._replace(manager=then))
                then = then._replace(held=then.held | session)
            elif what == "remove":
                then = then._replace(held=then.held & ~session)
            elif what == "ledger":
                then = then._replace(ledgers=(*then.ledgers, "old"))
            elif what.startswith("ledger"):
                ended, retrieved = map(int, what.split()[1:])
                then = then._replace(ledgers=(*then.ledgers, (ended, retrieved)))
            elif what == "sweep":
                then = then._replace(held=then.held & ~session, ledgers=then.ledgers[-1:])
            else:
                then = then._replace(main=what.partition("=")[2])
            text = f"takes {what}({names(session)})" if session else f"takes {what}"
            self._step(text, world._replace(manager=then), "manager")
        elif manager.main == DEAD:
            # It takes what was sent before it looks for who has died.
            self._step("ends the service, whose main process is dead, and starts it again", self._restart(world, manager), "manager")

    def _restart(self, world: World, manager: Manager) -> World:
        """systemd's Restart=, then __main__.py fresh and adoption.py adopt."""
        newest = manager.ledgers[-1] if manager.ledgers else (0, 0)
        ended, retrieved = newest if not isinstance(newest, str) else (world.old.ledger or (0, 0))
        stages = [UNANSWERED.get(stage, stage) for stage in world.stages]
        for number, stage in enumerate(stages):
            if stage is Stage.OPEN or (stage in (Stage.KEPT, Stage.NO_FINISH) and not world.promised >> number & 1):
                stages[number] = Stage.LOST
        held = manager.held & ~ended
        fresh = Old(at=At.BOOT, held=held, names=held, ended=ended, retrieved=retrieved & held, ready=Ready.WAIT)
        # Older ledgers are never read.
        ledgers = ((ended, retrieved),) if manager.ledgers else ()
        return world._replace(
            old=fresh, new=None, ghosts=(), stages=tuple(stages), manager=manager._replace(main="old", queue=(), ledgers=ledgers)
        )
