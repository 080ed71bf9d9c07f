"""How much luod takes: what the configuration says, within what the machine lets this process have."""

from __future__ import annotations

import resource
from typing import Final

import attrs

from luod.config import LimitsTable
from luod.quota import Share
from luod_protocol.limits import MAX_FDS_PER_PACKET

SHARED_UID_PRESERVED_FDS: Final = 512
"""fds in boxes when other programs may run as luod's uid: in-flight fds count against the uid, and everybody of it whose RLIMIT_NOFILE is
below the count can't pass fds any more. Half of the usual 1,024."""

PRIVILEGED_PRESERVED_FDS: Final = 1_000_000
"""fds in boxes with CAP_SYS_RESOURCE or CAP_SYS_ADMIN, which net/core/scm.c exempts from the count."""

HEADROOM_FDS: Final = 1024
"""Descriptors that the daemon keeps free of clients' staged fds: for packets, boxes, peeks and connections."""

LEAST_HEADROOM_FDS: Final = 2 * MAX_FDS_PER_PACKET + 64
"""The same where RLIMIT_NOFILE is low: a packet and a box's content at once, and luod's own. With less the kernel cuts a packet off before
luod can refuse it."""

CLOSING_FDS: Final = 512
"""fds of one uid that may wait to be closed before nothing more is read from it."""

CAP_SYS_ADMIN: Final = 21
CAP_SYS_RESOURCE: Final = 24


@attrs.frozen(kw_only=True)
class Capacity:
    """What the daemon takes, all clients together, and the share of each uid.

    `staged_fds` are those of open sessions, each a descriptor of the daemon, and those that wait to be closed; of the latter each uid has
    `closing_fds` at most, and one packet. `preserved_fds` are those in boxes, each in flight for the daemon's uid.
    """

    sessions: int
    connections: int
    staged_fds: int
    preserved_fds: int
    closing_fds: int
    share: Share


def capacity(limits: LimitsTable) -> Capacity:
    """What this process takes with these limits."""
    # Which luod has from the start: see `__main__`.
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(limits.max_connections, descriptors // 4)
    headroom = min(HEADROOM_FDS, max(descriptors // 4, min(LEAST_HEADROOM_FDS, descriptors // 2)))
    staged = descriptors - connections - headroom
    preserved = preserved_fds(limits, descriptors)
    per_uid = limits.per_uid
    return Capacity(
        sessions=limits.max_sessions,
        connections=connections,
        staged_fds=staged,
        preserved_fds=preserved,
        closing_fds=min(CLOSING_FDS, max(1, staged // 4)),
        share=Share(
            sessions=per_uid.max_sessions or _half(limits.max_sessions),
            connections=per_uid.max_connections or _half(connections),
            preserved_fds=per_uid.max_preserved_fds or _half(preserved),
            staged_fds=per_uid.max_staged_fds or _half(staged),
            metadata_bytes=per_uid.max_metadata_bytes,
        ),
    )


def _half(whole: int) -> int:
    return max(1, whole // 2)


def preserved_fds(limits: LimitsTable, descriptors: int) -> int:
    """How many fds may lie in boxes: as configured, else by this process's privilege; without privilege no more than half of RLIMIT_NOFILE
    (`descriptors`), beyond which the kernel passes no more, and in a handover fds are in flight twice."""
    if _exempt_from_in_flight_limit():
        return limits.max_preserved_fds or PRIVILEGED_PRESERVED_FDS
    return min(limits.max_preserved_fds or SHARED_UID_PRESERVED_FDS, max(1, descriptors // 2))


def _exempt_from_in_flight_limit() -> bool:
    # too_many_unix_fds() asks capable(), which looks at the initial user namespace only.
    with open("/proc/self/status", encoding="ascii") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return bool(effective & (1 << CAP_SYS_ADMIN | 1 << CAP_SYS_RESOURCE)) and all_uids_are_mapped()


def all_uids_are_mapped() -> bool:
    """Whether this is a user namespace in which each uid is itself, as in the initial one."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def overflow_uid() -> int:
    """The uid as which the kernel shows those that aren't mapped here."""
    with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
        return int(file.read())
