"""The other process of a handover, seen through its pidfd: its end is awaited, and brought about when it doesn't come.

A successor that was told to leave, and a predecessor that has been replaced, hold copies of everything until they are gone.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from contextlib import suppress
from typing import Final

import trio

from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd

SO_PEERPIDFD: Final = 77
"""include/uapi/asm-generic/socket.h, Linux 6.5 and later."""

LOOK_S: Final = 0.05
"""How often a predecessor that takes long is looked at, in seconds."""

KILLED_S: Final = 2.0
"""How long a killed process may take to be gone, in seconds. One that hangs in the kernel isn't waited for any longer."""


def peer_pidfd(sock: socket.socket, pid: int) -> OwnedFd:
    """A pidfd of the process that connected `sock`, which has this pid and waits for an answer. The caller owns it.

    Raises:
        Refusal: it is gone.
    """
    try:
        return OwnedFd(struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, struct.calcsize("i")))[0])
    except OSError:
        # Before Linux 6.5: by pid, which is still that of the process that waits.
        try:
            return OwnedFd(os.pidfd_open(pid))
        except OSError as error:
            raise Refusal(Code.UPGRADE_FAILED, f"process {pid} can't be watched: {error.strerror}") from None


def kill(pidfd: int) -> None:
    """Kill the process of a borrowed pidfd, if it is there and may be killed."""
    with suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def left(pidfd: int, patience_s: float) -> bool:
    """Return when a predecessor (its pidfd, borrowed) is gone, or after `patience_s` seconds. Whether it is.

    It is gone, too, when only threads are left that hang in the kernel, closing what a client sent. Before it ended it closed all but that
    (`closing`); its pidfd would say so only when they end, which may be never.
    """
    with trio.move_on_after(patience_s):
        while True:
            with trio.move_on_after(LOOK_S):
                await trio.lowlevel.wait_readable(pidfd)
                return True
            if _only_threads_are_left(pidfd):
                return True
    return False


def _only_threads_are_left(pidfd: int) -> bool:
    # The pid in a pidfd's fdinfo (proc(5)) is -1 when the process is reaped: no other can have it before.
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
            pid = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]
        # The first descriptors are closed by nobody else: a process that was killed has them as long as one of its threads.
        left = (os.listdir(f"/proc/{pid}/task/{thread}/fd") for thread in os.listdir(f"/proc/{pid}/task") if int(thread) != pid)
        return state in (b"Z", b"X") and not any({"0", "1", "2"}.intersection(fds) for fds in left)
    except (OSError, ValueError):
        return False  # not to be seen: it has its time


async def see_off(pidfd: int, patience_s: float) -> bool:
    """Return when the process is gone. It is killed when it isn't within `patience_s` seconds.

    Args:
        pidfd: borrowed.

    Returns:
        Whether it had to be killed.
    """
    with trio.move_on_after(patience_s):
        await trio.lowlevel.wait_readable(pidfd)
        return False
    kill(pidfd)
    with trio.move_on_after(KILLED_S):
        await trio.lowlevel.wait_readable(pidfd)
    return True


def reap(pidfd: int) -> str:
    """Reap the process if it is a child that has ended. Returns how it ended, for a person; empty when there is nothing to say."""
    with suppress(ChildProcessError):
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        if ended is not None:
            how = "status" if ended.si_code == os.CLD_EXITED else "signal"
            return f" (it ended with {how} {ended.si_status})"
    return ""
