"""luod's part with the service manager that watches it, if there is one: what it keeps of sessions, and what it is told of luod.

Theory. What the manager keeps is `succession.keeping`; here is what follows where there is no manager, and what sessions survive is made
known whenever that may have changed. The rest is sd_notify(3): READY=1 once this process is listened to, a sign of life in time, and in
words how luod is.

Happy path: `begin`, and `report` as a task; `keep` and `forget` for the verbs; at an upgrade `note_successor` and `announce`.

Unhappy paths:
1. There is no manager: nothing is kept, and nobody is told.
2. It can't be told: logged once, and tried again. READY=1 above all, for it ends a luod that never says so.
3. It is gone: `Keeper.lose`.

Invariants: it is told of changes once in `LEAST_S` at most, however many there are.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

import trio

from luod import survival
from luod.custody import Custody, Forgetting, Storing
from luod.lifecycle import SessionState
from luod.notify import SYSTEMD, Manager, ManagerFault, ManagerGone, ManagerInfo
from luod.succession.keeping import Keeper
from luod.system import Process

REPORT_S: Final = 10.0
"""How often the manager is told how luod is, in seconds; more often where its watchdog wants that."""

LEAST_S: Final = 1.0
"""How long until it is told of another change, in seconds; and until READY=1 is tried again."""

log = logging.getLogger("luod")


class Managing:
    """See the module's text.

    Args:
        info: the manager, None where there is none.
        custody: the sessions, and what they survive.
        generation: of this luod.
        unit: which unit of systemd it is in; empty where that isn't known.

    Attributes:
        keeper: what it keeps; None where there is none.
    """

    def __init__(self, info: ManagerInfo | None, custody: Custody, generation: int, unit: str = "") -> None:
        self._custody: Final = custody
        self._generation: Final = generation
        self.keeper: Final = None if info is None else Keeper(manager=Manager(info), generation=generation, store=custody.store, unit=unit)
        self._changed = trio.Event()
        self._complaint = ""
        if info is not None:
            # Until it is known: what the predecessor has found out.
            custody.outlook = survival.kept(restarts=info.name == SYSTEMD)

    @property
    def info(self) -> ManagerInfo | None:
        """The manager, if it is there."""
        return self.keeper.manager.info if self.keeper is not None and not self.keeper.gone else None

    @property
    def stored(self) -> int:
        """How many fds it keeps for luod."""
        return self.keeper.count if self.keeper is not None and not self.keeper.gone else 0

    @property
    def others(self) -> tuple[str, ...]:
        """What is in its store and is no session's box."""
        return self.keeper.others if self.keeper is not None else ()

    # -------------------------------------------------------------------------------------------------- what it keeps

    def inherit(self, others: Collection[str]) -> None:
        """As `Keeper.inherit`."""
        if self.keeper is not None:
            self.keeper.inherit(others)

    async def begin(self, *, others: Collection[str], leaving: Collection[str], is_main: bool, spent: Collection[str] = ()) -> None:
        """Have it keep what is finalized; see `Keeper.begin`."""
        if self.keeper is not None:
            await self.keeper.begin(others=others, leaving=leaving, is_main=is_main, spent=spent)
            self._custody.outlook = self.keeper.outlook()

    async def begun(self) -> None:
        """Return when it listens to this process, or it is known that it doesn't."""
        if self.keeper is not None:
            await self.keeper.ready.wait()

    async def perform(self, what: Storing | Forgetting) -> str:
        """Have it keep a box, or let go of one. Returns what it calls a box that it keeps; empty for none.

        Raises:
            Refusal: as `Keeper.keep` and `Keeper.forget`.
        """
        if self.keeper is None:
            return ""
        stored = ""
        match what:
            case Storing(box=box):
                stored = await self.keeper.keep(box)
            case Forgetting(ended=ended, box=box, stored=name):
                await self.keeper.forget(ended, box, name)
        self._custody.outlook = self.keeper.outlook()
        return stored

    async def note_retrieval(self, session_id: bytes, process: Process) -> None:
        """As `Keeper.note_retrieval`."""
        if self.keeper is not None:
            await self.keeper.note_retrieval(session_id, process)

    def note_successor(self) -> None:
        """A successor may serve from now on."""
        if self.keeper is not None:
            self.keeper.note_successor()

    # ------------------------------------------------------------------------------------------------ what it is told

    async def tell(self, *fields: str) -> bool:
        """Tell it, and go on if it can't be told. Whether it was told, or there is none."""
        if self.keeper is None or self.keeper.gone:
            return True
        try:
            await self.keeper.manager.tell(*fields)
        except ManagerGone as error:
            self.keeper.lose(error)
            self._custody.outlook = self.keeper.outlook()
            return False
        except ManagerFault as error:
            if str(error) != self._complaint:
                log.warning("%s", error)
            self._complaint = str(error)
            return False
        self._complaint = ""
        return True

    async def announce(self, pid: int) -> None:
        """Have it know the process `pid` as the service's main process.

        Raises:
            ManagerFault: it can't be told, or doesn't confirm.
        """
        if self.keeper is not None:
            await self.keeper.manager.tell(f"MAINPID={pid}")
            await self.keeper.manager.barrier()

    def note_change(self) -> None:
        """What is finalized has changed."""
        self._changed.set()

    async def report(self) -> None:
        """Tell it again and again how luod is. Returns when it is gone."""
        # A successor is listened to when its predecessor is gone.
        await self.begun()
        while not await self.tell("READY=1"):  # noqa: ASYNC110  no event tells that it can be told
            await trio.sleep(LEAST_S)
        while (info := self.info) is not None:
            self._changed = trio.Event()
            await self.tell("WATCHDOG=1", f"STATUS={self._in_words()}")
            watchdog_s = info.watchdog_us / 1e6
            with trio.move_on_after(min(REPORT_S, watchdog_s / 2) if watchdog_s else REPORT_S):
                await trio.sleep(LEAST_S)
                await self._changed.wait()

    def close(self) -> None:
        """Tell nothing more."""
        if self.keeper is not None:
            self.keeper.close()

    def _in_words(self) -> str:
        preserved = self._custody.count(SessionState.PRESERVED) + self._custody.count(SessionState.CLAIMED)
        return f"generation {self._generation}: {preserved} sessions preserved, {self._custody.preserved_fds} fds"
