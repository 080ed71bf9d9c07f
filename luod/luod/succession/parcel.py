"""What luod writes down for its successor in the next kernel: one parcel for each session, and the index of them all.

Theory. The kernel carries fds under tokens and tells nobody which kernel sessions there are. So each session's first kernel session
holds, as token 0, a memfd with its parcel: the manifest, and for each entry where its fd is. One kernel session with a fixed name holds
the index.

Unhappy paths:
1. A record of a newer version, or no record at all: `ParcelFault`. What the kernel holds under it is lost to this luod.

Invariants: an entry's fd may lie with another session, which *lent* it: the kernel takes a memfd once only, and clients share them.
"""

from __future__ import annotations

from typing import ClassVar, Final, TypeVar

import attrs

from luod.store import Ended
from luod_protocol.codec import Codec, as_map, unpack
from luod_protocol.errors import LuodError, ProtocolFault

VERSION: Final = 1
INDEX: Final = "luod-index"
PARCEL_TOKEN: Final = 0
"""Where a parcel, or the index, is in its kernel session. Entries come behind it."""

MAX_NAMED: Final = 64
"""Sessions that were left behind, as the index names them; of more only the number."""


class ParcelFault(LuodError):
    """What the last kernel brought can't be understood."""


@attrs.frozen(kw_only=True)
class Place:
    """Where an entry's fd is, and what the kernel doesn't bring along of it.

    `lender` is the id of the session that has it, empty for its own. `flags` is F_GETFL of fcntl(2), `position` the file position, in
    bytes, of an open file of its own, and `mode` st_mode's permissions; the last two only mean something for a memfd.
    """

    lender: bytes
    token: int
    flags: int
    position: int
    mode: int


@attrs.frozen(kw_only=True)
class Parcel:
    """A session: its manifest as it is in its box, and a place for each entry."""

    type: ClassVar[str] = "parcel"
    version: int
    manifest: bytes
    places: tuple[Place, ...]


@attrs.frozen(kw_only=True)
class Shipped:
    """A session in the index, and in how many kernel sessions it is."""

    session_id: bytes
    session: str
    owner: int
    parts: int


@attrs.frozen(kw_only=True)
class Index:
    """All of it: the generation that wrote it, what ended before, what was left behind, and when the reboot began, in seconds since
    1970."""

    type: ClassVar[str] = "index"
    version: int
    luod: str
    generation: int
    sessions: tuple[Shipped, ...]
    ended: tuple[Ended, ...]
    left_behind: tuple[str, ...]
    frozen_at: float


_T = TypeVar("_T", Parcel, Index)
_PARCELS: Final[Codec[Parcel]] = Codec((Parcel,))
_INDEXES: Final[Codec[Index]] = Codec((Index,))


def part_name(session_id: bytes, part: int) -> str:
    """What a session's kernel session number `part` is called: within 63 bytes."""
    return f"luod-{session_id.hex()}" + (f"-{part}" if part else "")


def encode(record: Parcel | Index) -> bytes:
    """The bytes of a record."""
    return _PARCELS.encode(record) if isinstance(record, Parcel) else _INDEXES.encode(record)


def decode_parcel(data: bytes) -> Parcel:
    """The parcel in `data`.

    Raises:
        ParcelFault: unhappy path 1.
    """
    return _decoded(_PARCELS, data)


def decode_index(data: bytes) -> Index:
    """The index in `data`.

    Raises:
        ParcelFault: unhappy path 1.
    """
    return _decoded(_INDEXES, data)


def _decoded(codec: Codec[_T], data: bytes) -> _T:
    try:
        version = as_map(unpack(data)).get("version")
        if type(version) is int and version > VERSION:
            raise ParcelFault(f"it is of version {version}, this luod knows {VERSION}: a newer luod wrote it")
        return codec.decode(data)
    except (ProtocolFault, TypeError) as error:
        raise ParcelFault(f"it can't be understood: {error}") from None
