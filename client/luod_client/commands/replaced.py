"""Waiting for an upgrade with the process that is to be replaced in view.

Theory. A connection can wait where nobody answers: in the backlog of a socket that the service manager holds, of a luod that has just died.
A manager that waits for `luoctl upgrade` before it starts luod again would wait for ever. So who knows the process says so, and when that
has ended no answer may be far: the successor has one ready.

Happy path: `watching(pid)`; the answer comes; `gone()` returns when the process has ended, as it does when the upgrade is through.

Unhappy path: the process ends and no answer comes within `ANSWER_S`: whatever waits in the main thread raises `Disconnected`.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from luod_protocol.errors import Code, Disconnected, Refusal
from luod_protocol.fds import OwnedFd, own

ANSWER_S: Final = 5.0
"""How long after the end of the old luod its successor may take to answer, in seconds."""

GONE_S: Final = 30.0
"""How long after the answer the old luod may take to end, in seconds: it waits for the service manager."""


@contextmanager
def watching(pid: int) -> Generator[Callable[[], None]]:
    """In the block, the main thread waits for an answer of the luod with this pid, or of its successor. For the main thread.

    Yields:
        `gone()`: after the answer, return when the process has ended.

    Raises:
        Refusal: there is no such process, or it doesn't end.
        Disconnected: the unhappy path.
    """
    try:
        process = OwnedFd(os.pidfd_open(pid))
    except OSError as error:
        raise Refusal(Code.UPGRADE_FAILED, f"there is no luod with process {pid}: {error.strerror}") from None
    main = threading.get_ident()
    over, tell_over = own(os.pipe2(os.O_CLOEXEC))

    def watch() -> None:
        if over.fileno() not in _readable([process.fileno(), over.fileno()], None) and not _readable([over.fileno()], ANSWER_S):
            signal.pthread_kill(main, signal.SIGUSR1)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Disconnected(f"luod (process {pid}) has ended, and no luod answers: see its messages")

    def gone() -> None:
        tell_over.close()
        watcher.join()
        if not _readable([process.fileno()], GONE_S):
            raise Refusal(Code.UPGRADE_FAILED, f"the successor serves, but the old luod (process {pid}) has not ended within {GONE_S:g} s")

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        yield gone
    finally:
        tell_over.close()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
        over.close()
        process.close()


def _readable(fds: list[int], limit_s: float | None) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if limit_s is None else limit_s * 1000)}
