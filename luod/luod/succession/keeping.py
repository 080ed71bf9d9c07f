"""The succession by the service manager: what is finalized lies in its store before the client is told, and what ended doesn't any more.

Theory. The box of each finalized session is in the manager's store (`fdstore`), and so is a ledger of what boxes can't tell (`ledger`). A
luod that crashes, or is restarted, is followed by one that gets both back at its start (`adoption`). While a luod lives the store is never
read: luod knows what it put there. Only the service's main process is listened to, so a successor begins when its predecessor is gone.

Happy path: `begin`; then `keep` before `finalized` is answered, `forget` before `finished`, `note_retrieval` before fds are given out.

Unhappy paths:
1. The unit has no store: `begin` finds out, `fault` says so; sessions survive what they would survive without a manager.
2. The store is full: `keep` refuses, the session is open as before.
3. The manager doesn't answer: refused, and undone behind it. A box whose removal isn't certain is put back.
4. The manager is gone: `fault` says so from then on, as in 1. What it held is gone with it.
5. luod dies between the ledger's word that a session ends and its removal: the next one ends it. Nobody was told otherwise.

Invariants: a session for which `finalized` was answered with `daemon-crash` is in the store; one that was answered with `finished` isn't.
"""

from __future__ import annotations

import heapq
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

import trio

from luod import survival
from luod import unit as units
from luod.notify import SYSTEMD, Manager, ManagerFault, ManagerGone, ManagerInfo
from luod.store import Ended, Store
from luod.succession import ledger, relay
from luod.succession.fdstore import FdStore, NotKept
from luod.succession.ledger import Ending, Ledger, LedgerFault, Record, Retrieval, Staying, Successor
from luod.survival import Outlook
from luod.system import Process
from luod_protocol.errors import Code, Refusal

SPARE_NAMES: Final = 1024
"""How far below the highest number free ones are looked for; there can be many."""

log = logging.getLogger("luod")

_BOX: Final = re.compile(r"b(\d{1,18})")


class _Names:
    """Names for boxes. They say nothing and are short, because all of them must fit one variable (`fdstore`): the box itself says what it
    is. The lowest number that is free is taken."""

    def __init__(self, taken: Iterable[str]) -> None:
        numbers = {int(found[1]) for name in taken if (found := _BOX.fullmatch(name))}
        self._next = max(numbers, default=-1) + 1
        self._free = [number for number in range(min(self._next, len(numbers) + SPARE_NAMES)) if number not in numbers]
        heapq.heapify(self._free)

    def take(self) -> str:
        if self._free:
            return f"b{heapq.heappop(self._free)}"
        self._next += 1
        return f"b{self._next - 1}"

    def give_back(self, name: str) -> None:
        heapq.heappush(self._free, int(name[1:]))


async def secure(info: ManagerInfo, stored: Collection[str], sessions: Mapping[int, int]) -> Sequence[str]:
    """Have the manager hold kernel sessions that this luod has retrieved itself, until it holds boxes: it may crash in between.

    Args:
        info: the manager.
        stored: what it holds already.
        sessions: fds (borrowed), by number; see `relay`.

    Returns:
        What they are called there.
    """
    manager = Manager(info)
    store, names = FdStore(manager, stored, is_heard=True), [relay.name(relay.FORMER, number) for number in sessions]
    try:
        for name, fd in zip(names, sessions.values(), strict=True):
            await store.put(name, fd)
    except (NotKept, ManagerFault) as error:
        log.warning("a crash of luod before it serves would cost what the last kernel brought: %s", error)
    finally:
        manager.close()
    return [name for name in names if name in store.names]


class Keeper:
    """What one luod has its manager keep.

    Args:
        manager: the manager; owned.
        generation: of this luod.
        store: its sessions, and what ended.
        unit: which unit of systemd luod is in; empty where that isn't known.

    Attributes:
        ready: set when it is known whether anything can be kept.
        fault: why nothing can; empty when it can.
        gone: whether the manager is gone.
    """

    def __init__(self, *, manager: Manager, generation: int, store: Store, unit: str = "") -> None:
        self.manager: Final = manager
        self.ready = trio.Event()
        self.fault = ""
        self.gone = False
        self._generation: Final = generation
        self._sessions: Final = store
        self._fds = FdStore(manager, ())
        self._names = _Names(())
        self._others: set[str] = set()
        self._ledger: Ledger | None = None
        self._leaving: dict[bytes, Ended] = {}
        self._has_successor = False
        self._unit: Final = unit
        self._keeps_over_stops: bool | None = None

    @property
    def count(self) -> int:
        """How many fds luod has in the manager's store."""
        return self._fds.count

    @property
    def others(self) -> tuple[str, ...]:
        """What is stored and is no session's box: for a successor."""
        return tuple(self._others)

    def inherit(self, others: Collection[str]) -> None:
        """Be told what is in the manager's store and is no session's box, before it is time to begin: a successor may come first."""
        self._others = set(others)

    def outlook(self) -> Outlook:
        """What sessions survive with this manager."""
        if self.fault:
            return survival.not_kept(self.fault)
        return survival.kept(restarts=self.manager.info.name == SYSTEMD, stops=self._keeps_over_stops)

    async def begin(self, *, others: Collection[str], leaving: Collection[str], is_main: bool, spent: Collection[str] = ()) -> None:
        """Begin to keep: a ledger of this luod's own, and every session that isn't in the store yet.

        Args:
            others: what is in the manager's store and is no session's box, by name.
            leaving: those of them that are to be removed, when the new ledger is there.
            is_main: whether the manager started this process; else it has to be seen that it listens.
            spent: those of them that are to be removed when all sessions are in the store.
        """
        stored = {session.stored for session in self._sessions if session.stored}
        self._names = _Names(stored.union(others))
        self._fds = FdStore(self.manager, stored.union(others), is_heard=is_main)
        # What was opaque to a predecessor may be a session now.
        self._others = set(others) - stored
        if self._unit and self.manager.info.name == SYSTEMD:
            self._keeps_over_stops = await units.keeps_store(self._unit)
        try:
            await self._begin_ledger()
            for name in leaving:
                await self._fds.remove(name)
                self._others.discard(name)
            for session in self._sessions:
                if session.sealed is not None and not session.stored:
                    session.stored = await self._put(session.sealed.box.fileno())
            for opaque in self._sessions.opaque:
                if not opaque.stored:
                    opaque.stored = await self._put(opaque.box.fileno())
                    self._others.add(opaque.stored)
            for name in spent:
                await self._fds.remove(name)
                self._others.discard(name)
        except ManagerGone as error:
            self.lose(error)
        except (NotKept, ManagerFault, LedgerFault) as error:
            if not stored:
                self.fault = str(error)
            log.error("the service manager does not keep all that it should, which a crash of luod may cost: %s", error)
        finally:
            self.ready.set()

    async def _begin_ledger(self) -> None:
        # What happens while it is being stored is written into it already.
        self._ledger = Ledger(self._what_matters())
        name = ledger.name(self._generation)
        await self._fds.put(name, self._ledger.memfd.fileno())
        self._others.add(name)

    def _what_matters(self) -> Iterator[Record]:
        yield from (Ending(ended=each) for each in (*self._sessions.all_ended, *self._leaving.values()))
        for session in self._sessions:
            yield from (Retrieval(session_id=session.session_id, process=process) for process in session.retrieved_by)
        for session_id, processes in self._sessions.retrieved.items():
            yield from (Retrieval(session_id=session_id, process=process) for process in processes)
        if self._has_successor:
            yield Successor(generation=self._generation + 1)

    async def _put(self, box: int) -> str:
        name = self._names.take()
        try:
            await self._fds.put(name, box)
        except BaseException:
            self._names.give_back(name)
            raise
        return name

    async def keep(self, box: int) -> str:
        """Have the manager keep a borrowed box. Cancelled: it may or may not.

        Returns:
            What it is called there; empty only where the unit has no store.

        Raises:
            Refusal: unhappy paths 2 and 3.
        """
        await self.ready.wait()
        if self.fault:
            return ""
        try:
            return await self._put(box)
        except ManagerGone as error:
            self.lose(error)
            return ""
        except NotKept as error:
            why = f"the session can't be kept over a crash: {error}; it is still open. Finish or discard sessions, or raise the limit"
            raise Refusal(Code.LIMIT_REACHED, why) from None
        except ManagerFault as error:
            raise Refusal(Code.SYSTEM_ERROR, f"the session can't be kept over a crash: {error}; it is still open, try again") from None

    async def forget(self, ended: Ended, box: int, stored: str) -> None:
        """Have the manager let go of a session that is about to end. Cancelled: the next luod ends it.

        Args:
            box: borrowed.
            stored: what it is called in the manager's store; empty when it isn't there.

        The caller ends the session as soon as this has returned, without a checkpoint in between.

        Raises:
            Refusal: unhappy path 3; nothing has changed.
        """
        await self.ready.wait()
        self._leaving[ended.session_id] = ended
        try:
            self._write(Ending(ended=ended))
            if stored:
                await self._fds.remove(stored)
                self._names.give_back(stored)
        except ManagerGone as error:
            self.lose(error)
        except ManagerFault as error:
            await self._stay(ended.session_id, box, stored)
            raise Refusal(Code.SYSTEM_ERROR, f"the session is as it was: {error}; try again") from None
        finally:
            del self._leaving[ended.session_id]

    async def relay(self, fds: Sequence[int], boot_id: str) -> None:
        """Have the manager hold kernel sessions (borrowed), the index first: all or none. Cancelled: it may hold some.

        Raises:
            NotKept, ManagerFault: it doesn't.
        """
        await self.ready.wait()
        put: list[str] = []
        try:
            for number, fd in enumerate(fds):
                put.append(relay.name(boot_id, number))
                await self._fds.put(put[-1], fd)
        except (NotKept, ManagerFault):
            with suppress(ManagerFault):
                for name in put:
                    await self._fds.remove(name)
            raise

    def lose(self, error: ManagerGone) -> None:
        """Go on without the manager, which is gone."""
        if not self.gone:
            log.error("sessions will not survive a crash of luod any more: %s", error)
        self.gone, self.fault = True, str(error)

    async def _stay(self, session_id: bytes, box: int, stored: str) -> None:
        try:
            self._write(Staying(session_id=session_id))
            await self._fds.restore(stored, box)
        except (Refusal, ManagerFault) as error:
            log.error("session %s may not survive a crash of luod any more: %s", session_id.hex(), error)

    async def note_retrieval(self, session_id: bytes, process: Process) -> None:
        """Write down that a process is about to get fds of a session, when there is where to. No checkpoint when there is.

        Raises:
            Refusal: it can't be written.
        """
        if not self.ready.is_set():
            await self.ready.wait()
        self._write(Retrieval(session_id=session_id, process=process))

    def note_successor(self) -> None:
        """Write down that a successor may serve from now on. If it dies before its own ledger is kept, the next luod counts on from it."""
        self._has_successor = True
        try:
            self._write(Successor(generation=self._generation + 1))
        except Refusal as error:
            log.error("after a crash two luods may count as generation %d: %s", self._generation + 1, error)

    def _write(self, record: Record) -> None:
        if self._ledger is None:
            return
        try:
            if self._ledger.is_long:
                self._ledger.begin_anew(self._what_matters())
            self._ledger.write(record)
        except LedgerFault as error:
            raise Refusal(Code.SYSTEM_ERROR, str(error)) from None

    def close(self) -> None:
        """Keep nothing more; what the manager has it keeps."""
        self.manager.close()
        if self._ledger is not None:
            self._ledger.close()
