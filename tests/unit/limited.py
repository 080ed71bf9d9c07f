"""A process at its RLIMIT_NOFILE. For processes of a test's own: it is no way to treat the test process."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count, islice


def is_open(fd: int) -> bool:
    """Whether this process has a descriptor of that number."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def open_fds() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd")) - 1


@contextmanager
def room_for(free: int) -> Generator[None]:
    """In the block, the process can have `free` more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (limit,) = islice((fd for fd in count() if not is_open(fd)), free, free + 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
