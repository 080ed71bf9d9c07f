"""Upgrades of this daemon: who may ask for one, one at a time, and what follows.

Happy path: `start` (a successor is spawned) or `admit` (one that asks comes in), then a handover (`succession/old`), then `replaced`.

Unhappy paths:
1. This process can't be replaced: it is PID 1, or the main process of a unit whose manager it can't tell. Refused.
2. The one that asks is of another user, or outside of the service's cgroup, where the manager would not accept it. Refused.
3. An upgrade fails: whoever asked is told why; everything else goes on.

Invariants: one upgrade at a time. Once `replaced` is set this process touches no client any more and exits at once. A service manager knows
the successor as the main process before it is set: systemd ends the whole unit with its main process.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import trio

from luod.changes import Change
from luod.config import HandoverTable
from luod.connection import Connection
from luod.notify import SYSTEMD, started_by_systemd
from luod.succession.channel import Channel
from luod.succession.old import HandoverFailed, OldSide
from luod.succession.old import Host as HandingOver
from luod.succession.other import peer_pidfd
from luod.succession.spawn import spawn
from luod_protocol.connection import refused
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd

INIT: Final = 1

log = logging.getLogger("luod")


class Host(HandingOver, Protocol):
    """What upgrades need of the server."""

    def waiting_for_upgrade(self) -> Iterable[Connection]: ...


class Upgrades:
    """See the module's text.

    Args:
        host: the server.
        options: command-line options that a successor gets.
        bounds: how long each step may take.
    """

    def __init__(self, *, host: Host, options: Sequence[str], bounds: HandoverTable) -> None:
        self.replaced = trio.Event()
        """Set when a successor serves: this process must end now."""
        self._host: Final = host
        self._options: Final = options
        self._bounds: Final = bounds
        self._running: OldSide | None = None

    @property
    def is_running(self) -> bool:
        """Whether one is under way."""
        return self._running is not None

    def start(self, program: str) -> None:
        """Start a successor, `program` or (when empty) this installation, and hand over to it.

        Raises:
            Refusal: one is running, unhappy path 1, or the successor can't be started.
        """
        self._refuse_impossible()
        if program and (not os.path.isabs(program) or "\0" in program):
            raise Refusal(Code.BAD_REQUEST, f"the successor's program must be an absolute path, not {program!r:.100}")
        ours, theirs = _handover_pair()
        with theirs:
            try:
                successor = spawn(program, self._options, theirs.fileno())
            except BaseException:
                ours.close()
                raise
        self._hand_over(ours, successor)

    def admit(self, connection: Connection) -> OwnedFd:
        """Hand over to the process that asks. Returns its end of the handover socket, owned by the caller.

        Raises:
            Refusal: one is running, or unhappy paths 1 and 2.
        """
        self._refuse_impossible()
        asking, system = connection.client, self._host.system
        if asking.uid != system.uid:
            raise Refusal(
                Code.NOT_PERMITTED,
                f"a successor runs as uid {system.uid} like this luod, not as uid {asking.uid}: start it so",
            )
        manager = self._host.manager
        if manager is not None and (manager.name != SYSTEMD or system.cgroup(asking.process.pid) != system.cgroup(system.pid)):
            raise Refusal(
                Code.NOT_PERMITTED,
                f"this luod is a service, and {manager.name} would not accept a process from outside in its place: "
                "use `systemctl reload luod` or `luoctl upgrade`",
            )
        successor = peer_pidfd(connection.raw, asking.process.pid)
        ours, theirs = _handover_pair()
        self._hand_over(ours, successor)
        return OwnedFd(theirs.detach())

    def _refuse_impossible(self) -> None:
        if self._running is not None:
            raise Refusal(Code.UPGRADE_RUNNING, "an upgrade is under way: wait for its end")
        pid = self._host.system.pid
        if pid == INIT:
            raise Refusal(
                Code.UPGRADE_FAILED,
                "this luod is process 1 of its container, with which everything ends: it can't be replaced; run `luod --supervised` there",
            )
        if self._host.manager is None and started_by_systemd(os.environ, pid):
            raise Refusal(
                Code.UPGRADE_FAILED,
                "systemd started this luod and would end the unit with it: its unit needs Type=notify and NotifyAccess=main, as "
                "systemd/luod.service has",
            )

    def _hand_over(self, sock: socket.socket, successor: OwnedFd) -> None:
        self._running = OldSide(host=self._host, channel=Channel(sock), successor=successor, bounds=self._bounds)
        running = self._running
        self._host.start_soon(lambda: self._run(running))

    async def _run(self, running: OldSide) -> None:
        host = self._host
        host.tell_monitors("upgrading", f"generation {host.generation}")
        try:
            await running.run()
        except HandoverFailed as failure:
            reason = f"{failure}{running.fate}"
            log.error("upgrade failed, generation %d goes on serving: %s", host.generation, reason)
            host.tell_monitors("upgrade-failed", reason)
            for connection in list(host.waiting_for_upgrade()):
                message = f"the upgrade failed, generation {host.generation} goes on serving: {reason}"
                connection.answer_upgrade(refused(connection.upgrade_seq, Refusal(Code.UPGRADE_FAILED, message)))
        else:
            self.replaced.set()
        finally:
            self._running = None

    async def tell(self, changes: Sequence[Change]) -> None:
        """Tell a successor that is being handed over to, before the reply."""
        if self._running is not None and changes:
            await self._running.tell(changes)

    async def stop(self) -> None:
        """Before this daemon ends: give a running upgrade up, or wait until it is through."""
        if self._running is not None:
            await self._running.stop()


def _handover_pair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise Refusal(Code.SYSTEM_ERROR, f"luod can't make a handover socket: {error.strerror}; try again") from None
