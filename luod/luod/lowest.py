"""The lowest descriptors are luod's own, for ever: no client's fd ever has one of these numbers.

Why: `succession.spawn` leaves all descriptors behind but those below 3, and the kernel copies them in words of 64 (fs/file.c, dup_fd)
before it closes what was copied too much. A client's fd among them could hang there.

Happy path: at the start `lift` what was passed to this process, then `occupy`.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

STANDARD: Final = 3
"""Descriptors below this are standard input, output and error."""

WORD: Final = 64
"""How many the kernel copies at once: BITS_PER_LONG, or 32."""


def lift(fd: int) -> int:
    """Move an owned descriptor up, out of the way. Close-on-exec."""
    lifted = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, WORD)
    os.close(fd)
    return lifted


def occupy() -> None:
    """Put something of luod's own where nothing is yet."""
    # Standard input, output and error may have been closed by whoever started luod; those are inherited.
    while not all(map(is_open, range(STANDARD))):
        os.open(os.devnull, os.O_RDWR)
    while (fd := os.dup(0)) < WORD:
        pass
    os.close(fd)


def is_open(fd: int) -> bool:
    """Whether there is such a descriptor."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True
