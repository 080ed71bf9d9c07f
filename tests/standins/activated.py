"""A command with fds as a service manager passes them, sd_listen_fds(3): `activated.py NAME=FD,... COMMAND...`."""

from __future__ import annotations

import fcntl
import os
import sys
from typing import Final

FIRST: Final = 3
ABOVE: Final = 100
"""Where what is passed can't be overwritten by what is put into its place."""

if __name__ == "__main__":
    passed = dict(each.split("=") for each in sys.argv[1].split(",") if each)
    moved = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, ABOVE) for fd in passed.values()]
    for fd in passed.values():
        os.close(int(fd))
    for place, number in enumerate(moved, FIRST):
        os.dup2(number, place)
    told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(moved)), "LISTEN_FDNAMES": ":".join(passed)}
    os.execve(sys.argv[2], sys.argv[2:], {**os.environ, **told})
