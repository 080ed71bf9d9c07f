"""What the parent asks of the kernel and Python has no words for."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from luod_protocol.fds import OwnedFd

CLOSE_WAIT_S: Final = 0.05
"""How long a close is waited for, in seconds: nearly always it is then done before the next message is read."""

_PR_SET_CHILD_SUBREAPER: Final = 36
_F_DUPFD_QUERY: Final = 1027
"""Whether two descriptors are of one open file, Linux 6.10 (include/uapi/linux/fcntl.h)."""
_KCMP: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272, "loongarch64": 272, "ppc64": 354, "ppc64le": 354, "s390x": 343}
"""The number of kcmp(2) by machine, for processes of 64 bits."""
_KCMP_FILE: Final = 0

_libc: Final = ctypes.CDLL(None, use_errno=True)


def say(text: str) -> None:
    """Write a line to stderr, if somebody reads it: a parent that waits for its reader would wait with the guests' memory."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with suppress(OSError):
        if poll.poll(0) == [(2, select.POLLOUT)]:
            os.write(2, f"luod supervisor: {text}\n".encode("utf-8", "backslashreplace")[:4096])


def adopt_orphans() -> None:
    """Make this process the parent of every process below it whose parent dies, prctl(2).

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def same_file(first: int, second: int) -> bool:
    """Whether two borrowed descriptors are of one open file. False where the kernel doesn't say: one stored twice does no harm.

    kcmp(2) needs CONFIG_KCMP, and a container's seccomp filter may refuse it; F_DUPFD_QUERY needs Linux 6.10 and nobody refuses it.
    """
    with suppress(OSError):
        return fcntl.fcntl(first, _F_DUPFD_QUERY, second) == 1
    number = _KCMP.get(os.uname().machine)
    if number is None or sys.maxsize < 2**32:
        return False
    return bool(_libc.syscall(number, os.getpid(), os.getpid(), _KCMP_FILE, first, second) == 0)


def label(fd: int) -> str:
    """Something that is the same for two borrowed descriptors of one open file, without asking a file server (as fstat would).

    The link in proc(5): it names a socket or a pipe by its inode. A path can change, so all paths are one label.
    """
    link = os.readlink(f"/proc/self/fd/{fd}")
    return "/" if link.startswith("/") else link


def may_poll(label: str) -> bool:
    """Whether poll(2) of a descriptor with this label asks nobody who may not answer. What has a path may be a file server's."""
    return label != "/"


def is_pipe(fd: int) -> bool:
    """Whether the borrowed descriptor is a pipe, whose close never blocks; a barrier is one."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return False
    return True


def _close(numbers: list[int]) -> None:
    for number in numbers:
        try:
            os.close(number)
        except OSError as error:
            say(f"closing a descriptor said: {error.strerror}")


class Closer:
    """Closes descriptors, in threads where that can block (FUSE, vfio, a socket with such descriptors in flight)."""

    def __init__(self) -> None:
        self._unclosed: list[int] = []

    def close(self, fds: Iterable[OwnedFd]) -> None:
        """Close `fds`, those that are not closed or taken yet."""
        for fd in fds:
            if fd.closed:
                continue
            if is_pipe(fd.fileno()):
                _close([fd.take()])
            else:
                self._unclosed.append(fd.take())
        self.close_rest()

    def close_rest(self) -> None:
        """Close what could not be closed before, for want of a thread."""
        if not self._unclosed:
            return
        thread = threading.Thread(target=_close, args=(self._unclosed,), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            say(f"no thread can be started: {len(self._unclosed)} descriptors are closed later")
            return
        self._unclosed = []
        thread.join(CLOSE_WAIT_S)
