"""What a client may ask, version 1 of the wire. `seq` is of the client's choice, 0 to 2**32 - 1; the answer bears the same."""

from __future__ import annotations

from typing import ClassVar

import attrs

from luod_protocol.records import EntrySpec


@attrs.frozen(kw_only=True)
class Hello:
    """First on every connection: the range of wire versions that the client knows, and who it is (for logs)."""

    type: ClassVar[str] = "hello"
    seq: int
    low: int
    high: int
    client: str = ""


@attrs.frozen(kw_only=True)
class Status:
    """Any endpoint: how the daemon is."""

    type: ClassVar[str] = "status"
    seq: int


@attrs.frozen(kw_only=True)
class Capabilities:
    """Any endpoint: the kinds this daemon takes and what a finalized session survives."""

    type: ClassVar[str] = "capabilities"
    seq: int


@attrs.frozen(kw_only=True)
class Open:
    """serialize: open the session of this connection. `owner` is for root: the uid that shall own it.

    `notices`: whether to send a `notice` on this connection while the session is open, when an update of the kernel is coming.
    """

    type: ClassVar[str] = "open"
    seq: int
    session: str
    session_id: bytes
    metadata: bytes = b""
    owner: int | None = None
    notices: bool = False


@attrs.frozen(kw_only=True)
class Preserve:
    """serialize: add entries; as many fds come with the packet, in the same order."""

    type: ClassVar[str] = "preserve"
    seq: int
    entries: tuple[EntrySpec, ...]


@attrs.frozen(kw_only=True)
class Unpreserve:
    """serialize: take entries out again; luod closes its copies before it answers."""

    type: ClassVar[str] = "unpreserve"
    seq: int
    names: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Finalize:
    """serialize: seal the set. With the id of an already finalized session, and no session open: say so again.

    `require` names what the set must survive, else the request is refused. `seal` names seals to add to entries that are memfds:
    `seal`, `shrink`, `grow`, `write`, `future-write`, `exec`. `entries` is how many the client has preserved: with another number the
    request is refused, so that one sent behind a `preserve` that was refused can't seal a part.
    """

    type: ClassVar[str] = "finalize"
    seq: int
    session_id: bytes
    require: tuple[str, ...] = ()
    entries: int | None = None
    seal: dict[str, tuple[str, ...]] = attrs.Factory(dict[str, tuple[str, ...]])


@attrs.frozen(kw_only=True)
class Cancel:
    """serialize: drop the open session; luod closes all its fds before it answers."""

    type: ClassVar[str] = "cancel"
    seq: int


@attrs.frozen(kw_only=True)
class List:
    """deserialize, control: the sessions that the client may see; root sees all, or `owner`'s."""

    type: ClassVar[str] = "list"
    seq: int
    owner: int | None = None


@attrs.frozen(kw_only=True)
class Show:
    """deserialize, control: one session and its entries, by name or by id (the other is empty)."""

    type: ClassVar[str] = "show"
    seq: int
    session: str = ""
    session_id: bytes = b""
    owner: int | None = None


@attrs.frozen(kw_only=True)
class Claim:
    """deserialize: take the exclusive right to a preserved session, until `finish`, `release` or the end of the connection.

    `force` claims it although a process that retrieved from it is still alive.
    """

    type: ClassVar[str] = "claim"
    seq: int
    session: str = ""
    session_id: bytes = b""
    owner: int | None = None
    force: bool = False


@attrs.frozen(kw_only=True)
class Retrieve:
    """deserialize: fresh duplicates of these entries' fds, 253 at most a request."""

    type: ClassVar[str] = "retrieve"
    seq: int
    names: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Release:
    """deserialize: give the claim back; the session stays preserved."""

    type: ClassVar[str] = "release"
    seq: int


@attrs.frozen(kw_only=True)
class Finish:
    """deserialize: luod lets go of the claimed session, and of every fd in it before it answers."""

    type: ClassVar[str] = "finish"
    seq: int
    session_id: bytes


@attrs.frozen(kw_only=True)
class Discard:
    """deserialize: drop a preserved session that nobody will claim; every fd is closed before the answer."""

    type: ClassVar[str] = "discard"
    seq: int
    session: str = ""
    session_id: bytes = b""
    owner: int | None = None
    force: bool = False


@attrs.frozen(kw_only=True)
class Monitor:
    """control: from now on `event` messages come on this connection, and no other request is taken."""

    type: ClassVar[str] = "monitor"
    seq: int


@attrs.frozen(kw_only=True)
class Upgrade:
    """control: hand over to a fresh luod, which answers. `program` is its executable; empty: this daemon's own."""

    type: ClassVar[str] = "upgrade"
    seq: int
    program: str = ""


@attrs.frozen(kw_only=True)
class Takeover:
    """control: the sender is a luod that wants to succeed this one. The answer brings the handover socket."""

    type: ClassVar[str] = "takeover"
    seq: int


@attrs.frozen(kw_only=True)
class Update:
    """Any endpoint: how an update of the kernel is going, or went."""

    type: ClassVar[str] = "update"
    seq: int


@attrs.frozen(kw_only=True)
class Preflight:
    """control: what an update of the kernel would carry now, and what not, and why. Changes nothing."""

    type: ClassVar[str] = "preflight"
    seq: int


@attrs.frozen(kw_only=True)
class Prepare:
    """control: prepare for an update of the kernel. The answer comes at once, `update` tells when all is prepared.

    `deadline_s` is how long to wait for open sessions to be finalized, in seconds. `leave_behind` names sessions (by name, or id in
    hexadecimal) that need not come along; with `force` all that can't travel need not.
    """

    type: ClassVar[str] = "prepare"
    seq: int
    deadline_s: float
    leave_behind: tuple[str, ...] = ()
    force: bool = False


@attrs.frozen(kw_only=True)
class Freeze:
    """control: nothing changes from here on, for the reboot comes now. It holds until this connection ends, or `cancel-update`."""

    type: ClassVar[str] = "freeze"
    seq: int


@attrs.frozen(kw_only=True)
class CancelUpdate:
    """control: give the update up, and serve as before. `reason` is for whoever asks later."""

    type: ClassVar[str] = "cancel-update"
    seq: int
    reason: str = ""
