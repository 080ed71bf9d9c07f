"""What the daemon does for its clients, during a handover or not: requests that change what is finalized."""

from __future__ import annotations

from luod.succession.old_table import OldEvent
from model.moves import STORING, Kind, Moves, box
from model.rules import Verb
from model.world import At, Ready, Stage, World, at_stage, names, serves, staged, with_stage


class Requests(Moves):
    """connection.py _answer, server.py perform and settle: the daemon's tasks, one for each request."""

    def _verbs(self, world: World) -> None:
        """connection.py _answer, server.py perform and settle."""
        for number, stage in enumerate(world.stages):
            session = 1 << number
            what = names(session)
            if stage is Stage.KEPT:
                self._kept(world, session, what)
            elif stage is Stage.OPEN:
                self._open(world, session, what)
            elif stage is Stage.PUT:
                self._put(world, session, what)
            elif stage is Stage.SEALED or stage is Stage.TAKEN:
                self._unlogged(world, session, what, Stage.KEPT)
            elif stage is Stage.ENDING:
                self._ending(world, session, what)
            elif stage is Stage.REMOVING:
                self._removing(world, session, what)
            elif stage is Stage.GONE:
                self._unlogged(world, session, what, Stage.CLOSING)
            elif stage is Stage.CLOSING:
                self._closing(world, session, what)
            elif stage is Stage.NOT_ALONE:
                if world.old.alone:
                    self._step(f"answers finished({what})", with_stage(world, session, Stage.DONE))
            elif stage in (Stage.NO_ANSWER, Stage.NO_FINISH) and serves(world.old):
                self._asks_again(world, session, what, stage)
            if stage in (Stage.GONE, Stage.CLOSING, Stage.NOT_ALONE) and not self._rules.again_waits:
                # deserializing.py _finished_again
                self._add(
                    Kind.CLIENT, "client", f"asks for finished({what}) again, and is answered", with_stage(world, session, Stage.DONE)
                )

    def _keeps(self, world: World) -> bool:
        """Whether a request goes on at `await keeper.ready.wait()`, and the store's turn is free (FdStore._turn)."""
        if world.manager is None:
            return True
        return world.old.ready in (Ready.YES, Ready.FAULT) and not at_stage(world, STORING)

    def _open(self, world: World, session: int, what: str) -> None:
        """serializing.py finalize; keeping.py keep."""
        if Verb.FINALIZE not in self._scenario.verbs or not serves(world.old) or not self._keeps(world):
            return
        if world.manager is None or world.old.ready is Ready.FAULT:
            self._add(Kind.CLIENT, "client", f"asks finalize({what}), which is done", self._sealed(world, session))
            return
        told = self._tell(world, "store", session)
        put = told._replace(old=told.old._replace(held=told.old.held | session))
        self._add(Kind.CLIENT, "client", f"asks finalize({what}), the box goes to the manager", with_stage(put, session, Stage.PUT))

    def _put(self, world: World, session: int, what: str) -> None:
        """fdstore.py put: the barrier, then the witness."""
        manager = world.manager
        assert manager is not None
        refused = with_stage(world._replace(old=world.old._replace(held=world.old.held & ~session)), session, Stage.OPEN)
        if ("old", "store", session) in manager.queue:
            if len(manager.queue) < 3:
                self._add(Kind.LATE, "daemon", f"refuses finalize({what}): the manager is late", self._tell(refused, "remove", session))
            if not self._rules.store_before_reply:
                kept = world._replace(old=world.old._replace(names=world.old.names | session))
                self._step(f"does not wait for the manager: finalize({what}) is done", self._sealed(kept, session))
        elif manager.held & session:
            kept = world._replace(old=world.old._replace(names=world.old.names | session))
            self._step(f"sees that the manager has {what}: finalize is done", self._sealed(kept, session))
        else:
            self._step(f"refuses finalize({what}): the manager did not keep it", refused)

    def _sealed(self, world: World, session: int) -> World:
        """serializing.py finalize's act, then old.py tell, without a checkpoint in between."""
        old = world.old._replace(held=world.old.held | session)
        if not old.logging:
            return self._answer(with_stage(world._replace(old=old), session, Stage.KEPT), session)
        told = world._replace(old=old._replace(out=(*old.out, (box(old, session), session, False))))
        if not self._rules.log_before_reply:
            return self._answer(with_stage(told, session, Stage.KEPT), session)
        return with_stage(told, session, Stage.SEALED)

    def _unlogged(self, world: World, session: int, what: str, then: Stage) -> None:
        """old.py tell, waiting in `_tell`: the send, or `let-go`."""
        waits = [each for each in world.old.out if each[1] == session and not each[2]]
        if world.old.at is At.SEE_OFF:
            return  # for the end: `_over.wait()`
        if then is Stage.KEPT and staged(world, session) is Stage.SEALED and not self._rules.again_waits:
            # serializing.py _finalized_again
            text = f"asks for finalized({what}) again, and is answered"
            self._add(Kind.CLIENT, "client", text, self._answer(with_stage(world, session, Stage.KEPT), session))
        if waits or staged(world, session) is Stage.GONE:
            rest = tuple(each for each in world.old.out if each not in waits)
            if len(world.old.ear) < 2:
                late = world.old._replace(out=rest, ear=(*world.old.ear, OldEvent.LATE))
                if waits or OldEvent.LATE not in world.old.ear:
                    self._add(Kind.LATE, "daemon", f"the successor did not take the log of {what} in time", world._replace(old=late))

    def _kept(self, world: World, session: int, what: str) -> None:
        if not serves(world.old):
            return
        if Verb.FINISH in self._scenario.verbs and self._keeps(world):
            # deserializing.py finish; keeping.py forget
            if world.manager is None:
                self._add(Kind.CLIENT, "client", f"asks finish({what}), which is done", self._gone(world, session))
            elif self._rules.ledger_before_removal:
                self._add(Kind.CLIENT, "client", f"asks finish({what}), which the ledger says", self._write_ending(world, session))
            else:
                self._add(Kind.CLIENT, "client", f"asks finish({what})", with_stage(world, session, Stage.ENDING))
        if Verb.RETRIEVE in self._scenario.verbs and not world.seen & session:
            self._retrieve(world, session, what)

    def _retrieve(self, world: World, session: int, what: str) -> None:
        """deserializing.py retrieve, server.py settle."""
        old = world.old._replace(retrieved=world.old.retrieved | session)
        if world.manager is not None:
            if self._rules.retrieval_waits_until_kept and old.ready not in (Ready.YES, Ready.FAULT):
                return
            if old.ledger is not None:
                old = old._replace(ledger=(old.ledger[0], old.ledger[1] | session))
            if old.ready is not Ready.WAIT and "old" not in world.manager.ledgers:
                # keeping.py begin: "does not keep all that it should, which a crash of luod may cost"
                return
        if old.logging:
            old = old._replace(out=(*old.out, ("retrieved", session, False)))
            then = with_stage(world._replace(old=old), session, Stage.TAKEN)
        else:
            then = world._replace(old=old, seen=world.seen | session)
        self._add(Kind.CLIENT, "client", f"asks retrieve({what})", then)

    def _write_ending(self, world: World, session: int) -> World:
        old = world.old
        if old.ledger is not None:
            old = old._replace(ledger=(old.ledger[0] | session, old.ledger[1]))
        return with_stage(world._replace(old=old), session, Stage.ENDING)

    def _ending(self, world: World, session: int, what: str) -> None:
        """keeping.py forget, behind the ledger; fdstore.py remove."""
        if not self._keeps(world):
            return
        if not world.old.names & session:
            self._step(f"ends {what}, which is not stored", self._gone(world, session))
            return
        manager = world.manager
        assert manager is not None
        if self._rules.removal_is_heard and "old" not in manager.ledgers and manager.main != "old":
            # fdstore.py remove: no witness was ever kept, nor is one behind all that was sent
            if not manager.queue:
                self._step(f"refuses finish({what}): the manager does not listen", self._stays(world, session))
            return
        told = self._tell(world, "remove", session)
        if self._rules.remove_before_reply:
            self._step(f"has the manager let go of {what}", with_stage(told, session, Stage.REMOVING))
        else:
            self._step(f"tells the manager to let go of {what} and ends it", self._gone(told, session))

    def _removing(self, world: World, session: int, what: str) -> None:
        manager = world.manager
        assert manager is not None
        if ("old", "remove", session) in manager.queue:
            if len(manager.queue) < 3:
                self._add(Kind.LATE, "daemon", f"refuses finish({what}): the manager is late", self._stays(world, session))
            return
        late = world if self._rules.ledger_before_removal else self._write_ending(world, session)
        self._step(f"sees that the manager has taken it: {what} ends", self._gone(late, session))

    def _stays(self, world: World, session: int) -> World:
        """keeping.py _stay."""
        old = world.old
        if old.ledger is not None and self._rules.staying:
            old = old._replace(ledger=(old.ledger[0] & ~session, old.ledger[1]))
        return self._tell(with_stage(world._replace(old=old), session, Stage.KEPT), "restore", session)

    def _gone(self, world: World, session: int) -> World:
        """deserializing.py finish's act, then old.py tell."""
        old = world.old
        old = old._replace(ended=old.ended | session, names=old.names & ~session)
        if old.logging:
            old = old._replace(out=(*old.out, ("gone", session, False)))
            return with_stage(world._replace(old=old), session, Stage.GONE if self._rules.let_go_before_reply else Stage.CLOSING)
        if old.at is At.SEE_OFF and self._rules.departures_wait_for_the_end:
            return with_stage(world._replace(old=old), session, Stage.GONE)
        return with_stage(world._replace(old=old), session, Stage.CLOSING)

    def _closing(self, world: World, session: int, what: str) -> None:
        """server.py settle: close, then alone."""
        closed = world._replace(old=world.old._replace(held=world.old.held & ~session))
        if world.old.alone or not self._rules.alone_before_reply:
            self._step(f"closes {what}, answers finished", with_stage(closed, session, Stage.DONE))
        else:
            self._step(f"closes {what}", with_stage(closed, session, Stage.NOT_ALONE))
        if not self._rules.close_before_reply:
            self._step(f"answers finished({what})", with_stage(world, session, Stage.DONE))

    def _asks_again(self, world: World, session: int, what: str, stage: Stage) -> None:
        """After a lost answer: serializing.py _finalized_again, deserializing.py _finished_again."""
        if world.old.held & session:
            kept = self._answer(with_stage(world, session, Stage.KEPT), session)
            self._add(Kind.CLIENT, "client", f"asks about {what} again: it is there", kept)
        elif stage is Stage.NO_FINISH and world.old.ended & session:
            self._add(Kind.CLIENT, "client", f"asks finish({what}) again: it was", with_stage(world, session, Stage.DONE))
