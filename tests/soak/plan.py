"""What a session of the soak holds. All of it follows from the session's id, so whoever meets the session knows what must be in it."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from typing import Final

import attrs

from luod_protocol.records import EntryInfo, SessionInfo

ID_BYTES: Final = 16
NAMES: Final = 600
"""Session names; so few that some are taken."""
LARGE: Final = 300
"""Entries of a large session: more than one box takes."""


class Kind(enum.StrEnum):
    """What an entry is; `peer` says whether somebody outside can see it close."""

    MEMFD = "memfd"
    EVENTFD = "eventfd"
    WRITE_END = "write-end"
    READ_END = "read-end"
    SOCKET = "socket"
    LISTENER = "listener"

    @property
    def kind(self) -> str:
        """As luod calls it."""
        return {Kind.WRITE_END: "pipe", Kind.READ_END: "pipe", Kind.LISTENER: "socket"}.get(self, self.value)

    @property
    def has_peer(self) -> bool:
        """Whether it has another end, which sees it close."""
        return self not in (Kind.MEMFD, Kind.EVENTFD)


@attrs.frozen(kw_only=True)
class Entry:
    """One entry.

    Attributes:
        content: bytes in the memfd, in the pipe, unread in the socket, or sent on the connection that waits.
        number: the eventfd's counter, or the memfd's position.
        seals: of a memfd, added when it is made.
        sealed: seals that finalize adds.
        kept: else it is taken out again before finalize.
    """

    name: str
    kind: Kind
    content: bytes
    number: int
    seals: tuple[str, ...]
    sealed: tuple[str, ...]
    metadata: bytes
    needs: tuple[str, ...]
    kept: bool


@attrs.frozen(kw_only=True)
class Plan:
    """A session: its entries in the order in which they are preserved."""

    session_id: bytes
    name: str
    metadata: bytes
    entries: tuple[Entry, ...]

    @property
    def kept(self) -> dict[str, Entry]:
        """What is in it when it is finalized, in order."""
        return {entry.name: entry for entry in self.entries if entry.kept}


def is_large(session_id: bytes) -> bool:
    """Whether a session with this id has many entries, which an ordinary user's luod may have no room for."""
    return session_id[0] < 2


def plan(session_id: bytes) -> Plan:
    """What the session with this id holds."""
    dice = random.Random(session_id)
    name = f"guest-{dice.randrange(NAMES)}"
    if is_large(session_id):
        entries = [_memfd(dice, f"memfd-{number}", 40) for number in range(LARGE)]
    else:
        entries = [_entry(dice, number) for number in range(dice.choice((0, 1, 1, 2, 3, 4, 6)))]
    with_needs: list[Entry] = []
    for entry in entries:
        earlier = [each.name for each in with_needs[:20] if each.kept]  # needs may not go round in a circle
        with_needs.append(attrs.evolve(entry, needs=tuple(dice.sample(earlier, min(len(earlier), dice.randrange(3))))))
    return Plan(
        session_id=session_id,
        name=name,
        metadata=dice.randbytes(dice.choice((0, 20, 3000))),
        entries=tuple(with_needs),
    )


def _entry(dice: random.Random, number: int) -> Entry:
    kind = dice.choice(tuple(Kind))
    name = f"{kind}-{number}"
    if kind is Kind.MEMFD:
        return _memfd(dice, name, dice.choice((0, 100, 5000, 70_000)))
    content = b"" if kind in (Kind.EVENTFD, Kind.WRITE_END) else dice.randbytes(dice.randrange(1, 300))
    return Entry(
        name=name,
        kind=kind,
        content=content,
        number=dice.randrange(1 << 40) if kind is Kind.EVENTFD else 0,
        seals=(),
        sealed=(),
        metadata=dice.randbytes(dice.randrange(30)),
        needs=(),
        kept=dice.random() < 0.8,
    )


def _memfd(dice: random.Random, name: str, size: int) -> Entry:
    return Entry(
        name=name,
        kind=Kind.MEMFD,
        content=dice.randbytes(size),
        number=dice.randrange(size + 1),
        seals=tuple(dice.sample(("grow", "shrink", "write"), dice.randrange(3))),
        sealed=tuple(dice.sample(("grow", "shrink", "write", "future-write"), dice.choice((0, 0, 2)))),
        metadata=b"of " + name.encode(),
        needs=(),
        kept=dice.random() < 0.9,
    )


def fault(expected: Plan, info: SessionInfo, metadata: bytes, entries: Sequence[EntryInfo]) -> str:
    """What isn't right in luod's description of a finalized session; empty when all is."""
    if (info.session_id, info.session) != (expected.session_id, expected.name):
        return f"it is {info.session!r}, not {expected.name!r}"
    if metadata != expected.metadata:
        return f"its metadata are {metadata[:40]!r}, not {expected.metadata[:40]!r}"
    kept = expected.kept
    if [entry.name for entry in entries] != list(kept):
        return f"its entries are {[entry.name for entry in entries]}, not {list(kept)}"
    for entry in entries:
        there = kept[entry.name]
        was = (there.kind.kind, there.needs, there.metadata)
        # Its maker has put the inode number behind the metadata.
        now = (entry.kind, entry.needs, entry.metadata[: len(there.metadata)])
        if now != was:
            return f"entry {entry.name} is {now}, not {was}"
    return ""
