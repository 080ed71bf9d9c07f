"""What an old daemon and its successor say to each other, over a SEQPACKET socket of their own. Version 1 of the handover.

The order of things is in `old_table` and `new_table`. Both sides are luods, perhaps of different releases: `meet`, `offer` and `declined`
can be read for ever. They keep their fields and their fds; a later release may add fields, with defaults, which an earlier one ignores. All
others belong to the version agreed on.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias, get_args

import attrs

from luod.manifest import Entry
from luod.notify import ManagerInfo
from luod.store import Ended
from luod.system import Process
from luod_protocol.codec import Codec
from luod_protocol.version import VersionRange

VERSIONS = VersionRange(low=1, high=1)


@attrs.frozen(kw_only=True)
class Meet:
    """New to old, first: who it is and what it knows. `kinds` maps each kind to what it can verify of it."""

    type: ClassVar[str] = "meet"
    luod: str
    pid: int
    handover: VersionRange
    wire: VersionRange
    manifest: VersionRange
    kinds: dict[str, tuple[str, ...]]


@attrs.frozen(kw_only=True)
class LastUpdate:
    """What came of the update that brought the host to this kernel, for people; see `update-status` of the wire."""

    arrived: int
    lost: tuple[str, ...]
    left_behind: tuple[str, ...]
    steps_us: dict[str, int]


@attrs.frozen(kw_only=True)
class Offer:
    """Old to new: come in. `handover` is the version agreed on. fds: the runtime directory's lock, the listening sockets in the order of
    `endpoints`, the old daemon's pidfd.

    `bound` names the sockets that luod bound itself; the others are the service manager's.
    """

    type: ClassVar[str] = "offer"
    luod: str
    pid: int
    handover: int
    generation: int
    directory: str
    endpoints: tuple[str, ...]
    bound: tuple[str, ...]
    ended: tuple[Ended, ...]
    manager: ManagerInfo | None
    last_update: LastUpdate | None = None


@attrs.frozen(kw_only=True)
class Declined:
    """Either way, before the commit: it ends here, and why."""

    type: ClassVar[str] = "declined"
    reason: str


@attrs.frozen(kw_only=True)
class Box:
    """Old to new: a preserved session, and what the service manager calls it, if it holds it. fds: its box."""

    type: ClassVar[str] = "box"
    session_id: bytes
    retrieved_by: tuple[Process, ...]
    stored: str


@attrs.frozen(kw_only=True)
class OpaqueBox:
    """Old to new: a preserved session that the old daemon can't read, and what the service manager calls it, if it holds it. fds: its
    box."""

    type: ClassVar[str] = "opaque"
    stored: str


@attrs.frozen(kw_only=True)
class Gone:
    """Old to new: a preserved session has ended. Answered by `let-go`."""

    type: ClassVar[str] = "gone"
    ended: Ended


@attrs.frozen(kw_only=True)
class LetGo:
    """New to old: its copies of that session are closed."""

    type: ClassVar[str] = "let-go"
    session_id: bytes


@attrs.frozen(kw_only=True)
class Retrieved:
    """Old to new: a process has fds of a session, perhaps of an opaque one."""

    type: ClassVar[str] = "retrieved"
    session_id: bytes
    process: Process


@attrs.frozen(kw_only=True)
class Copied:
    """Old to new: all sessions preserved when the copy began were sent; what follows is what changed since."""

    type: ClassVar[str] = "copied"


@attrs.frozen(kw_only=True)
class Verified:
    """New to old: everything before `copied` arrived and is what it should be."""

    type: ClassVar[str] = "verified"
    sessions: int


@attrs.frozen(kw_only=True)
class OpenSession:
    """Old to new, frozen: an open session, tied to the connection that follows. Its fds come in `staged` messages."""

    type: ClassVar[str] = "open-session"
    session_id: bytes
    name: str
    owner: int
    metadata: bytes
    opened_at: float
    entries: int


@attrs.frozen(kw_only=True)
class StagedEntries:
    """Old to new, frozen: entries of the open session sent last. fds: one for each."""

    type: ClassVar[str] = "staged"
    entries: tuple[Entry, ...]


@attrs.frozen(kw_only=True)
class UnreadReply:
    """Old to new, frozen: a reply that the socket of the connection sent next didn't take yet. Its fds, if any, come in `unread-fds`, for
    they may be as many as a packet holds."""

    type: ClassVar[str] = "unread"
    data: bytes


@attrs.frozen(kw_only=True)
class UnreadFds:
    """Old to new, frozen: the fds of the unread reply sent last."""

    type: ClassVar[str] = "unread-fds"
    count: int


@attrs.frozen(kw_only=True)
class Connection:
    """Old to new, frozen: a live connection. fds: the connection.

    `session_id` is the session tied to it, or empty. `upgrade_seq` is the `seq` of an `upgrade` request to answer, or -1. `lost` counts
    events that a monitor missed. `notices` tells whether the client asked to be told of updates.
    """

    type: ClassVar[str] = "connection"
    endpoint: str
    version: int
    state: str
    client: Process
    session_id: bytes
    upgrade_seq: int
    lost: int
    notices: bool = False


@attrs.frozen(kw_only=True)
class Frozen:
    """Old to new: that is all. `since_us` is when the freeze began, in microseconds of CLOCK_MONOTONIC; `stored_others` are the names in
    the service manager's store that are no session's box, those of opaque boxes among them."""

    type: ClassVar[str] = "frozen"
    since_us: int
    connections: int
    sessions: int
    opaque: int
    stored_others: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Serving:
    """New to old: the commit. Sent once, before the first byte of a client is read."""

    type: ClassVar[str] = "serving"


Handover: TypeAlias = (
    Meet
    | Offer
    | Declined
    | Box
    | OpaqueBox
    | Gone
    | LetGo
    | Retrieved
    | Copied
    | Verified
    | OpenSession
    | StagedEntries
    | UnreadReply
    | UnreadFds
    | Connection
    | Frozen
    | Serving
)

CODEC: Codec[Handover] = Codec(get_args(Handover), tolerant=(Meet, Offer, Declined))


def fds_of(message: Handover) -> int:
    """How many fds come with `message`."""
    match message:
        case Offer():
            return 2 + len(message.endpoints)
        case Box() | OpaqueBox() | Connection():
            return 1
        case StagedEntries():
            return len(message.entries)
        case UnreadFds():
            return message.count
        case _:
            return 0
