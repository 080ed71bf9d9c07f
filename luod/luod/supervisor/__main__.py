"""The process that `luod --supervised` becomes."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from typing import Final, NoReturn

from luod.supervisor.channel import MAX_FDS, Channel
from luod.supervisor.command import parse
from luod.supervisor.kernel import adopt_orphans, same_file, say
from luod.supervisor.parent import Parent, Signals
from luod.supervisor.processes import FIRST_FD
from luod.supervisor.store import Store

HEADROOM_FDS: Final = MAX_FDS + 64
"""Descriptors beyond the stored ones: what one message brings, and the parent's own. A child needs each stored one twice for a moment."""


def main() -> NoReturn:
    """Supervise to the end. Exits with 0, or as a daemon that can't start."""
    order = parse(sys.argv[1:])
    try:
        limit = min(order.limit, _prepare())
        channel, signals = Channel(), Signals()
    except (OSError, ValueError) as error:
        say(f"can't start: {error}")
        os._exit(1)
    parent = Parent(order, channel, signals, Store(limit, same_file))
    # The kernel closes what is stored; a thread that hangs in a close must not be waited for.
    os._exit(parent.run())


def _prepare() -> int:
    """Make this process fit to be a parent, and PID 1. Returns how many descriptors it can store.

    Raises:
        OSError: it can't be made so.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) < FIRST_FD:
        os.set_inheritable(null, True)
    os.close(null)
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError("/proc is of another PID namespace: mount one for this (unshare --mount-proc does)")
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            if int(name) >= FIRST_FD:
                os.set_inheritable(int(name), False)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    adopt_orphans()
    files = os.sysconf("SC_OPEN_MAX")
    return max(0, (files - HEADROOM_FDS) // 2)


if __name__ == "__main__":
    main()
