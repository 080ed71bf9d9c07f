"""Updates of the kernel: the set of finalized sessions goes through a kexec (`succession/kernel`), and clients are told in time.

Happy path: `prepare` tells the clients that asked, preserves what is finalized while everybody is served, and waits for open sessions
until its deadline; `freeze`, the reboot; in the next kernel `begin` with what arrived.

Unhappy paths:
1. A session can't travel: `prepare` is refused and names it, unless whoever asks leaves it behind. One that is finalized later ends the
   preparation.
2. The kernel refuses, somebody cancels, or the reboot fails: everything is unpreserved, `reason` says why, and luod serves as before.
3. Whoever froze luod ends without a reboot: as 2.
4. A prepared session ends: it is unpreserved before its client is answered. One that is finalized is added.
5. This process is told to end before the reboot: `end` freezes it, and what the kernel is to carry is given to somebody else.
6. A process upgrade while something is preserved, or the other way round: refused, for the kernel's sessions end with this process.

Invariants: outside of `frozen` every client is served as ever, but that nobody can open a session while an update is prepared. The set
that is frozen is the set that the index names. Threads that touch `Cargo` or `Hold` take turns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio

from luod.changes import Change, Departure, Retrieval, Sealing
from luod.custody import Custody
from luod.gate import Gate
from luod.lifecycle import SessionState
from luod.preflight import UNREADABLE, cannot, impossible, opaque, report, told
from luod.session import Session
from luod.succession.kernel import Arrival, Cargo, Hold
from luod.succession.kernel_table import UpdateEvent, UpdateState, step
from luod.succession.liveupdate import Kept, LiveUpdateFault, Opening
from luod.succession.messages import LastUpdate
from luod.succession.parcel import MAX_NAMED, VERSION, Index, Shipped
from luod.system import System
from luod_protocol import messages as m
from luod_protocol.box import BoxFault
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import duplicate
from luod_protocol.version import RELEASE

MAX_DEADLINE_S: Final = 86_400.0
MAX_REASON: Final = 500
"""Characters that are kept of a reason."""

_LOOKING: Final = (m.Capabilities, m.List, m.Show)

log = logging.getLogger("luod")


class Host(Protocol):
    """What updates need of the server."""

    custody: Custody
    gate: Gate
    generation: int

    @property
    def is_handing_over(self) -> bool: ...

    @property
    def at_work(self) -> int: ...

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None: ...

    def tell_monitors(self, event: str, detail: str) -> None: ...

    def tell_clients(self, notice: m.Notice) -> None: ...


class Updates:
    """See the module's text.

    Args:
        host: the server.
        opening: opens /dev/liveupdate.
    """

    def __init__(self, *, host: Host, opening: Opening) -> None:
        self.state = UpdateState.NORMAL
        self._host: Final = host
        self._cargo: Final = Cargo(opening)
        self._hold = Hold({})
        self._turn = trio.Lock()
        self._changed = trio.Event()
        self._undone = trio.Event()
        self._stepped = trio.Event()
        self._waits_until = 0.0
        self._scope: trio.CancelScope | None = None
        self._reason = ""
        self._deadline = 0.0
        self._left: set[bytes] = set()
        self._forced = False
        self._left_behind: tuple[str, ...] = ()
        self._frozen_by: object = None
        self._arrived = 0
        self._lost: tuple[str, ...] = ()
        self._steps_us: dict[str, int] = {}
        self._serving_since_us = 0

    # ----------------------------------------------------------------------------------------------- after an update

    def begin(self, arrival: Arrival, steps_us: dict[str, int]) -> None:
        """Begin as the next kernel's luod. The sessions are in custody already.

        Args:
            steps_us: what each step took so far.
        """
        self.state = step(UpdateState.FROZEN, UpdateEvent.KEXEC)
        self._hold = arrival.hold
        self._arrived, self._lost = len(arrival.sessions), arrival.lost
        self._left_behind = arrival.index.left_behind
        self._steps_us = steps_us
        self._serving_since_us = self._host.custody.system.monotonic_us()
        if not len(self._hold):
            self._step(UpdateEvent.LET_GO)

    @property
    def last(self) -> LastUpdate | None:
        """What a successor is told of the update that brought the host to this kernel; None without one."""
        if not self._steps_us:
            return None
        return LastUpdate(arrived=self._arrived, lost=self._lost, left_behind=self._left_behind, steps_us=self._steps_us)

    def inherit(self, last: LastUpdate) -> None:
        """Tell of it as the predecessor did. The kernel's sessions ended with that; their memory is in the boxes."""
        self._arrived, self._lost, self._left_behind, self._steps_us = last.arrived, last.lost, last.left_behind, last.steps_us

    # ------------------------------------------------------------------------------------------------ asking and answering

    async def answer(self, request: m.Update | m.Preflight | m.Prepare | m.Freeze | m.CancelUpdate, connection: object) -> m.Reply:
        """Do what `request`, which came on `connection`, asks.

        Raises:
            Refusal: see each.
        """
        match request:
            case m.Update():
                return self.status(request.seq)
            case m.Preflight():
                return await report(self._host.custody, request.seq)
            case m.Prepare():
                return self.prepare(request)
            case m.Freeze():
                return self.freeze(request.seq, connection)
            case m.CancelUpdate():
                return await self.cancel(request)

    def status(self, seq: int) -> m.UpdateStatus:
        """Where the update is."""
        return m.UpdateStatus(
            seq=seq,
            state=self.state,
            reason=self._reason,
            deadline=self._deadline,
            carried=len(self._cargo),
            carried_fds=self._cargo.files,
            left_behind=self._left_behind,
            arrived=self._arrived,
            lost=self._lost,
            steps_us=self._steps_us,
        )

    def admit(self, request: m.Request) -> None:
        """Refuse a request that must wait for the end of an update."""
        if self.state is UpdateState.FROZEN and not isinstance(request, _LOOKING):
            raise Refusal(Code.UPDATE_RUNNING, "the machine goes to another kernel this moment: ask again after it")
        if isinstance(request, m.Open) and self.is_running:
            raise Refusal(
                Code.UPDATE_RUNNING,
                "an update of the kernel is prepared, which a new session could not be part of: open it after the update (`luoctl status` "
                "tells; `luoctl cancel` gives the update up)",
            )

    @property
    def is_running(self) -> bool:
        """Whether the kernel holds, or is to hold, something of this luod for the next."""
        return self.state not in (UpdateState.NORMAL, UpdateState.UPDATED)

    def refuse_upgrade(self) -> None:
        """Refuse to be replaced while the kernel holds something that would end with this process.

        Raises:
            Refusal: unhappy path 6.
        """
        if self.is_running:
            raise Refusal(Code.UPDATE_RUNNING, f"an update of the kernel is {self.state}: `luoctl cancel` first, or reboot first")

    # ------------------------------------------------------------------------------------------------------- preparing

    def prepare(self, request: m.Prepare) -> m.UpdateStatus:
        """Begin to prepare.

        Raises:
            Refusal: unhappy path 1 or 6, or one is being prepared already.
        """
        if not 0 <= request.deadline_s <= MAX_DEADLINE_S:
            raise Refusal(Code.BAD_REQUEST, f"a deadline of {request.deadline_s:g} s: it must be 0 to {MAX_DEADLINE_S:g}")
        if self.is_running:
            raise Refusal(Code.UPDATE_RUNNING, f"an update of the kernel is {self.state} already: `luoctl cancel` gives it up")
        if self._host.is_handing_over:
            raise Refusal(Code.UPGRADE_RUNNING, "luod is being replaced: wait for the end of that")
        custody = self._host.custody
        sessions = [each for each in custody.store if each.sealed is not None]
        wanted = set(request.leave_behind)
        named = {each.session_id for each in custody.store if wanted & {each.name, each.session_id.hex()}}
        unknown = wanted - {text for each in custody.store for text in (each.name, each.session_id.hex())}
        if unknown:
            raise Refusal(Code.NO_SUCH_SESSION, f"there is no session {sorted(unknown)[0][:64]!r} to leave behind: `luoctl list`")
        if custody.carriable.fault:
            raise Refusal(Code.CANNOT_SURVIVE, f"this kernel carries nothing to the next: {custody.carriable.fault}")
        excluded = cannot(custody, (each for each in sessions if each.session_id not in named))
        if excluded and not request.force:
            texts = [f"{told(each)}: {excluded[each.session_id]}" for each in sessions if each.session_id in excluded]
            more = f", and {len(texts) - 5} more" if len(texts) > 5 else ""
            raise Refusal(
                Code.CANNOT_SURVIVE,
                f"can't travel: {'. '.join(texts[:5])}{more}. Finish or discard them, or leave them behind, where they end with the kernel "
                "(--leave-behind SESSION, or --force for all)",
            )
        for text in opaque(custody) if not request.force else ():
            raise Refusal(Code.CANNOT_SURVIVE, f"luod holds {text}: {UNREADABLE}, or say --force")
        fault = impossible(custody, (each for each in sessions if each.session_id not in named | excluded.keys()))
        if fault:
            raise Refusal(Code.CANNOT_SURVIVE, fault)
        self._left, self._forced = named | excluded.keys(), request.force
        self._reason, self._lost, self._arrived, self._steps_us = "", (), 0, {}
        self._deadline = custody.system.now() + request.deadline_s
        self._step(UpdateEvent.PREPARE)
        self._note_left()
        self._host.tell_clients(m.Notice(seq=0, what="prepare", deadline=self._deadline))
        self._host.start_soon(lambda: self._prepare(request.deadline_s))
        return self.status(request.seq)

    async def _prepare(self, patience_s: float) -> None:
        self._waits_until = trio.current_time() + patience_s
        with trio.CancelScope() as self._scope:
            try:
                await self._in_turn(self._hold.let_all_go)
                while True:
                    await self._settle_down()
                    changed = self._changed
                    self._step(UpdateEvent.ALL_PRESERVED)
                    await changed.wait()
                    if self.state is not UpdateState.PREPARED:
                        await trio.sleep_forever()
                    self._step(UpdateEvent.SET_CHANGED)
            except (LiveUpdateFault, BoxFault, OSError, Refusal) as error:
                if self.state is UpdateState.PREPARING:
                    self._step(UpdateEvent.FAILED)
                    await self._undo(f"it failed: {error}")

    async def _settle_down(self) -> None:
        """Return when all that travels is preserved, and nobody's session is waited for."""
        while True:
            self._changed = trio.Event()
            sessions = [each for each in self._host.custody.store if each.sealed is not None and each.session_id not in self._left]
            session = next((each for each in sessions if each.session_id not in self._cargo), None)
            if session is not None:
                await self._load(session)
            elif self._open_sessions() and trio.current_time() < self._waits_until:
                with trio.move_on_at(self._waits_until):
                    await self._changed.wait()
            else:
                self._note_left()
                return

    async def _load(self, session: Session) -> None:
        why = cannot(self._host.custody, [session]).get(session.session_id)
        if why and self._forced:
            self._left.add(session.session_id)
            return
        if why:
            raise Refusal(Code.CANNOT_SURVIVE, f"{told(session)} was finalized and can't travel: {why}")
        async with self._turn:
            if session.sealed is None:
                return
            with duplicate(session.sealed.box.fileno()) as sealed:
                try:
                    await trio.to_thread.run_sync(self._cargo.load, session, sealed.fileno())
                except LiveUpdateFault as error:
                    raise LiveUpdateFault(f"{told(session)}: {error}", error.errno) from None

    def _open_sessions(self) -> list[Session]:
        return [each for each in self._host.custody.store if each.state is SessionState.OPEN and each.session_id not in self._left]

    def _note_left(self) -> None:
        left = [told(each) for each in self._host.custody.store if each.session_id not in self._cargo and self._is_left(each)]
        more = [*([f"and {len(left) - MAX_NAMED} more"] if len(left) > MAX_NAMED else []), *opaque(self._host.custody)]
        self._left_behind = (*left[:MAX_NAMED], *more)

    def _is_left(self, session: Session) -> bool:
        return session.session_id in self._left or session.state is SessionState.OPEN

    async def _in_turn(self, work: Callable[[], object]) -> None:
        async with self._turn:
            await trio.to_thread.run_sync(work)

    # ----------------------------------------------------------------------------------------------------- while prepared

    async def follow(self, changes: Sequence[Change]) -> None:
        """The set has changed: before the reply."""
        for change in changes:
            match change:
                case Sealing():
                    self._changed.set()
                case Departure(session_id=session_id):
                    await self._departed(session_id)
                case Retrieval(session_id=session_id):
                    if self._serving_since_us and session_id in self._hold and "first-retrieve" not in self._steps_us:
                        self._steps_us["first-retrieve"] = self._host.custody.system.monotonic_us() - self._serving_since_us

    async def _departed(self, session_id: bytes) -> None:
        if self.is_running:
            await self._in_turn(lambda: self._cargo.drop(session_id))
            self._changed.set()
        elif session_id in self._hold:
            await self._in_turn(lambda: self._hold.let_go(session_id))
            if self.state is UpdateState.UPDATED and not len(self._hold):
                self._step(UpdateEvent.LET_GO)

    def left(self, connection: object) -> None:
        """A connection has ended, and with it perhaps an open session, or the reason for being frozen."""
        self._changed.set()
        if self.state is UpdateState.FROZEN and connection is self._frozen_by:
            self._step(UpdateEvent.THAW)
            self._host.start_soon(lambda: self._undo("whoever froze luod for the reboot ended without one"))

    def freeze(self, seq: int, connection: object) -> m.UpdateStatus:
        """Let nothing change any more, and have the kernel carry the index. The connection is the caller's, who reboots.

        Raises:
            Refusal: not everything is prepared (ask again), or the kernel refuses.
        """
        if self.state is not UpdateState.PREPARED:
            raise Refusal(Code.OUT_OF_ORDER, f"an update is {self.state}, it must be prepared: `luoctl prepare`, and wait until it is")
        if self._changed.is_set() or self._host.at_work > 1:
            raise Refusal(Code.UPDATE_RUNNING, "requests are under way that may change what travels: ask again")
        self._freeze(connection)
        return self.status(seq)

    def _freeze(self, by: object) -> None:
        custody = self._host.custody

        def index(sessions: tuple[Shipped, ...]) -> Index:
            return Index(
                version=VERSION,
                luod=RELEASE,
                generation=self._host.generation,
                sessions=sessions,
                ended=tuple(custody.store.all_ended),
                left_behind=self._left_behind,
                frozen_at=custody.system.now(),
            )

        self._note_left()
        try:
            self._cargo.seal(index)
        except (LiveUpdateFault, OSError) as error:
            raise Refusal(Code.SYSTEM_ERROR, f"luod can't be frozen: {error}") from None
        self._step(UpdateEvent.FREEZE)
        self._frozen_by = by

    @property
    def is_prepared(self) -> bool:
        """Whether an update is prepared, or about to be."""
        return self.state in (UpdateState.PREPARING, UpdateState.PREPARED)

    @property
    def has_what_travels(self) -> bool:
        """Whether one could be prepared that carries something."""
        custody, is_free = self._host.custody, not self.is_running and not self._host.is_handing_over
        return is_free and any(each.sealed is not None for each in custody.store) and not custody.carriable.fault

    async def end(self) -> list[Kept]:
        """Freeze, and prepare before if it isn't done: this process is about to end. Nobody is served from here on. Cancelled, or refused:
        the gate may be closed, and the update be running.

        Returns:
            The kernel sessions (borrowed), that of the index first, as `Passed` has them.

        Raises:
            Refusal: the kernel refuses something.
        """
        if not self.is_running:
            self.prepare(m.Prepare(seq=0, deadline_s=0.0, leave_behind=(), force=True))
        self._waits_until = trio.current_time()
        if self.state is UpdateState.PREPARING:
            self._changed.set()
        while True:
            while self.state is UpdateState.PREPARING:
                await self._stepped.wait()
            if self.state is not UpdateState.PREPARED:
                raise Refusal(Code.CANNOT_SURVIVE, f"the update was given up: {self._reason}")
            self._host.gate.close()
            await self._host.gate.still()
            if self.state is UpdateState.PREPARED and not self._changed.is_set():
                self._freeze(self)
                return self._cargo.sessions
            self._host.gate.open()

    async def cancel(self, request: m.CancelUpdate) -> m.UpdateStatus:
        """Undo everything; return when that is done.

        Raises:
            Refusal: there is no update.
        """
        if self.state is UpdateState.UNDOING:
            await self._undone.wait()
        elif not self.is_running:
            raise Refusal(Code.OUT_OF_ORDER, "no update of the kernel is prepared")
        else:
            self._step(UpdateEvent.CANCEL)
            await self._undo(request.reason[:MAX_REASON] or "it was cancelled")
        return self.status(request.seq)

    async def _undo(self, reason: str) -> None:
        # Shielded: half of it must not stay, for a next update would find the memfds preserved.
        with trio.CancelScope(shield=True):
            self._undone = trio.Event()
            if self._scope is not None:
                self._scope.cancel()
            self._reason, self._frozen_by, self._deadline, self._left_behind = reason, None, 0.0, ()
            log.warning("the update of the kernel was given up: %s", reason)
            await self._in_turn(self._cargo.close)
            self._step(UpdateEvent.UNDONE)
            self._undone.set()
            self._host.tell_clients(m.Notice(seq=0, what="cancelled", deadline=0.0))

    def _step(self, event: UpdateEvent) -> None:
        self.state = step(self.state, event)
        self._stepped.set()
        self._stepped = trio.Event()
        self._host.custody.carriable.rests = self.state is UpdateState.FROZEN
        self._host.tell_monitors("update", self.state)


def steps_us(frozen_at: float, began_us: int, system: System) -> dict[str, int]:
    """What each step of an update took, in microseconds, for a luod that is about to serve.

    `kernel` is from the last luod's freeze, right before the reboot, to the beginning of this kernel's time, of which the clock only
    tells the second; `boot` from there to this process, `start` from there to `began_us`, when it began to look for sessions, and
    `adopt` from there to now.
    """
    now_us = system.monotonic_us()
    process_us = system.process(system.pid).start * 1_000_000 // os.sysconf("SC_CLK_TCK")
    zero = system.now() - now_us / 1e6
    kernel_us = max(0, round((zero - frozen_at) * 1e6))
    return {"kernel": kernel_us, "boot": process_us, "start": began_us - process_us, "adopt": now_us - began_us}
