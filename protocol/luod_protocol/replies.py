"""What luod answers, version 1 of the wire."""

from __future__ import annotations

from typing import ClassVar

import attrs

from luod_protocol.records import EntryInfo, Limits, SessionInfo, SortSurvival


@attrs.frozen(kw_only=True)
class Welcome:
    """To `hello`: the version in use, which daemon this is, and its limits."""

    type: ClassVar[str] = "welcome"
    seq: int
    version: int
    luod: str
    generation: int
    limits: Limits


@attrs.frozen(kw_only=True)
class DaemonStatus:
    """To `status`. `open_fds` counts the daemon's descriptors, `preserved_fds` those inside its boxes.

    `last_pause_us` is what the last handover to this daemon took from freeze to serving, in microseconds; 0 for a first generation.
    `manager` is who would start it again after a crash, empty for nobody; `stored_fds` how many fds it has in the manager's store, of
    `store_limit`, which is 0 where that isn't known. `sessions_opaque` counts preserved sessions that this luod can't read: they are kept
    for one that can.
    """

    type: ClassVar[str] = "daemon-status"
    seq: int
    luod: str
    pid: int
    generation: int
    started_at: float
    sessions_open: int
    sessions_preserved: int
    sessions_claimed: int
    preserved_fds: int
    staged_fds: int
    connections: int
    open_fds: int
    last_pause_us: int
    manager: str
    stored_fds: int
    store_limit: int
    sessions_opaque: int


@attrs.frozen(kw_only=True)
class DaemonCapabilities:
    """To `capabilities`.

    `kinds` maps each kind to its handler's `compatible`. `survives` maps `daemon-upgrade`, `daemon-crash`, `service-restart`,
    `soft-reboot` and `kexec` to the empty string for yes, else to the reason why not, for a session of what survives most. `matrix` says
    the same of each sort of fd, as the running kernel answers; also of those that aren't taken.
    """

    type: ClassVar[str] = "daemon-capabilities"
    seq: int
    kinds: dict[str, str]
    survives: dict[str, str]
    matrix: tuple[SortSurvival, ...]


@attrs.frozen(kw_only=True)
class Opened:
    """To `open`."""

    type: ClassVar[str] = "opened"
    seq: int
    session_id: bytes


@attrs.frozen(kw_only=True)
class Preserved:
    """To `preserve`: the entries as luod recognized them."""

    type: ClassVar[str] = "preserved"
    seq: int
    entries: tuple[EntryInfo, ...]


@attrs.frozen(kw_only=True)
class Unpreserved:
    """To `unpreserve`."""

    type: ClassVar[str] = "unpreserved"
    seq: int


@attrs.frozen(kw_only=True)
class Finalized:
    """To `finalize`: luod has custody. `survives` holds for every entry; `entry_survives` says where entries differ."""

    type: ClassVar[str] = "finalized"
    seq: int
    session_id: bytes
    survives: tuple[str, ...]
    entry_survives: dict[str, tuple[str, ...]]


@attrs.frozen(kw_only=True)
class Cancelled:
    """To `cancel`."""

    type: ClassVar[str] = "cancelled"
    seq: int


@attrs.frozen(kw_only=True)
class Listed:
    """To `list`, oldest session first."""

    type: ClassVar[str] = "listed"
    seq: int
    sessions: tuple[SessionInfo, ...]


@attrs.frozen(kw_only=True)
class Shown:
    """To `show`."""

    type: ClassVar[str] = "shown"
    seq: int
    info: SessionInfo
    metadata: bytes
    entries: tuple[EntryInfo, ...]


@attrs.frozen(kw_only=True)
class Claimed:
    """To `claim`."""

    type: ClassVar[str] = "claimed"
    seq: int
    info: SessionInfo
    metadata: bytes
    entries: tuple[EntryInfo, ...]


@attrs.frozen(kw_only=True)
class Retrieved:
    """To `retrieve`; the fds come with the packet, in the order of `names`."""

    type: ClassVar[str] = "retrieved"
    seq: int
    names: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Released:
    """To `release`."""

    type: ClassVar[str] = "released"
    seq: int


@attrs.frozen(kw_only=True)
class Finished:
    """To `finish`."""

    type: ClassVar[str] = "finished"
    seq: int
    session_id: bytes


@attrs.frozen(kw_only=True)
class Discarded:
    """To `discard`."""

    type: ClassVar[str] = "discarded"
    seq: int
    session_id: bytes


@attrs.frozen(kw_only=True)
class Monitoring:
    """To `monitor`."""

    type: ClassVar[str] = "monitoring"
    seq: int


@attrs.frozen(kw_only=True)
class Event:
    """On a monitoring connection: something happened. `lost` counts events dropped before this one, the reader being slow."""

    type: ClassVar[str] = "event"
    seq: int
    at: float
    event: str
    session: str
    session_id: bytes
    owner: int
    detail: str
    lost: int


@attrs.frozen(kw_only=True)
class Upgraded:
    """To `upgrade`, from the successor. `pause_us` is the time from freeze to serving, in microseconds."""

    type: ClassVar[str] = "upgraded"
    seq: int
    generation: int
    pid: int
    predecessor_pid: int
    pause_us: int


@attrs.frozen(kw_only=True)
class TakeoverOffered:
    """To `takeover`: one fd comes with the packet, the handover socket. What is said there is between luods only."""

    type: ClassVar[str] = "takeover-offered"
    seq: int


@attrs.frozen(kw_only=True)
class UpdateStatus:
    """To `update`, `prepare`, `freeze` and `cancel-update`: where an update of the kernel is.

    `state` is `normal`, `preparing`, `prepared`, `frozen`, `undoing` or `updated`. `reason` says why the last one was given up.
    `deadline` is until when open sessions are waited for, in seconds since 1970, 0 for no such time. `carried` sessions with
    `carried_fds` fds are preserved for the next kernel. `left_behind` names sessions that are not to be carried or, after an update,
    were not. `arrived` sessions came from the last kernel, `lost` names those that should have, with the reason. `steps_us` is what
    each step of the last update took, in microseconds.
    """

    type: ClassVar[str] = "update-status"
    seq: int
    state: str
    reason: str
    deadline: float
    carried: int
    carried_fds: int
    left_behind: tuple[str, ...]
    arrived: int
    lost: tuple[str, ...]
    steps_us: dict[str, int]


@attrs.frozen(kw_only=True)
class PreflightReport:
    """To `preflight`. `fault` says why no update is possible at all, empty where one is.

    `sessions` could be carried, with `fds` fds. `memory_bytes` is what memfds have, `hole_bytes` what they would grow by, since the kernel
    fills holes. `open_sessions` names those that would have to be finalized first, `cannot` each that can't travel with the reason.
    """

    type: ClassVar[str] = "preflight-report"
    seq: int
    fault: str
    sessions: int
    fds: int
    memory_bytes: int
    hole_bytes: int
    open_sessions: tuple[str, ...]
    cannot: dict[str, str]


@attrs.frozen(kw_only=True)
class Notice:
    """On a connection whose `open` asked for it: an update of the kernel is coming (`prepare`), or isn't any more (`cancelled`).

    `deadline` is until when luod waits for the session to be finalized, in seconds since 1970.
    """

    type: ClassVar[str] = "notice"
    seq: int
    what: str
    deadline: float


@attrs.frozen(kw_only=True)
class Refused:
    """To any request: it is not granted and nothing changed. `code` and `errno` are stable, `message` is for a person."""

    type: ClassVar[str] = "refused"
    seq: int
    code: str
    errno: int
    message: str
    entry: str = ""


@attrs.frozen(kw_only=True)
class Fault:
    """The last message on a connection whose peer broke the protocol."""

    type: ClassVar[str] = "fault"
    code: str
    errno: int
    message: str
