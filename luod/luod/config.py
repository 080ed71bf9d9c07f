"""What can be configured: `luod.toml`, every key with a default, so that luod runs without one. docs/configuration.md has all of them.

The file is read once, at the start; a successor reads it anew. What it says is for new requests: what is held already stays.

Happy path: `load`.

Unhappy paths:
1. The file can't be read, or has keys or values that luod doesn't know: `ConfigFault`, with everything that is wrong, each with the file
   and the key. There is no half of a configuration.

Nothing else is read: no environment, no second file.
"""

from __future__ import annotations

import grp
import pwd
import tomllib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias

import attrs

from luod.handlers import kinds as known_kinds
from luod.policy import ClaimRule, Gid, NamePattern, Policy, SerializeRule, Uid
from luod.reading import BadValue, Hook, Problems, exactly, number, structure
from luod_protocol.errors import LuodError
from luod_protocol.limits import MAX_NAME_BYTES, name_fault

Count: TypeAlias = Annotated[int, "more than 0"]
CountOrDefault: TypeAlias = Annotated[int, "0 or more"]
Seconds: TypeAlias = Annotated[float, "more than 0"]
SecondsOrNever: TypeAlias = Annotated[float, "0 or more seconds"]
Kind: TypeAlias = Annotated[str, "kind"]
PathPattern: TypeAlias = Annotated[str, "path pattern"]

NO_ID: Final = 2**32 - 1
"""What the kernel takes for no uid or gid, chown(2)."""


class ConfigFault(LuodError):
    """The configuration can't be used. `texts` has each problem, with the file and the key."""

    def __init__(self, path: str, problems: tuple[str, ...]) -> None:
        super().__init__(f"{path}: {'; '.join(problems)}")
        self.texts: Final = tuple(f"{path}: {problem}" for problem in problems)


@attrs.frozen(kw_only=True)
class PerUidTable:
    """[limits.per_uid]: what each uid may have, other than root and luod's own. 0 means half of what luod takes in all."""

    max_sessions: CountOrDefault = 0
    max_connections: CountOrDefault = 0
    max_preserved_fds: CountOrDefault = 0
    max_staged_fds: CountOrDefault = 0
    max_metadata_bytes: Count = 64 * 1024 * 1024


@attrs.frozen(kw_only=True)
class LimitsTable:
    """[limits]: `max_preserved_fds` 0 means by privilege (see `capacity`). `idle_open_s`: how long the client of an open session may do
    nothing, in seconds; 0: for ever."""

    max_sessions: Count = 16_384
    max_connections: Count = 1_024
    max_preserved_fds: CountOrDefault = 0
    idle_open_s: SecondsOrNever = 0.0
    per_uid: PerUidTable = attrs.field(factory=PerUidTable)


@attrs.frozen(kw_only=True)
class KindsTable:
    """[kinds]: which kinds of fds are taken: those of `allow` that aren't in `deny`."""

    allow: tuple[Kind, ...] = attrs.field(factory=lambda: tuple(known_kinds()))
    deny: tuple[Kind, ...] = ()


@attrs.frozen(kw_only=True)
class FilesTable:
    """[files]: paths of the files and devices that are taken although no handler knows more of them than that."""

    allow: tuple[PathPattern, ...] = ()


@attrs.frozen(kw_only=True)
class HandoverTable:
    """[handover]: bounds in seconds.

    `meet_s`: for a successor to start and say who it is. `copy_s`: for it to verify what it gets, without progress. `freeze_s`: for
    requests that were read before the freeze to be answered. `commit_s`: from the freeze until the successor serves.
    """

    meet_s: Seconds = 30.0
    copy_s: Seconds = 30.0
    freeze_s: Seconds = 5.0
    commit_s: Seconds = 5.0


@attrs.frozen(kw_only=True)
class Config:
    """The whole file."""

    limits: LimitsTable = attrs.field(factory=LimitsTable)
    kinds: KindsTable = attrs.field(factory=KindsTable)
    files: FilesTable = attrs.field(factory=FilesTable)
    serialize: tuple[SerializeRule, ...] = ()
    claim: tuple[ClaimRule, ...] = ()
    handover: HandoverTable = attrs.field(factory=HandoverTable)

    @property
    def policy(self) -> Policy:
        """The rules."""
        return Policy(serialize=self.serialize, claim=self.claim)


def load(path: str | None) -> Config:
    """The configuration in the file `path`; the defaults when it is None.

    Names of users and groups are looked up now, and may make the system's name service wait.

    Raises:
        ConfigFault: it can't be read, isn't TOML, or has keys or values that aren't known.
    """
    if path is None:
        return Config()
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigFault(path, (error.strerror or str(error),)) from None
    except ValueError as error:  # TOMLDecodeError, and UnicodeDecodeError of a file that isn't UTF-8
        raise ConfigFault(path, (str(error),)) from None
    try:
        return structure(content, Config, _HOOKS)
    except Problems as problems:
        raise ConfigFault(path, problems.texts) from None


# ------------------------------------------------------------------------------------------------------ what a mark takes


def _count(value: object) -> int:
    count = exactly(value, int, "an integer")
    if count < 1:
        raise BadValue(value, "it must be more than 0")
    return count


def _count_or_default(value: object) -> int:
    count = exactly(value, int, "an integer")
    if count < 0:
        raise BadValue(value, "it must be 0 or more")
    return count


def _seconds(value: object) -> float:
    seconds = number(value)
    # Asked this way round, so that nan is refused too.
    if not seconds > 0:
        raise BadValue(value, "it must be more than 0")
    return seconds


def _seconds_or_never(value: object) -> float:
    seconds = number(value)
    # nan is refused too.
    if not seconds >= 0:
        raise BadValue(value, "it must be 0 or more")
    return seconds


def _kind(value: object) -> str:
    kind = exactly(value, str, "text")
    if kind not in known_kinds():
        raise BadValue(value, f"there is no such kind; there are {', '.join(known_kinds())}")
    return kind


def _id(what: str, lookup: Callable[[str], int]) -> Hook:
    def read(value: object) -> int:
        if type(value) is str:
            try:
                return lookup(value)
            except KeyError:
                raise BadValue(value, f"there is no such {what}") from None
            except ValueError as error:  # a null byte
                raise BadValue(value, f"it can't be a {what}'s name: {error}") from None
        number = exactly(value, int, f"a number or a {what}'s name")
        if not 0 <= number < NO_ID:
            raise BadValue(value, f"numbers are 0 to {NO_ID - 1}")
        return number

    return read


def _name_pattern(value: object) -> str:
    pattern = exactly(value, str, "text")
    # A class such as [0-:] may have what a name may not.
    fault = name_fault(pattern[:MAX_NAME_BYTES])
    if fault is not None and "[" not in pattern:
        raise BadValue(value, f"no name can match it: {fault}")
    return pattern


def _path_pattern(value: object) -> str:
    pattern = exactly(value, str, "text")
    if not pattern.startswith("/"):
        raise BadValue(value, "it must be an absolute path")
    if not pattern.isprintable():
        raise BadValue(value, "it has characters that can't be printed")
    if {"", ".", ".."} & set(pattern.split("/")[1:]):
        raise BadValue(value, "no path that the kernel tells can match it: leave out '.', '..', double and trailing '/'")
    return pattern


_HOOKS: Final[Mapping[Any, Hook]] = {
    Count: _count,
    CountOrDefault: _count_or_default,
    Seconds: _seconds,
    SecondsOrNever: _seconds_or_never,
    Kind: _kind,
    PathPattern: _path_pattern,
    NamePattern: _name_pattern,
    Uid: _id("user", lambda name: pwd.getpwnam(name).pw_uid),
    Gid: _id("group", lambda name: grp.getgrnam(name).gr_gid),
}
