"""The daemon's processes: starting one, and finding those that it left.

A process is the daemon's when its environment names the parent's socket: a successor inherits it. So an orphan that came to the parent
for another reason (it may be PID 1 of a container, in which clients live too) is reaped, but never killed.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from typing import Final, NamedTuple, NoReturn

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""

CANNOT_EXECUTE: Final = 127

_OURS: Final = (
    "FDSTORE",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LUOD_SUPERVISOR",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)
"""Variables that a manager sets for the process that it starts. Those that the parent was given are not the daemon's."""


class Given(NamedTuple):
    """What the daemon is started with. `watchdog_us` is in microseconds, 0: none; `limit` is how much can be stored."""

    address: str
    watchdog_us: int
    limit: int
    stored: Sequence[tuple[int, str]]


def environment(inherited: Mapping[str, str], given: Given, parent: int, pid: int) -> dict[str, str]:
    """The environment of the daemon with this pid: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3)."""
    env = {name: value for name, value in inherited.items() if name not in _OURS}
    env |= {"NOTIFY_SOCKET": given.address, "FDSTORE": str(given.limit), "LUOD_SUPERVISOR": str(parent)}
    if given.watchdog_us:
        env |= {"WATCHDOG_USEC": str(given.watchdog_us), "WATCHDOG_PID": str(pid)}
    if given.stored:
        names = ":".join(name for _, name in given.stored)
        env |= {"LISTEN_PID": str(pid), "LISTEN_FDS": str(len(given.stored)), "LISTEN_FDNAMES": names}
    return env


def start(command: Sequence[str], given: Given, handled: Sequence[int]) -> int:
    """Start `command` (a program's path and its arguments) with what is stored from descriptor 3 on. Returns its pid.

    fork and not posix_spawn: LISTEN_PID must be the child's own pid, which only the child knows before it executes. A thread of the
    parent that is alive then (a close that hangs) has no lock that the child needs: it waits in the kernel.

    Args:
        handled: signals that get their default back in the child. They are blocked until then, so that none is lost.

    Raises:
        OSError: no process can be made.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a thread is alive; see above
            pid = os.fork()
        if pid == 0:
            _become(command, given, parent, handled)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become(command: Sequence[str], given: Given, parent: int, handled: Sequence[int]) -> NoReturn:
    """In the child: place the descriptors and execute `command`. Never returns, never raises."""
    try:
        # Out of the way first: the number that one of them must get may be another's.
        above = FIRST_FD + len(given.stored)
        for place, fd in enumerate([fcntl(fd, F_DUPFD_CLOEXEC, above) for fd, _ in given.stored]):
            os.dup2(fd, FIRST_FD + place, inheritable=True)
        env = environment(os.environ, given, parent, os.getpid())
        signal.set_wakeup_fd(-1)
        for number in (*handled, signal.SIGPIPE, signal.SIGXFSZ):  # the last two: Python ignores them
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(command[0], list(command), env)
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"luod supervisor: {command[0]} can't be executed: {error}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(CANNOT_EXECUTE)


def _parent_of(pid: int) -> int:
    """The parent of a process, 0 when it can't be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # proc_pid_stat(5): the name, field 2, may contain anything but ends with the last ")"; then the state, then the parent.
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def descends(pid: int, ancestor: int) -> bool:
    """Whether `ancestor` is above `pid`."""
    seen: set[int] = set()
    while pid > 0 and pid not in seen:  # a chain that changes under our eyes could lead round
        seen.add(pid)
        pid = _parent_of(pid)
        if pid == ancestor:
            return True
    return False


def left(address: str) -> list[int]:
    """This process's living children that are the daemon's, by pid."""
    mark = f"NOTIFY_SOCKET={address}".encode()
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _parent_of(int(name)) == os.getpid():
            with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
    return found
