"""What each uid has of luod, and the limits that keep one uid from having it all.

Theory. Every session is charged to its owner, whoever opened it, and every connection to the uid at its other end. What a session costs is
read off the session itself (`cost`): whoever changes one says `charge`, which replaces what was charged before, so that nothing has to be
added and taken off in pairs. A verb asks `refuse_beyond` before it acts.

Happy path: `refuse_beyond`, the change, `charge`; at the session's end `release`.

Unhappy paths:
1. A uid is at its limit: `Refusal` with what it has, the limit, what to do, and the key that says so. Nobody else notices.
2. A uid has more than its limit, for what came from a predecessor is kept: it can't have more of that, and may go on with what it has.

Invariants: what a uid has is the sum over its sessions of what was charged last; the total is the sum over all uids; a uid that has nothing
isn't in the books. Root's and luod's own uid are counted and have no limit of their own: they may replace luod and its limits.

Requests under way need no count: a connection has one at a time, so there are as many as connections.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from luod.session import Session
from luod_protocol.errors import Code, Refusal


@attrs.frozen(kw_only=True)
class Share:
    """What one uid may have at most; `metadata_bytes` are those of its sessions' and entries' names, needs and metadata."""

    sessions: int
    connections: int
    preserved_fds: int
    staged_fds: int
    metadata_bytes: int


@attrs.frozen(kw_only=True)
class Cost:
    """What sessions cost: fds in boxes, fds of open sessions, bytes that their client chose."""

    sessions: int = 0
    preserved_fds: int = 0
    staged_fds: int = 0
    metadata_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            sessions=self.sessions + other.sessions,
            preserved_fds=self.preserved_fds + other.preserved_fds,
            staged_fds=self.staged_fds + other.staged_fds,
            metadata_bytes=self.metadata_bytes + other.metadata_bytes,
        )

    def __neg__(self) -> Cost:
        return Cost(
            sessions=-self.sessions,
            preserved_fds=-self.preserved_fds,
            staged_fds=-self.staged_fds,
            metadata_bytes=-self.metadata_bytes,
        )


NOTHING: Final = Cost()

_WORDS: Final = {
    "sessions": ("sessions", "finish or discard some"),
    "preserved_fds": ("fds in finalized sessions", "finish or discard some of them"),
    "staged_fds": ("fds in open sessions", "finalize what is complete, then go on"),
    "metadata_bytes": ("bytes of names, needs and metadata", "put them into memfds and preserve those, or finish some sessions"),
}


def cost(session: Session) -> Cost:
    """What this session costs now."""
    kept = session.sealed is not None
    return Cost(
        sessions=1,
        preserved_fds=session.size if kept or session.sealing else 0,
        staged_fds=0 if kept else session.size,
        metadata_bytes=len(session.name) + len(session.metadata) + session.weight,
    )


class Quota:
    """The books.

    Args:
        share: what each uid may have.
        exempt: uids without a limit.
    """

    def __init__(self, share: Share, exempt: Iterable[int]) -> None:
        self.total = NOTHING
        self._share = share
        self._exempt = frozenset(exempt)
        self._charged: dict[bytes, tuple[int, Cost]] = {}
        self._used: dict[int, Cost] = {}
        self._connections: dict[int, int] = {}

    def used(self, uid: int) -> Cost:
        """What the sessions of `uid` cost."""
        return self._used.get(uid, NOTHING)

    def charge(self, session: Session) -> None:
        """Charge a session that was opened, adopted or changed to its owner."""
        self.release(session)
        now = cost(session)
        self._charged[session.session_id] = (session.owner, now)
        self._add(session.owner, now)

    def release(self, session: Session) -> None:
        """A session is no more."""
        owner, before = self._charged.pop(session.session_id, (session.owner, NOTHING))
        self._add(owner, -before)

    def _add(self, uid: int, more: Cost) -> None:
        self.total += more
        now = self._used[uid] = self.used(uid) + more
        if now == NOTHING:
            del self._used[uid]

    def refuse_beyond(self, owner: int, more: Cost) -> None:
        """Refuse what would give `owner` more than its share.

        Raises:
            Refusal: limit-reached.
        """
        if owner in self._exempt:
            return
        used = self.used(owner)
        for key, (what, remedy) in _WORDS.items():
            limit: int = getattr(self._share, key)
            has, wanted = getattr(used, key), getattr(more, key)
            if wanted > 0 and has + wanted > limit:
                raise Refusal(
                    Code.LIMIT_REACHED,
                    f"uid {owner} has {has} {what}, with {wanted} more it would pass its limit of {limit}: {remedy}, "
                    f"or have limits.per_uid.max_{key} of luod's configuration raised",
                )

    # ---------------------------------------------------------------------------------------------------- connections

    def connections(self, uid: int) -> int:
        """How many connections `uid` has."""
        return self._connections.get(uid, 0)

    def connected(self, uid: int) -> None:
        """There is one more."""
        self._connections[uid] = self.connections(uid) + 1

    def disconnected(self, uid: int) -> None:
        """There is one less."""
        self._connections[uid] -= 1
        if not self._connections[uid]:
            del self._connections[uid]

    def too_many(self, uid: int) -> str:
        """Why `uid` can't have one more connection; empty when it can."""
        has = self.connections(uid)
        if uid in self._exempt or has < self._share.connections:
            return ""
        return (
            f"uid {uid} has {has} connections, its limit: end some of them, "
            "or have limits.per_uid.max_connections of luod's configuration raised"
        )
