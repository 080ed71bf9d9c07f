"""What can be configured: `luod.toml`, every key with a default, so that luod runs without one.

An error names the file and the key. Nothing else is read: no environment, no second file.
"""

from __future__ import annotations

import os
import tomllib
from typing import Final

import attrs
import cattrs

from luod_protocol.codec import strict_converter
from luod_protocol.errors import LuodError

SHARED_UID_PRESERVED_FDS: Final = 512
"""fds in boxes when other programs may run as luod's uid: in-flight fds count against the uid, and everybody of it whose RLIMIT_NOFILE is
below the count can't pass fds any more. Half of the usual 1,024."""

PRIVILEGED_PRESERVED_FDS: Final = 1_000_000
"""fds in boxes with CAP_SYS_RESOURCE or CAP_SYS_ADMIN, which net/core/scm.c exempts from the count."""

HEADROOM_FDS: Final = 1024
"""Descriptors that the daemon keeps free of clients' staged fds: for packets, boxes, peeks and connections."""

CAP_SYS_ADMIN: Final = 21
CAP_SYS_RESOURCE: Final = 24


class ConfigFault(LuodError):
    """The configuration can't be used."""


@attrs.frozen(kw_only=True)
class LimitsTable:
    """[limits]: `max_preserved_fds` 0 means by privilege (see `preserved_fds`)."""

    max_sessions: int = 16_384
    max_connections: int = 1_024
    max_preserved_fds: int = 0


@attrs.frozen(kw_only=True)
class HandoverTable:
    """[handover]: bounds in seconds.

    `meet_s`: for a successor to start and say who it is. `copy_s`: for it to verify what it gets, without progress. `freeze_s`: for
    requests that were read before the freeze to be answered. `commit_s`: from the freeze until the successor serves.
    """

    meet_s: float = 30.0
    copy_s: float = 30.0
    freeze_s: float = 5.0
    commit_s: float = 5.0


@attrs.frozen(kw_only=True)
class Config:
    """The whole file."""

    limits: LimitsTable = attrs.field(factory=LimitsTable)
    handover: HandoverTable = attrs.field(factory=HandoverTable)


def load(path: str | None) -> Config:
    """The configuration in the file `path`; the defaults when it is None.

    Raises:
        ConfigFault: it can't be read, isn't TOML, or has a key or value that isn't known.
    """
    if path is None:
        return Config()
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except (OSError, ValueError) as error:  # TOMLDecodeError, and UnicodeDecodeError of a file that isn't UTF-8
        raise ConfigFault(f"{path}: {error}") from None
    try:
        config = strict_converter().structure(content, Config)
    except Exception as error:  # cattrs raises groups of whatever its hooks raise
        raise ConfigFault(f"{path}: {'; '.join(cattrs.transform_error(error, path='luod.toml'))}") from None
    for name, table in (("limits", config.limits), ("handover", config.handover)):
        for key, value in attrs.asdict(table).items():
            # Asked this way round, so that nan is refused too.
            if not (value > 0 or (value == 0 and key == "max_preserved_fds")):
                raise ConfigFault(f"{path}: {name}.{key} = {value}: it must be more than 0")
    return config


def preserved_fds(limits: LimitsTable) -> int:
    """How many fds may lie in boxes: as configured, else by this process's privilege."""
    if limits.max_preserved_fds:
        return limits.max_preserved_fds
    return PRIVILEGED_PRESERVED_FDS if _exempt_from_in_flight_limit() else SHARED_UID_PRESERVED_FDS


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


def default_max_open() -> int:
    """RLIMIT_NOFILE of this process, soft."""
    return os.sysconf("SC_OPEN_MAX")
