"""Start a successor: a fresh interpreter with the handover socket as its only inheritance."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from luod.interpreter import interpreter
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd


def spawn(program: str, options: Sequence[str], handover: int) -> OwnedFd:
    """Start `program` (empty: this interpreter with `-m luod`) with `options` and the borrowed socket `handover`.

    Returns:
        A pidfd of the child, which the caller owns and reaps.

    Raises:
        Refusal: it can't be started.
    """
    command = [program] if program else [*interpreter(), "-m", "luod"]
    inherited = os.dup(handover)
    try:
        os.set_inheritable(inherited, True)
        command += [*options, "--succeed-fd", str(inherited)]
        null = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=null)
        try:
            return OwnedFd(os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    except OSError as error:
        raise Refusal(Code.UPGRADE_FAILED, f"the successor {command[0]:.200} can't be started: {error.strerror}") from None
    finally:
        os.close(inherited)
