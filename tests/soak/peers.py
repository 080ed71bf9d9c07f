"""The other ends of what is preserved: they see when the last copy of an entry is closed, wherever that was."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Iterator

from luod_protocol.fds import OwnedFd
from soak.model import Breach, Violation


class Peers:
    """The other ends of all entries, by session and name. Owns them.

    Args:
        limit_s: how long an entry may be open somewhere after its end, in seconds.

    Attributes:
        ended: how many entries were seen to be closed.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._fds: dict[bytes, dict[str, OwnedFd]] = {}
        self._at: dict[int, tuple[bytes, str]] = {}
        self._leaving: dict[tuple[bytes, str], float] = {}
        self._poll = select.poll()
        self.ended = 0

    def add(self, session_id: bytes, name: str, fd: OwnedFd) -> None:
        """Watch an end, which is owned and moved."""
        self._fds.setdefault(session_id, {})[name] = fd
        self._at[fd.fileno()] = (session_id, name)
        self._poll.register(fd.fileno(), 0)

    def leave(self, session_id: bytes, names: Iterable[str] | None = None) -> None:
        """Expect these entries of a session, or all of them, to be closed everywhere soon."""
        there = self._fds.get(session_id, {})
        for name in list(there) if names is None else names:
            if name in there:
                self._leaving.setdefault((session_id, name), time.monotonic())

    def look(self, allowed: Callable[[bytes], bool]) -> Iterator[tuple[bytes, str]]:
        """Which entries that nobody expects to be closed are so. For others it is said once: `allowed` says for which it may happen."""
        for fd, _ in self._poll.poll(0):
            session_id, name = self._at[fd]
            if self._leaving.pop((session_id, name), None) is None:
                if not allowed(session_id):
                    yield session_id, name
                continue
            self._drop(session_id, name)

    def _drop(self, session_id: bytes, name: str) -> None:
        there = self._fds[session_id]
        with there.pop(name) as fd:
            self._poll.unregister(fd.fileno())
            del self._at[fd.fileno()]
        self.ended += 1
        if not there:
            del self._fds[session_id]

    def check(self, excused_since: float) -> None:
        """Complain of what is still open somewhere, though it should have been closed long ago.

        Args:
            excused_since: a luod that serves has been there since then, in seconds of CLOCK_MONOTONIC.
        """
        for (session_id, name), since in self._leaving.items():
            if time.monotonic() > max(since, excused_since) + self._limit_s:
                raise Violation(Breach.LEAKED, f"somebody has entry {name!r} open, {self._limit_s:g} s after its end", session_id)

    def __len__(self) -> int:
        return len(self._at)

    def close(self) -> None:
        """Watch no more."""
        for there in self._fds.values():
            for fd in there.values():
                fd.close()
        self._fds.clear()
