"""The service manager, as luod talks to it: sd_notify(3), and who it is.

Theory. A manager that started luod gave it a datagram socket ($NOTIFY_SOCKET). What is sent there is taken in order, and only from the main
process of the service (NotifyAccess=main). The manager never answers; but a pipe's end that is sent with BARRIER=1 is closed once all that
was sent before has been taken, and that can be seen. systemd is one manager, `luod --supervised` is the other; luod makes no difference
between them, except in what it promises.

Happy path: `of_this_process` finds the manager at start; a successor is told by its predecessor. `tell`, `barrier`.

Unhappy paths:
1. The variables are another process's (they are inherited by whatever a service starts): there is no manager.
2. The manager can't be reached, or doesn't take what was sent within `ANSWER_S`: `ManagerFault`. What was sent may still be taken later.
3. The manager is gone (`luod --supervised` can be killed, systemd can't): `ManagerGone`, and nothing is kept any more.
4. A message is not permitted, or the store is full: nothing tells. Whoever must know finds it out (succession/fdstore).
5. luod has no descriptor for a barrier, or may send none (ETOOMANYREFS): it looks until the queue has been emptied. That is as good, only
   that nothing tells. A predecessor whose successor serves must not fail here.

Sources: sd_notify(3), sd_listen_fds(3), systemd.exec(5) on $SYSTEMD_EXEC_PID, sd_watchdog_enabled(3).
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Final

import attrs
import trio

from luod.inflight import insist, outstanding
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd, own

ANSWER_S: Final = 30.0
"""How long the manager may take for what it was sent, in seconds. systemd does nothing else while it reloads its units."""

LOOK_S: Final = 0.005
"""How long until it is looked again whether the manager has taken what it was sent, in seconds: no event tells."""

SYSTEMD: Final = "systemd"
SUPERVISOR: Final = "luod --supervised"


class ManagerFault(LuodError):
    """The service manager can't be told, or doesn't take what it was told."""


class NoDescriptors(ManagerFault):
    """No descriptor can be made or sent just now."""


class ManagerGone(ManagerFault):
    """There is no service manager any more."""


@attrs.frozen(kw_only=True)
class ManagerInfo:
    """Who the manager is, as a predecessor tells it to its successor.

    `watchdog_us` is within how many microseconds it wants a sign of life, 0 for never; `store_limit` how many fds it stores, 0 where it
    doesn't say (systemd before 254).
    """

    name: str
    address: str
    watchdog_us: int = 0
    store_limit: int = 0


def of_this_process(environ: Mapping[str, str], pid: int, parent: int) -> ManagerInfo | None:
    """The manager that started this process as a service's main process, or None.

    Args:
        environ: the environment.
        pid: this process.
        parent: its parent.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    supervised = environ.get("LUOD_SUPERVISOR") == str(parent)
    if not supervised and not started_by_systemd(environ, pid):
        return None
    watched = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
    return ManagerInfo(
        name=SUPERVISOR if supervised else SYSTEMD,
        address=address,
        watchdog_us=_number(environ.get("WATCHDOG_USEC")) if watched else 0,
        store_limit=_number(environ.get("FDSTORE")),
    )


def started_by_systemd(environ: Mapping[str, str], pid: int) -> bool:
    """Whether systemd started this very process: as the main process of a unit, of whatever type."""
    return str(pid) in {environ.get(each) for each in ("SYSTEMD_EXEC_PID", "WATCHDOG_PID", "LISTEN_PID")}


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


class Manager:
    """A way to tell the manager something."""

    def __init__(self, info: ManagerInfo) -> None:
        self.info: Final = info
        self._address: Final = "\0" + info.address[1:] if info.address.startswith("@") else info.address
        self._sock = trio.socket.from_stdlib_socket(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))

    async def tell(self, *fields: str, fds: Sequence[int] = ()) -> None:
        """Send one message with borrowed fds. Cancelled: it was not sent.

        Args:
            fields: `NAME=VALUE` each.

        Raises:
            ManagerFault: unhappy paths 2 and 3.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        try:
            with trio.fail_after(ANSWER_S):
                await insist(lambda: self._sock.sendmsg(["\n".join(fields).encode()], rights, socket.MSG_NOSIGNAL, self._address))
        except trio.TooSlowError:
            raise ManagerFault(f"{self.info.name} takes no messages: its queue was full for {ANSWER_S:g} s") from None
        except OSError as error:
            if self.info.name == SUPERVISOR and error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                raise ManagerGone(f"{self.info.name} was killed; start luod under a new one (`luod --supervised --takeover`)") from None
            kind = NoDescriptors if error.errno == errno.ETOOMANYREFS else ManagerFault
            raise kind(f"{self.info.name} can't be told ({self.info.address}): {error.strerror}") from None

    async def barrier(self) -> None:
        """Return when all that was told before has been taken.

        Raises:
            ManagerFault: unhappy paths 2 and 3.
        """
        with trio.move_on_after(ANSWER_S):
            try:
                await self._barrier()
            except NoDescriptors:
                await self._emptied()
            return
        raise ManagerFault(f"{self.info.name} did not take what it was sent within {ANSWER_S:g} s")

    async def _emptied(self) -> None:
        while True:
            if not outstanding(self._sock.fileno()):
                return
            await trio.sleep(LOOK_S)

    async def _barrier(self) -> None:
        ours, theirs = pipe()
        with ours:
            with theirs:
                await self.tell("BARRIER=1", fds=[theirs.fileno()])
            await trio.lowlevel.wait_readable(ours.fileno())

    def close(self) -> None:
        """Say no more."""
        self._sock.close()


def pipe() -> tuple[OwnedFd, OwnedFd]:
    """A pipe to see by when the manager lets go of the end to write, which is the second.

    Raises:
        NoDescriptors: luod has none for it.
    """
    try:
        read, write = own(os.pipe2(os.O_CLOEXEC))
    except OSError as error:
        raise NoDescriptors(f"luod can't make a pipe to ask the service manager with: {error.strerror}") from None
    return read, write


def hung_up(pipe: OwnedFd) -> bool:
    """Whether nobody has the other end of a pipe any more."""
    poll = select.poll()
    poll.register(pipe.fileno(), 0)
    return bool(poll.poll(0))
