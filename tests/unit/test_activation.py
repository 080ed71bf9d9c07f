"""What a service manager passes at the start, tried with a real exec: the fds have the numbers from 3 on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from processes import folder_for
from things import memfd

CHILD = """
import os, sys
from luod import activation
environ = dict(os.environ, LISTEN_PID=str(os.getpid()) if sys.argv[1] == "mine" else "1")
passed = activation.take(environ, os.getpid())
inheritable = [fd for fd in range(3, 3 + int(sys.argv[2])) if os.path.exists(f"/proc/self/fd/{fd}") and os.get_inheritable(fd)]
stored = sorted((name, os.pread(fd.fileno(), 9, 0)) for name, fd in passed.stored)
left = [name for name in environ if name.startswith("LISTEN_")]
print([each.value for each in sorted(passed.listeners)], stored, passed.unknown, left, inheritable)
activation.close(passed)
"""


def passed(fds: Sequence[tuple[str, int]], *, count: str | None = None, whose: str = "mine") -> str:
    """What a process makes of `fds` that were passed to it under these names."""

    def at_three() -> None:
        copies = [os.dup(fd) for _, fd in fds]
        for number, copy in enumerate(copies, 200):
            os.dup2(copy, number)
        for number in range(len(fds)):
            os.dup2(200 + number, 3 + number, inheritable=True)

    environ = {**os.environ, "LISTEN_FDS": count or str(len(fds)), "LISTEN_FDNAMES": ":".join(name for name, _ in fds)}
    command = [sys.executable, "-P", "-W", "error", "-c", CHILD, whose, str(len(fds))]
    # No thread runs here, and nothing else than dup2 between fork and exec.
    done = subprocess.run(command, env=environ, preexec_fn=at_three, close_fds=False, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_listeners_and_what_was_stored() -> None:
    with folder_for() as folder, memfd(b"kept") as stored, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/serialize")
        listener.listen()
        fds = [("luod-a", stored.fileno()), ("serialize", listener.fileno())]
        assert passed(fds) == "['serialize'] [('luod-a', b'kept')] [] [] []"
        assert passed(fds[::-1]) == "['serialize'] [('luod-a', b'kept')] [] [] []"


def test_what_is_not_known_is_named_and_closed() -> None:
    with memfd() as other, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as idle, socket.socket(socket.AF_INET) as inet:
        # A socket that doesn't listen, or another kind of socket, is no endpoint; nor is a second one of the same name.
        fds = [("serialize", idle.fileno()), ("control", inet.fileno()), ("stored", other.fileno())]
        assert passed(fds) == "[] [] ['serialize', 'control', 'stored'] [] []"


def test_variables_of_another_process_mean_nothing() -> None:
    with memfd(b"kept") as stored:
        out = passed([("luod-a", stored.fileno())], whose="theirs")
        assert out.startswith("[] [] [] []"), out


def test_variables_that_make_no_sense() -> None:
    with memfd(b"kept") as stored:
        assert passed([("luod-a", stored.fileno())], count="many").startswith("[] [] [] []")
