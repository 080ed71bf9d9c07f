"""The sessions of a daemon: found by id, and by owner and name; and which ended, so that a repeated finish can be answered.

Invariants: both indexes hold the same sessions; a session is in them from open to its end. Of those that ended the last
`MAX_REMEMBERED` are known by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from luod.session import Session

MAX_REMEMBERED: Final = 4096
"""Ended sessions that are known by id."""


@attrs.frozen(kw_only=True)
class Ended:
    """A finalized session that is gone: `finished` by a claimer, else discarded."""

    session_id: bytes
    owner: int
    finished: bool


class Store:
    """The sessions, and the memory of ended ones."""

    def __init__(self) -> None:
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

    @property
    def all_ended(self) -> Iterable[Ended]:
        """What is remembered, oldest first."""
        return list(self._ended.values())
