"""Start a successor: a fresh interpreter with the handover socket as its only inheritance.

A child gets a copy of all descriptors, and closes it when it executes its program; the parent waits for that (vfork(2)). Among them can be
one whose close never ends (`closing`). So the child is started by a thread that has no other descriptors: it leaves the process's table for
one of its own, into which none of them is copied (CLOSE_RANGE_UNSHARE of close_range(2); fs/file.c, dup_fd), so that none is closed.
`lowest` sees to it that among the lowest ones, which are copied all the same, there is none of a client's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Sequence
from typing import Final

from luod.interpreter import interpreter
from luod.lowest import STANDARD
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd

_CLOSE_RANGE: Final = 436
"""The number of close_range(2), the same on every machine."""
_CLOSE_RANGE_UNSHARE: Final = 2
_LAST: Final = 2**32 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def spawn(program: str, options: Sequence[str], handover: int) -> OwnedFd:
    """Start `program` (empty: this interpreter with `-m luod`) with `options` and the borrowed socket `handover`.

    Returns:
        A pidfd of the child, which the caller owns and reaps.

    Raises:
        Refusal: it can't be started.
    """
    command = [program] if program else [*interpreter(), "-m", "luod"]
    command += [*options, "--succeed-fd", str(STANDARD)]
    try:
        pid = _start_with(handover, command)
        try:
            return OwnedFd(os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    except (OSError, RuntimeError) as error:  # the latter: no thread
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise Refusal(Code.UPGRADE_FAILED, f"the successor {command[0]:.200} can't be started: {why}") from None


def _start_with(handover: int, command: list[str]) -> int:
    result: list[int | OSError] = []

    def start() -> None:
        try:
            if _libc.syscall(*map(ctypes.c_long, (_CLOSE_RANGE, STANDARD, _LAST, _CLOSE_RANGE_UNSHARE))):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            # What was standard input came along; from here on this table is the thread's own.
            os.dup2(0, STANDARD, inheritable=True)
            null = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            result.append(os.posix_spawn(command[0], command, os.environ, file_actions=null))
        except OSError as error:
            result.append(error)

    with OwnedFd(os.dup(0)) as standard_input:
        os.dup2(handover, 0, inheritable=False)
        try:
            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
        finally:
            os.dup2(standard_input.fileno(), 0)
    (started,) = result
    if isinstance(started, OSError):
        raise started
    return started
