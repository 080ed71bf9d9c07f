"""What must exist while clients do what clients do: sessions, who has them, what they cost. It is told what was asked and says whether that
is granted; it knows nothing of luod's code but the names of its codes.

A `Life` is one session from open to its end. What waits for the service manager, or for a thread, is in `Life.waits`: nobody else can touch
the session until that is over.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import attrs

from luod_protocol.errors import Code

ALICE, BOB, OWN, ROOT = 1001, 1002, 1003, 0
EXEMPT: Final = (OWN, ROOT)
SHARED: Final = "shared"
"""A session of alice's with this name is bob's to take as well."""

Object = tuple[int, int]
"""A kernel object: device and inode."""


class Stage(enum.Enum):
    """Where a session is in its life."""

    OPEN = enum.auto()
    PRESERVED = enum.auto()
    CLAIMED = enum.auto()


class Wait(enum.Enum):
    """What the last request waits for."""

    NOTHING = enum.auto()
    SEALS = enum.auto()
    STORING = enum.auto()
    FINISH = enum.auto()
    DISCARD = enum.auto()


@attrs.frozen(kw_only=True)
class Part:
    """An entry. `is_memfd`: else it is the end to write of a pipe."""

    object: Object
    is_memfd: bool
    needs: tuple[str, ...]
    weight: int


@attrs.frozen(kw_only=True)
class Limits:
    """For one uid and, but for the weight, for all together."""

    sessions: int
    preserved: int
    staged: int
    weight: int = 0


@attrs.define(kw_only=True, eq=False)
class Life:
    """One session."""

    session_id: bytes
    name: str
    owner: int
    metadata: bytes
    parts: dict[str, Part] = attrs.Factory(dict[str, Part])
    stage: Stage = Stage.OPEN
    waits: Wait = Wait.NOTHING
    sealing: int = 0
    """How many entries a thread has duplicates of, to seal them."""
    takers: set[int] = attrs.Factory(set[int])
    """The processes that have retrieved from it."""

    @property
    def staged(self) -> int:
        """Its fds that are descriptors of luod's."""
        return len(self.parts) if self.stage is Stage.OPEN else 0

    @property
    def preserved(self) -> int:
        """Its fds that are, or are about to be, in a box."""
        return len(self.parts) if self.stage is not Stage.OPEN or self.waits is Wait.STORING else 0

    @property
    def weight(self) -> int:
        """The bytes that its client chose."""
        return len(self.name) + len(self.metadata) + sum(part.weight for part in self.parts.values())

    @property
    def descriptors(self) -> int:
        """How many descriptors luod has for it."""
        if self.stage is Stage.OPEN:
            return len(self.parts) + (1 if self.waits is Wait.STORING else 0) + self.sealing
        return 1


class Lives:
    """All sessions.

    Args:
        each: the limits of one uid.
        together: those of all.

    Attributes:
        ended: how those ended that were once finalized: whose they were, and whether they were finished.
        alive: processes that live.
        closing: how many fds wait to be closed.
        kept: whether sessions survive a crash.
    """

    def __init__(self, *, each: Limits, together: Limits) -> None:
        self.lives: dict[bytes, Life] = {}
        self.ended: dict[bytes, tuple[int, bool]] = {}
        self.alive: set[int] = set()
        self.closing = 0
        self.kept = False
        self._each = each
        self._together = together

    def of(self, uid: int | None = None) -> Sequence[Life]:
        """The sessions of a uid, or all."""
        return [life for life in self.lives.values() if uid in (None, life.owner)]

    def used(self, uid: int | None = None) -> Limits:
        """What they cost."""
        lives = self.of(uid)
        return Limits(
            sessions=len(lives),
            preserved=sum(life.preserved for life in lives),
            staged=sum(life.staged for life in lives),
            weight=sum(life.weight for life in lives),
        )

    @property
    def descriptors(self) -> int:
        """How many descriptors luod has for sessions."""
        return sum(life.descriptors for life in self.lives.values())

    def _beyond(self, owner: int, more: Limits) -> bool:
        has = self.used(owner)
        return owner not in EXEMPT and any(
            getattr(more, key) and getattr(has, key) + getattr(more, key) > getattr(self._each, key)
            for key in ("sessions", "preserved", "staged", "weight")
        )

    # ------------------------------------------------------------------------------- why a request isn't granted, or None

    def open(self, uid: int, owner: int, name: str, session_id: bytes, metadata: bytes) -> Code | None:
        """A session is to be opened."""
        if uid not in (ROOT, owner):
            return Code.NOT_PERMITTED
        more = Limits(sessions=1, preserved=0, staged=0, weight=len(name) + len(metadata))
        if self._beyond(owner, more) or len(self.lives) >= self._together.sessions:
            return Code.LIMIT_REACHED
        if any(life.name == name for life in self.of(owner)):
            return Code.SESSION_EXISTS
        return self._ended(uid, session_id) or (Code.SESSION_EXISTS if session_id in {*self.lives, *self.ended} else None)

    def preserve(self, life: Life, names: Sequence[str], weight: int) -> Code | None:
        """Entries are to be added, of this weight together."""
        if len(set(names)) != len(names):
            return Code.ENTRY_EXISTS
        more = Limits(sessions=0, preserved=0, staged=len(names), weight=weight)
        if self._beyond(life.owner, more) or self.used().staged + self.closing + len(names) > self._together.staged:
            return Code.LIMIT_REACHED
        return Code.ENTRY_EXISTS if set(names) & life.parts.keys() else None

    def unpreserve(self, life: Life, names: Sequence[str]) -> Code | None:
        """Entries are to be taken out."""
        if len(set(names)) != len(names):
            return Code.ENTRY_EXISTS
        return None if set(names) <= life.parts.keys() else Code.NO_SUCH_ENTRY

    def finalize(self, life: Life, seal: Collection[str], *, kept: bool) -> Code | None:
        """A session is to be finalized; `kept`: its client requires that it survives a crash."""
        if kept and not self.kept:
            return Code.CANNOT_SURVIVE
        if not set(seal) <= life.parts.keys():
            return Code.NO_SUCH_ENTRY
        if _goes_round({name: part.needs for name, part in life.parts.items()}):
            return Code.BAD_NEEDS
        return self.fits(life) or (None if all(life.parts[name].is_memfd for name in seal) else Code.BAD_SEAL)

    def fits(self, life: Life) -> Code | None:
        """Whether there is room for it in boxes."""
        more = Limits(sessions=0, preserved=len(life.parts), staged=0)
        if self._beyond(life.owner, more) or self.used().preserved + len(life.parts) > self._together.preserved:
            return Code.LIMIT_REACHED
        return None

    def finalize_again(self, uid: int, session_id: bytes) -> Code | None:
        """By a client without a session: it did not get the answer."""
        life = self.lives.get(session_id)
        if life is None or not self._may_see(uid, life):
            return self._ended(uid, session_id) or Code.NO_SUCH_SESSION
        return Code.OUT_OF_ORDER if life.stage is Stage.OPEN else None

    def finish_again(self, uid: int, session_id: bytes) -> Code | None:
        """By a client without a session: it did not get the answer."""
        if self._ended(uid, session_id) is not None and self.ended[session_id][1]:
            return None
        life = self.lives.get(session_id)
        if life is not None and self._may_see(uid, life):
            return Code.OUT_OF_ORDER
        return self._ended(uid, session_id) or Code.NO_SUCH_SESSION

    def find(self, uid: int, session_id: bytes) -> Code | None:
        """By its id."""
        life = self.lives.get(session_id)
        ended = self._ended(uid, session_id)
        return ended or (None if life is not None and self._may_see(uid, life) else Code.NO_SUCH_SESSION)

    def find_named(self, uid: int, owner: int, name: str) -> Code | None:
        """By its owner and name."""
        if not self._may_look(uid, owner):
            return Code.NOT_PERMITTED
        return None if any(life.name == name and self._may_see(uid, life) for life in self.of(owner)) else Code.NO_SUCH_SESSION

    def take(self, life: Life, process: int, *, force: bool) -> Code | None:
        """One that was found is to be claimed or discarded."""
        if life.stage is Stage.OPEN:
            return Code.OUT_OF_ORDER
        if life.waits is Wait.DISCARD or life.stage is Stage.CLAIMED:
            return Code.SESSION_CLAIMED
        return Code.STILL_HELD if life.takers & self.alive - {process} and not force else None

    def _ended(self, uid: int, session_id: bytes) -> Code | None:
        known = session_id in self.ended and self._may_look(uid, self.ended[session_id][0])
        return Code.SESSION_FINISHED if known else None

    def _may_look(self, uid: int, owner: int) -> bool:
        return uid in (ROOT, owner) or (uid, owner) == (BOB, ALICE)

    def _may_see(self, uid: int, life: Life) -> bool:
        return uid in (ROOT, life.owner) or (uid, life.owner, life.name) == (BOB, ALICE, SHARED)

    # -------------------------------------------------------------------------------------------------- what has happened

    def end(self, life: Life, *, finished: bool | None = None) -> None:
        """It is gone: finished, discarded, or (None) never finalized."""
        del self.lives[life.session_id]
        if finished is not None:
            self.ended[life.session_id] = (life.owner, finished)


def _goes_round(needs: Mapping[str, Collection[str]]) -> bool:
    """Whether something that is needed isn't there, or needs itself in the end: nothing is left when all that needs nothing is taken."""
    left = dict(needs)
    while free := [name for name, wanted in left.items() if not set(wanted) & left.keys() and set(wanted) <= needs.keys()]:
        for name in free:
            del left[name]
    return bool(left)
