"""What the service manager passed to this process at its start: sd_listen_fds(3).

Theory. The fds from 3 on are ours when $LISTEN_PID is this process: listening sockets, by the names of the endpoints, and what an earlier
luod put into the manager's store. Each comes with a name; their order means nothing (systemd gives stored ones back in reverse).

Unhappy paths:
1. The variables are another process's, or make no sense: nothing was passed.
2. A name that luod doesn't know: a warning; the fd is closed here, the manager keeps its own.

Invariants: what was passed is owned and close-on-exec at once, and nobody that this process starts sees the variables.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from typing import Final

import attrs

from luod.lowest import lift
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.messages import Endpoint

FIRST: Final = 3
"""SD_LISTEN_FDS_START."""

STORED: Final = re.compile(r"b\d+|k[0-9a-f]+\.\d+|luod-.+")
"""Names of what luod puts into the store: boxes (succession/keeping), kernel sessions (succession/relay), a few things of its own."""

_ENDPOINTS: Final = {endpoint.value: endpoint for endpoint in Endpoint}


@attrs.frozen(kw_only=True)
class Passed:
    """What was passed, owned: listening sockets, what was stored, and what is neither, each with its name."""

    listeners: dict[Endpoint, socket.socket]
    stored: list[tuple[str, OwnedFd]]
    unknown: list[str]


def take(environ: MutableMapping[str, str], pid: int) -> Passed:
    """Take what was passed to the process `pid`, which is this one, out of `environ` and the fd table."""
    theirs = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "")
    passed = Passed(listeners={}, stored=[], unknown=[])
    if theirs != str(pid) or not count.isdecimal():
        return passed
    fds = [OwnedFd(lift(fd)) for fd in range(FIRST, FIRST + int(count))]
    for fd, name in zip(fds, [*names.split(":"), *[""] * len(fds)], strict=False):
        if STORED.fullmatch(name):
            passed.stored.append((name, fd))
        elif name in _ENDPOINTS and _ENDPOINTS[name] not in passed.listeners and _listens(fd):
            passed.listeners[_ENDPOINTS[name]] = socket.socket(fileno=fd.take())
        else:
            passed.unknown.append(name)
            fd.close()
    return passed


def _listens(fd: OwnedFd) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd.fileno())) as sock:
            right = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET
            return right and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def close(passed: Passed) -> None:
    """Close all of it: for a process that has no use for it."""
    close_all(fd for _, fd in passed.stored)
    for sock in passed.listeners.values():
        sock.close()
