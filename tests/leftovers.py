"""What a test leaves behind in the test process: descriptors, processes, and objects that were dropped instead of closed."""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

GRACE_S: Final = 1.0
"""A process that ends on its own within this was on its way out; a daemon isn't."""


def open_fds() -> dict[int, str]:
    """This process's descriptors, and what each refers to (proc(5))."""
    fds: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return fds


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def child_pids() -> set[int]:
    """The processes whose parent is this one."""
    if not _has_children():
        return set()
    children: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/stat", "rb") as file:
                # After the name, which may hold anything but ends with the last ")": state, ppid.
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    children.add(int(name))
    return children


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()


def _ends(pid: int, limit_s: float) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], limit_s)[0])
    finally:
        os.close(pidfd)


def _dropped() -> list[str]:
    """What garbage has to complain about when it is collected: with warnings as errors, that it was never closed."""
    complaints: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda trouble: complaints.append(f"{type(trouble.exc_value).__name__}: {trouble.exc_value}")
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before
    return complaints


class Watch:
    """The descriptors and children of this process as they are now, to compare with later."""

    def __init__(self) -> None:
        self._fds = open_fds()
        self._children = child_pids()

    def left_behind(self) -> list[str]:
        """What has come since, in words. Processes are killed and reaped, descriptors stay as they are."""
        left = _dropped() + self._processes()
        left += [f"fd {fd}: {what}" for fd, what in open_fds().items() if self._fds.get(fd) != what]
        return left

    def _processes(self) -> list[str]:
        left: list[str] = []
        deadline = time.monotonic() + GRACE_S
        while new := child_pids() - self._children:
            for pid in new:
                if not _ends(pid, max(0.0, deadline - time.monotonic())):
                    left.append(f"process {pid}: {_command(pid)}")
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return left


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raise TimeoutError in the main thread when the block takes longer."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
