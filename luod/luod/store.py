"""The sessions of a daemon: found by id, and by owner and name; and which ended, so that a repeated finish can be answered.

Beside them, boxes of sessions that can't be read here (succession/opaque): nobody finds those.

Invariants: both indexes hold the same sessions; a session is in them from open to its end. Of those that ended the last
`MAX_REMEMBERED` are known by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from luod.manifest import Manifest
from luod.session import Session
from luod.system import Process
from luod_protocol.fds import OwnedFd

MAX_REMEMBERED: Final = 4096
"""Ended sessions that are known by id."""


@attrs.frozen(kw_only=True)
class Ended:
    """A finalized session that is gone: `finished` by a claimer, else discarded."""

    session_id: bytes
    owner: int
    finished: bool


@attrs.define(kw_only=True, eq=False)
class Opaque:
    """The box of a preserved session that isn't one here. `stored` is what the service manager calls it, empty when it doesn't hold it;
    `fds` how many the box says it holds. `foreign` is whether it is of a version of something that isn't known here.

    Either `why` says what is in the way, or there is a `manifest`, and it is still to be decided.
    """

    box: OwnedFd
    stored: str
    fds: int = 0
    manifest: Manifest | None = None
    foreign: bool = False
    why: str = ""


class Store:
    """The sessions, and the memory of ended ones.

    Attributes:
        opaque: what is kept without being understood.
        retrieved: who has retrieved from sessions that are none here, by their ids: what is remembered for those in `opaque`.
    """

    def __init__(self) -> None:
        self.opaque: list[Opaque] = []
        self.retrieved: dict[bytes, set[Process]] = {}
        self._by_id: dict[bytes, Session] = {}
        self._by_name: dict[tuple[int, str], Session] = {}
        self._ended: dict[bytes, Ended] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, session: Session) -> None:
        """Put a session in."""
        self._by_id[session.session_id] = session
        self._by_name[session.owner, session.name] = session

    def remove(self, session: Session) -> None:
        """Take a session out."""
        del self._by_id[session.session_id]
        del self._by_name[session.owner, session.name]

    def by_id(self, session_id: bytes) -> Session | None:
        """The session with this id."""
        return self._by_id.get(session_id)

    def by_name(self, owner: int, name: str) -> Session | None:
        """The owner's session with this name."""
        return self._by_name.get((owner, name))

    def remember(self, ended: Ended) -> None:
        """Remember that a finalized session ended; the oldest is forgotten beyond `MAX_REMEMBERED`."""
        self._ended[ended.session_id] = ended
        if len(self._ended) > MAX_REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def ended(self, session_id: bytes) -> Ended | None:
        """How the session with this id ended, if that is remembered."""
        return self._ended.get(session_id)

    def note_retrieval(self, session_id: bytes, process: Process) -> None:
        """A process has fds of a session, here or in a box that can't be read."""
        session = self.by_id(session_id)
        if session is not None:
            session.retrieved_by.add(process)
        elif self.opaque:
            self.retrieved.setdefault(session_id, set()).add(process)

    @property
    def all_ended(self) -> Iterable[Ended]:
        """What is remembered, oldest first."""
        return list(self._ended.values())
