"""The daemon hands over."""

from __future__ import annotations

from luod.succession.old_table import OldEvent, OldState
from model.moves import ENDING_STATES, FAILURES, HEARD, Kind, Moves, box
from model.world import AT_WORK, GONE, SENDING, At, New, Ready, Stage, World, at_stage, bits, names, sealed, staged, with_stage


class Handover(Moves):
    """old.py, up to the commit."""

    def _begin_upgrade(self, world: World) -> None:
        """upgrades.py start; old.py run."""
        old = world.old
        if not world.attempts:
            return
        kept = world.manager is None or old.ready in (Ready.YES, Ready.FAULT)
        if self._rules.upgrade_waits_until_alone and not (old.alone and kept):
            return
        meeting = old._replace(state=self._rules.old_step(old.state, OldEvent.SUCCESSOR_STARTED), at=At.MEET, listens=True, end=True)
        begun = world._replace(old=meeting, new=New(), attempts=world.attempts - 1)
        self._add(Kind.OPERATOR, "operator", "upgrades", begun)

    def _hand_over(self, world: World) -> None:
        old, new = world.old, world.new
        if old.listens:
            self._listen(world, new)
        if old.out:
            self._send(world, new)
        at = old.at
        if at in (At.MEET, At.VERIFY, At.BROKEN, At.DECIDE) and old.ear:
            self._hear(world, old.ear[0])
        elif at is At.COPY:
            self._copy(world)
        elif at is At.STILL:
            if not at_stage(world, AT_WORK) or not self._rules.freeze_waits:
                frozen = old._replace(state=self._rules.old_step(old.state, OldEvent.ALL_PARKED), at=At.LIVE)
                self._step("is frozen", world._replace(old=frozen._replace(todo=at_stage(world, frozenset({Stage.OPEN})))))
        elif at is At.LIVE:
            self._send_live(world, new)
        elif at is At.DRAIN:
            if not old.listens:
                self._step("finds no commit in its queue", self._thaw(world, self._rules.old_step(old.state, OldEvent.QUEUE_EMPTY)))
            elif not (old.inbox or self._rules.deafen_before_thaw):
                hasty = old._replace(state=self._rules.old_step(old.state, OldEvent.QUEUE_EMPTY), at=At.HASTY)
                self._step("finds no commit in its queue now", world._replace(old=hasty))
        elif at is At.HASTY:
            self._step("closes the channel", self._thaw(world, old.state))
        elif at is At.SEE_OFF:
            if new is None or not new.up or not self._rules.see_off:
                self._step("sees that the successor is gone", self._over(world))
            else:
                self._add(Kind.LATE, "daemon", "kills the successor, which did not leave", self._over(self._kill_new(world)))
        if at is At.STILL and self._scenario.crashes:
            # _refuse_what_it_can_not_carry, for the second time, just before the gate is closed
            self._add(Kind.CRASH, "daemon", "finds what the successor can't carry", self._fail(world, OldEvent.DECLINED))
        if at in (At.MEET, At.VERIFY, At.BROKEN, At.STILL) or at in SENDING:
            self._add(Kind.LATE, "daemon", "the successor, or a request, is late", self._fail(world, OldEvent.LATE))
        elif at in (At.LIVE, At.DECIDE):
            self._add(Kind.LATE, "daemon", "the commit is late", self._turn_back(world, OldEvent.LATE))

        if self._scenario.stops and at is not At.SEE_OFF and old.state not in ENDING_STATES and OldEvent.DECLINED not in old.ear:
            # old.py stop. What follows, the end of this daemon, is like a crash.
            told = old._replace(ear=(*old.ear, OldEvent.DECLINED))
            self._add(Kind.OPERATOR, "operator", "has the daemon stop", world._replace(old=told))

    def _listen(self, world: World, new: New | None) -> None:
        """hearing.py listen: one message, or the end."""
        old = world.old
        if old.inbox:
            (kind, session), rest = old.inbox[0], old.inbox[1:]
            heard = old._replace(inbox=rest)
            if kind == "let-go":
                if staged(world, session) is Stage.GONE:
                    world = with_stage(world, session, Stage.CLOSING)
            else:
                heard = heard._replace(ear=(*old.ear, HEARD[kind]))
            self._step(f"hears {kind}", world._replace(old=heard))
        elif old.deaf or new is None or not new.end:
            self._step("hears the end", world._replace(old=old._replace(listens=False, ear=(*old.ear, OldEvent.LOST))))

    def _send(self, world: World, new: New | None) -> None:
        """channel.py send: the lock is fair, so what waits is sent in order."""
        (kind, session, own), *rest = world.old.out
        old = world.old._replace(out=tuple(rest))
        if new is None or not new.end:
            # A verb waits for the end of the attempt from here on; the handover's own task for the listener's word.
            self._step(f"can't send {kind}: EPIPE", world._replace(old=old._replace(at=At.BROKEN) if own else old))
            return
        if len(new.inbox) >= self._scenario.room:
            return
        sent = world._replace(new=new._replace(inbox=(*new.inbox, (kind, session))))
        text = f"sends {kind}({names(session)})" if session else f"sends {kind}"
        if own:
            old = old._replace(at=At.VERIFY if old.at is At.COPIED else At.COPY)
        elif kind.startswith("box") and staged(world, session) is Stage.SEALED:
            sent, text = self._answer(with_stage(sent, session, Stage.KEPT), session), f"{text}, answers finalized"
        elif kind == "retrieved":
            sent, text = with_stage(sent._replace(seen=sent.seen | session), session, Stage.KEPT), f"{text}, answers retrieve"
        self._step(text, sent._replace(old=old))

    def _hear(self, world: World, event: OldEvent) -> None:
        """old.py: what the handover's task does with the listener's next word."""
        old = world.old._replace(ear=world.old.ear[1:])
        heard = world._replace(old=old)
        if old.at is At.DECIDE:
            # _commit
            turned = OldEvent.DECLINED if event in (OldEvent.ACCEPTED, OldEvent.VERIFIED) else event
            self._step(f"takes {event}", self._turn_back(heard, turned))
        elif old.at is At.MEET and event is OldEvent.ACCEPTED:
            # _meet: what is finalized now is to be copied, all that changes from here on is in the log
            copying = old._replace(state=self._rules.old_step(old.state, event), at=At.OFFER, logging=True, todo=sealed(world))
            self._step("accepts the successor", world._replace(old=copying._replace(out=(*copying.out, ("offer", 0, True)))))
        elif old.at is At.VERIFY and event is OldEvent.VERIFIED:
            self._step("freezes", world._replace(old=old._replace(state=self._rules.old_step(old.state, event), at=At.STILL)))
        elif event in FAILURES:
            self._step(f"takes {event}", self._fail(heard, event))
        else:
            # _fail: out of order, no event of the table
            self._step(f"takes {event} out of order", self._thaw(heard, old.state))

    def _copy(self, world: World) -> None:
        """old.py _copy, _send_box: a session that is finished by now isn't sent."""
        old = world.old
        for session in bits(old.todo):
            rest = old._replace(todo=old.todo & ~session)
            if sealed(world) & session:
                rest = rest._replace(at=At.BOX, out=(*old.out, (box(old, session), session, True)))
            self._step(f"comes to {names(session)}", world._replace(old=rest))
            return
        self._step("comes to the end of the copy", world._replace(old=old._replace(at=At.COPIED, out=(*old.out, ("copied", 0, True)))))

    def _send_live(self, world: World, new: New | None) -> None:
        """old.py _commit and _send_live: an OSError is suppressed, the listener says what it was."""
        old = world.old
        if new is None or not new.end:
            self._step("can't send: EPIPE", world._replace(old=old._replace(at=At.DECIDE, todo=0)))
            return
        if len(new.inbox) >= self._scenario.room:
            return
        for session in bits(old.todo):
            sent = new._replace(inbox=(*new.inbox, ("open", session)))
            self._step(f"sends open({names(session)})", world._replace(old=old._replace(todo=old.todo & ~session), new=sent))
            return
        count = (at_stage(world, frozenset({Stage.OPEN})) | sealed(world)).bit_count()
        sent = new._replace(inbox=(*new.inbox, (f"frozen, {count} sessions", 0)))
        self._step("sends frozen", world._replace(old=old._replace(at=At.DECIDE), new=sent))

    def _turn_back(self, world: World, event: OldEvent) -> World:
        """old.py _commit, from its `self._step(event)`."""
        old = world.old
        state = self._rules.old_step(old.state, event)
        if state is OldState.DRAINING:
            return world._replace(old=old._replace(state=state, at=At.DRAIN, deaf=self._rules.deafen_before_thaw, todo=0))
        return self._thaw(world, state)

    def _fail(self, world: World, event: OldEvent) -> World:
        """old.py _fail."""
        return self._thaw(world, self._rules.old_step(world.old.state, event))

    def _thaw(self, world: World, state: OldState) -> World:
        """old.py run's `finally`: serve again, tell the successor to leave, close the channel."""
        new = world.new
        if new is not None and new.end:
            if len(new.inbox) < self._scenario.room:
                new = new._replace(inbox=(*new.inbox, ("declined", 0)), eof=True)
            elif self._rules.kill_the_untold:
                new = GONE
            else:
                new = new._replace(eof=True)
        elif new is not None:
            new = new._replace(eof=True)
        # A new attempt is a new OldSide, which begins in `serving`.
        state = state if state in ENDING_STATES else OldState.SERVING
        old = world.old._replace(
            state=state, at=At.SEE_OFF, logging=False, todo=0, out=(), inbox=(), ear=(), listens=False, deaf=False, end=False
        )
        return world._replace(old=old, new=new)

    def _over(self, world: World) -> World:
        """old.py run, `_over.set()`: who waited in `tell` goes on."""
        stages, seen = list(world.stages), world.seen
        for number, stage in enumerate(stages):
            if stage is Stage.SEALED:
                stages[number] = Stage.KEPT
                world = self._answer(world, 1 << number)
            elif stage is Stage.TAKEN:
                stages[number] = Stage.KEPT
                seen |= 1 << number
            elif stage is Stage.GONE:
                stages[number] = Stage.CLOSING
        new = world.new if world.new is not None and world.new.up else None
        return world._replace(old=world.old._replace(at=At.IDLE), new=new, stages=tuple(stages), seen=seen)
