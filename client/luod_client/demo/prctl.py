"""What prctl(2) is needed for here: that no process of the demo is ever left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Generator
from typing import Final

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


def _prctl(option: int, argument: object) -> None:
    # A handle of its own: ctypes shares the functions of the common one, and their types with it.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent, the process `parent`, dies. That outlives execve(2).

    Args:
        parent: its pid.
        number: the signal; a process with children that must not outlive it either needs one that it can act on.

    Raises:
        SystemExit: it is dead already.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        raise SystemExit("the process that started this one is gone")


@contextlib.contextmanager
def subreaper() -> Generator[None]:
    """For the time of the block, orphaned descendants become children of this process instead of pid 1's, so that it can wait for them."""
    before = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))
