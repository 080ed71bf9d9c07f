"""What messages are about: endpoints, entries, sessions, processes, limits. Version 1 of the wire."""

from __future__ import annotations

import enum
from typing import TypeAlias

import attrs


class Endpoint(enum.StrEnum):
    """The three sockets in the runtime directory; the value is the file's name."""

    SERIALIZE = "serialize"
    DESERIALIZE = "deserialize"
    CONTROL = "control"


Fact: TypeAlias = int | str
"""A thing recorded about a fd: sizes in bytes, flags and ids as integers, names as strings."""


@attrs.frozen(kw_only=True)
class EntrySpec:
    """One fd to preserve; the fd itself is at the same place in the packet's SCM_RIGHTS array."""

    name: str
    metadata: bytes = b""
    needs: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class EntryInfo:
    """One preserved fd, as luod sees it.

    `kind` is what the kernel says the fd is, `compatible` the version of luod's handler for it, `facts` what the handler recorded
    when the entry was preserved.
    """

    name: str
    kind: str
    compatible: str
    metadata: bytes
    needs: tuple[str, ...]
    facts: dict[str, Fact]


@attrs.frozen(kw_only=True)
class ProcessInfo:
    """A process that retrieved fds of a session; `alive` as of the answer."""

    pid: int
    alive: bool


@attrs.frozen(kw_only=True)
class SessionInfo:
    """One session. `state` is `open`, `preserved` or `claimed`; times are seconds since 1970, 0 for not yet.

    `claimed_by` is the claimer's pid (0: nobody), `survives` is empty while the session is open.
    """

    session_id: bytes
    session: str
    owner: int
    state: str
    entries: int
    opened_at: float
    finalized_at: float
    generation: int
    claimed_by: int
    retrieved_by: tuple[ProcessInfo, ...]
    survives: tuple[str, ...]


@attrs.frozen(kw_only=True)
class SortSurvival:
    """What a session of nothing but fds of one sort survives. A sort is a kind, or a part of one that a kernel may carry or not by itself
    (huge pages, the family of a socket). `kind` is empty for what luod never takes.

    `survives` maps each thing that may happen to the empty string for yes, else to the reason why not. `untried` names those of which
    it isn't known yet: the reason says when it will be.
    """

    sort: str
    kind: str
    survives: dict[str, str]
    untried: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Limits:
    """What this luod takes; units are in the names."""

    packet_bytes: int
    bulk_bytes: int
    fds_per_packet: int
    name_bytes: int
    metadata_bytes: int
    entries_per_session: int
    preserved_fds: int
